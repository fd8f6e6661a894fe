"""Documents of a packed sample are kept apart: each is read as though it stood alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import tinyfusion_core as tiny
from llm_toys import decide, folder, recipe_of, settings, tokenizer
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_llm import CausalLM, NextToken, Perplexity, TextTokens
from tinyfusion_llm.layers.building import randomised
from tinyfusion_llm.separate import check_separate

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
WORDS = [5, 3, 1, 16, 2, 9, 4, 12, 7, 6, 13, 8]
"""Words of each document; its end makes them one token more."""


@pytest.fixture
def data(tmp_path: Path) -> TextTokens:
    for number, words in enumerate(WORDS):
        text = " ".join(f"w{3 + (7 * number + i) % 90}" for i in range(words))
        (tmp_path / f"{number:02}.txt").write_text(text)
    files = sorted(str(path) for path in tmp_path.glob("*.txt"))
    how: dict[str, Any] = {"tokenizer": str(tokenizer(tmp_path / "words")), "cache": str(tmp_path / "cache")}
    return TextTokens(files=files[:9], held_out_files=files[9:], context=12, separate=True, **how)


def task_of(path: Path, data: TextTokens) -> tiny.Task:
    backbone = CausalLM(model=str(path), context=12, separate=True)
    return tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out())


def prepared(task: tiny.Task) -> dict[str, Tensor]:
    rows = task.train
    return task.loss.prepare(rows.__getitems__(list(range(len(rows)))), tiny.Rng(0, "test"))


def test_samples_say_where_documents_begin(data: TextTokens) -> None:
    rows = data.train()
    batch = rows.__getitems__(list(range(len(rows))))
    tokens, labels, positions = (batch[name].flatten() for name in ("tokens", "labels", "positions"))
    after_an_end = torch.cat([torch.tensor([True]), tokens[:-1] == 2])
    begins = after_an_end | (torch.arange(len(tokens)) % 12 == 0)  # a sample begins anew too
    expected, place = [], 0
    for begin in begins.tolist():
        place = 0 if begin else place + 1
        expected.append(place)
    assert positions.tolist() == expected
    assert torch.equal(labels == -100, begins)
    assert torch.equal(labels[~begins], tokens[~begins])
    assert int(begins.sum()) > len(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family", slow_but(["llama", "qwen3", "mistral", "gemma3_text", "qwen3_moe", "gpt2"], "llama", "gpt2")
)
def test_each_document_is_read_as_though_it_stood_alone(
    family: str, attention: str, data: TextTokens, tmp_path: Path
) -> None:
    task = task_of(folder(tmp_path / "model", family), data)
    model, inputs = task.teacher, prepared(task)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        prediction = task.loss.predict(model, inputs)
        packed = prediction.head(prediction.states)
        for tokens, positions, found in zip(inputs["tokens"], inputs["positions"], packed, strict=True):
            firsts = [*(positions == 0).nonzero().flatten().tolist(), 12]
            for first, end in pairwise(firsts):
                alone = model(input_ids=tokens[None, first:end], use_cache=False).logits[0]
                assert torch.allclose(found[first:end], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
        joined = task.loss.predict(model, {**inputs, "positions": torch.arange(12).expand(len(packed), -1)})
    assert float((joined.states - prediction.states).abs().max()) > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gates_and_students_keep_them_apart_too(family: str, data: TextTokens, tmp_path: Path) -> None:
    task, kept = task_of(folder(tmp_path / "model", family), data), (0, 2, 3, 5)
    inputs, dims = prepared(task), task.batch_dim(task.teacher)
    num = len(inputs["tokens"])
    with torch.no_grad():
        plain = task.loss.predict(task.teacher, inputs).states
        student = task.loss.predict(tiny.prune(task, decide(task, kept)), inputs).states
        streams, unneeded = task.backbone.streams, task.backbone.unneeded
        with Gates(task.teacher, task.blocks, dims, streams, unneeded) as gates:
            gates.mask = torch.ones(num, 6)
            assert torch.equal(task.loss.predict(task.teacher, inputs).states, plain)
            # Some samples keep all, the others what the student has: each block runs a part of the masks.
            gates.mask = torch.tensor([[float(i in kept or row % 2) for i in range(6)] for row in range(num)])
            gated = task.loss.predict(task.teacher, inputs).states
    assert torch.allclose(gated[1::2], plain[1::2], atol=1e-5)
    assert torch.allclose(gated[::2], student[::2], atol=1e-5)


def test_a_cached_teacher_is_the_teacher_and_knows_whether_they_were_apart(data: TextTokens, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "model", "llama"), data)
    trainer = tiny.Trainer(precision="fp32", batch_size=len(task.train))  # their order is another
    cache = tiny.TeacherCache(folder=str(tmp_path / "kept"), dtype="float32")
    task = replace(task, loss=NextToken(top_k=8))
    tiny.write_cache(cache, task, trainer)
    students = []
    for kept in (cache, None):
        how = tiny.Recover(steps=3, lr=1e-3, ema=0.0, kd=tiny.OutputKD(cache=kept))
        decision = decide(task, (0, 2, 3, 5))
        students.append(how(task, tiny.prune(task, decision), decision, trainer).state_dict())
    assert all(torch.allclose(t, students[1][name], atol=1e-5) for name, t in students[0].items())
    joined = replace(task, train=replace(data, separate=False).train())
    with pytest.raises(tiny.UserError, match="holds predictions"):
        how = tiny.Recover(steps=3, kd=tiny.OutputKD(cache=cache))
        decision = decide(joined, (0, 2, 3, 5))
        how(joined, tiny.prune(joined, decision), decision, trainer)


def test_perplexity_is_that_of_the_documents(data: TextTokens, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "model", "llama"), data)
    (found,) = Perplexity(batch_size=2)(task, {"teacher": task.teacher}, tiny.Trainer(precision="fp32"))
    total, count = 0.0, 0
    rows = task.held_out
    read = rows.span(0, len(rows) * 12)
    for first in range(0, len(rows) * 12, 12):
        positions = rows.span(first, first + 12)["positions"]
        firsts = [*(positions == 0).nonzero().flatten().tolist(), 12]
        for a, b in pairwise(firsts):
            tokens = read["tokens"][first + a : first + b]
            with torch.no_grad():
                logits = task.teacher(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
            count += len(tokens) - 1
    assert f"{count:,} held-out tokens" in found.note
    assert found.values["teacher"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


STATE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4}, "rwkv": {"attention_hidden_size": 32}, "jamba": {}, "lfm2": {}, "qwen3_next": {},
    "bloom": {}, "opt": {}, "mpt": {},
}  # fmt: skip


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("family", STATE)
def test_networks_that_hand_on_a_state_are_refused(family: str, dtype: torch.dtype) -> None:
    model = (
        randomised(settings(family, **STATE[family]), CausalLM.autos, torch.Generator().manual_seed(0)).eval().to(dtype)
    )
    with pytest.raises(tiny.UserError, match=rf"separate: documents of a sample .* in a '{family}', which"):
        check_separate(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2", "deepseek_v3"])
def test_others_are_not(family: str, dtype: torch.dtype) -> None:
    check_separate(randomised(settings(family), CausalLM.autos, torch.Generator().manual_seed(0)).eval().to(dtype))


@pytest.mark.slow
def test_a_recipe_says_it_twice_and_is_told_when_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfusion_core.pipeline.run.check_teacher", lambda *_: None)  # a random model knows nothing
    recipe = recipe_of(folder(tmp_path / "model", "llama"), tmp_path)
    both = "--data.separate=true", "--backbone.separate=true"
    assert main(["validate", recipe, both[0]]) == 2
    assert "set backbone.separate, as in data" in capsys.readouterr().err
    assert main(["validate", recipe, both[1]]) == 2
    assert "'positions' of a sample is missing" in capsys.readouterr().err
    assert main(["validate", recipe, *both, "--data.pack=false"]) == 2
    assert "data.separate: without pack" in capsys.readouterr().err
    assert main(["run", recipe, *both, "--run-dir", str(tmp_path / "run")]) == 0
    state = recipe_of(folder(tmp_path / "state", "lfm2"), tmp_path)
    assert main(["run", state, *both, "--run-dir", str(tmp_path / "refused")]) == 2
    assert "backbone.separate: documents of a sample cannot be kept apart in a 'lfm2'" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    fresh = yaml.safe_load(Path(state).read_text())
    fresh["backbone"]["init_args"] = {"network": settings("lfm2"), "context": 12}
    (tmp_path / "fresh.yaml").write_text(yaml.safe_dump({**fresh, "train": {"steps": 2}}))
    assert main(["validate", str(tmp_path / "fresh.yaml"), *both]) == 2
    assert "cannot be kept apart" in capsys.readouterr().err
