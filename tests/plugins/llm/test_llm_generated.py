"""A language model continues texts: what it predicts, drawn row by row, whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llm_toys
import tinyfusion_core as tiny
from llm_toys import TOKENS, VOCABULARY
from tinyfusion_core.cli import main
from tinyfusion_llm import NextToken
from tinyfusion_llm.generation.continuing import drawn
from tinyfusion_llm.hidden import IGNORED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return llm_toys.task_of(llm_toys.folder(tmp_path_factory.mktemp("model"), "llama")).teacher


def rng(*rows: int) -> tiny.Rng:
    return tiny.Rng(0, "generated data", rows=rows)


def batch(**prompts: int) -> dict[str, torch.Tensor]:
    """Three texts, the first tokens of some of which are a prompt."""
    labels = TOKENS.clone()
    for row, length in prompts.items():
        labels[int(row[3:]), :length] = IGNORED
    return {"tokens": TOKENS, "labels": labels}


def predicted(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, vocabulary) logits, in one pass without a cache."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "lfm2", "mixtral"])
def test_the_most_probable_tokens_are_those_of_one_pass(family: str, tmp_path: Path) -> None:
    model = llm_toys.task_of(llm_toys.folder(tmp_path, family)).teacher
    asked = batch(row1=6, row2=3)
    found = NextToken(prompt_tokens=4, top_p=1e-9).generated(model, asked, "tokens", rng(0, 1, 2))
    best = predicted(model, found["tokens"]).argmax(-1)
    for row, kept in enumerate((4, 6, 3)):
        assert found["tokens"][row, :kept].tolist() == TOKENS[row, :kept].tolist()
        assert found["labels"][row, :kept].tolist() == asked["labels"][row, :kept].tolist()
        end = (found["tokens"][row] == 2).nonzero()
        last = int(end[0]) + 1 if len(end) else 12
        assert found["tokens"][row, kept:last].tolist() == best[row, kept - 1 : last - 1].tolist()
        assert found["labels"][row, kept:].tolist() == [
            *found["tokens"][row, kept:last].tolist(),
            *[IGNORED] * (12 - last),
        ]
    assert model.generation_config.temperature == 0.5  # the model's own, which has no part in it


def test_a_row_does_not_depend_on_the_others(model: Any) -> None:
    loss, asked = NextToken(prompt_tokens=4), batch(row1=6, row2=3)
    together = loss.generated(model, asked, "tokens", rng(5, 6, 7))
    for row in range(3):
        alone = loss.generated(model, {n: t[row : row + 1] for n, t in asked.items()}, "tokens", rng(5 + row))
        assert all(torch.equal(alone[name], t[row : row + 1]) for name, t in together.items())
    again = loss.generated(model, asked, "tokens", rng(6, 7, 8))
    assert not torch.equal(again["tokens"], together["tokens"])
    assert asked["labels"].equal(batch(row1=6, row2=3)["labels"])


def test_tokens_come_as_often_as_they_are_probable(model: Any) -> None:
    num, temperature = 1500, 0.7
    tokens = TOKENS[:1, :5].expand(num, -1)
    loss = NextToken(prompt_tokens=4, sampling_temperature=temperature)
    found = loss.generated(model, {"tokens": tokens, "labels": tokens}, "tokens", rng(*range(num)))["tokens"][:, 4]
    p = (predicted(model, tokens[:1, :4])[0, -1] / temperature).softmax(-1)
    counts = torch.tensor([Counter(found.tolist())[i] for i in range(VOCABULARY)])
    error = (counts / num - p).abs() / (p * (1 - p) / num).sqrt().clamp(min=1 / num)
    assert float(error.max()) < 5
    assert len(counts.nonzero()) > 3


def test_only_the_most_probable_ones_are_drawn() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4, -1)
    u = torch.tensor([0.0, 0.57, 0.58, 1 - 1e-12], dtype=torch.float64)
    assert drawn(logits, u, 0.7).tolist() == [1, 1, 3, 3]  # 0.4 and 0.3 have it together
    assert drawn(logits, u, 0.71).tolist() == [1, 2, 2, 3]
    assert drawn(logits, u, 1.0).tolist() == [0, 2, 2, 3]
    assert drawn(logits, u, 1e-9).tolist() == [1] * 4


def test_a_text_ends_with_its_end(model: Any) -> None:
    script, head = iter([7, 8, 2]), model.lm_head.forward
    tokens, loss = TOKENS[:2], NextToken(prompt_tokens=4)

    def says(states: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*states.shape[:2], VOCABULARY), -torch.inf)
        logits[..., next(script)] = 0.0
        return logits

    model.lm_head.forward = says
    try:
        found = loss.generated(model, {"tokens": tokens, "labels": tokens}, "tokens", rng(0, 1))
    finally:
        model.lm_head.forward = head
    assert found["tokens"][:, 4:].tolist() == [[7, 8, 2, *[0] * 5]] * 2
    assert found["labels"][:, 4:].tolist() == [[7, 8, 2, *[IGNORED] * 5]] * 2


def test_what_has_no_room_stays(model: Any) -> None:
    asked = {**batch(row0=12, row1=12, row2=12), "positions": torch.zeros(3, 12, dtype=torch.long)}
    found = NextToken().generated(model, asked, "tokens", rng(0, 1, 2))
    assert torch.equal(found["tokens"], TOKENS)
    assert (found["labels"] == IGNORED).all()
    separate = {**batch(row0=1, row1=1, row2=1), "positions": torch.zeros(3, 12, dtype=torch.long)}
    found = NextToken(prompt_tokens=5).generated(model, separate, "tokens", rng(0, 1, 2))
    assert torch.equal(found["tokens"][:, :5], TOKENS[:, :5])
    assert found["labels"][:, 0].tolist() == [IGNORED] * 3
    assert torch.equal(found["positions"], torch.arange(12).expand(3, -1))


def test_a_prompt_as_long_as_the_text_is_refused(model: Any) -> None:
    asked = batch(row0=12, row1=1, row2=1)
    with pytest.raises(tiny.UserError, match=r"^prompt_tokens is 12; expected fewer than the 12 tokens of a text"):
        NextToken(prompt_tokens=12).own_samples(model, asked, "tokens", rng(0, 1, 2))
    assert (NextToken(prompt_tokens=11).own_samples(model, asked, "tokens", rng(0, 1, 2))["labels"] != IGNORED).any()


@pytest.mark.parametrize("bad", [{"prompt_tokens": 0}, {"sampling_temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_wrong_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(tiny.UserError, match=f"^{next(iter(bad))} is "):
        NextToken(**bad)


@pytest.mark.slow
def test_a_student_learns_from_its_teachers_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = llm_toys.folder(tmp_path / "model", "llama"), tmp_path / "made"
    path = Path(llm_toys.recipe_of(folder, tmp_path))
    words = ["generate-data", str(path), "--out", str(out), "--samples", "30", "--batch-size", "4"]
    words += ["--loss.prompt_tokens", "3", "--loss.top_p", "0.9"]
    assert main(words) == 2
    assert "error: the teacher's loss on " in capsys.readouterr().err  # it knows nothing yet
    assert not out.exists()
    recipe = tiny.load_recipe(path)
    real, teacher = recipe.data.train(), recipe.backbone.build().train()
    optimizer, rows = torch.optim.AdamW(teacher.parameters(), lr=1e-2), real.__getitems__(list(range(len(real))))
    for _ in range(60):
        teacher(input_ids=rows["tokens"], labels=rows["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.save_pretrained(folder)

    assert main(words) == 0
    assert f"{out}: 30 samples in 1 shards, all verified\n" in capsys.readouterr().out
    made = tiny.Generated(folder=str(out), num_held_out=0).train()
    found = made.__getitems__(list(range(30)))
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in rows.items()}
    began = real.__getitems__([i % len(real) for i in range(30)])["tokens"][:, :3]
    assert torch.equal(found["tokens"][:, :3], began)
    counts = (found["tokens"].diff(dim=1) == 1).float().mean()  # the text counts, w3 w4 w5 ...
    assert counts > 0.8

    content = yaml.safe_load(path.read_text())
    given = {"class_path": "Generated", "init_args": {"folder": str(out), "num_held_out": 0}}
    parts = {"parts": {"real": content["data"], "made": given}, "weights": {"real": 0, "made": 1}}
    content["data"] = {"class_path": "Mixture", "init_args": parts}
    content["search"] = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 4, 5]}}
    content["recover"] = {"steps": 2, "kd": "OutputKD"}
    path.write_text(yaml.safe_dump(content))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
