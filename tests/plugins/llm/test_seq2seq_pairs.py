"""Pairs of texts are what encoder and decoder read, and targets can be the teacher's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

import tinyfusion_core as tiny
from llm_toys import tokenizer
from seq2seq_toys import TOKENS, batch, folder, task_of
from tinyfusion_core.cli import main
from tinyfusion_llm import NextToken, TextPairs
from tinyfusion_llm.hidden import IGNORED

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tokenizer(tmp_path / "words")
    (path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, "bos_token_id": 1}))
    return path


def written(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in pairs))
    return str(path)


def lines(num: int) -> list[tuple[str, str]]:
    """Sources of 1 to 5 words, and their words backwards."""
    found = [[f"w{3 + (i + j) % 6}" for j in range(1 + i % 5)] for i in range(num)]
    return [(" ".join(some), " ".join(reversed(some))) for some in found]


def pairs(words: Path, *files: str, **more: Any) -> TextPairs:
    given = {"source_context": 6, "context": 7, "cache": str(words.parent / "cache"), **more}
    return TextPairs(tokenizer=str(words), files=list(files), **given)


def test_a_pair_is_what_both_parts_read(words: Path, tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [("w5 w6 w7", "w8 w9"), ("w5", "w10")])
    held_out = written(tmp_path / "held_out.jsonl", [("w11", "w12 w13 w14 w15 w16")])
    data = pairs(words, train, held_out_files=[held_out], prefix="w20 ")
    rows = data.train().__getitems__([0, 1])
    order = [0, 1] if rows["source"][0, 1] == 5 and rows["source"][0, 2] == 6 else [1, 0]
    assert {name: t[order].tolist() for name, t in rows.items()} == {
        "source": [[20, 5, 6, 7, 0, 0], [20, 5, 0, 0, 0, 0]],
        "source_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        "tokens": [[0, 8, 9, 2, 0, 0, 0], [0, 10, 2, 0, 0, 0, 0]],
        "labels": [[IGNORED, 8, 9, 2, *[IGNORED] * 3], [IGNORED, 10, 2, *[IGNORED] * 4]],
    }
    held = data.held_out()
    assert held.__getitems__([0])["labels"].tolist() == [[IGNORED, 12, 13, 14, 15, 16, 2]]
    assert held.extremes("source") == [(20, held.corpus.name)] and held.extremes("tokens")[0][0] == 16
    assert "held_out.jsonl" in held.where("source", 0) and held.where("source", 0).endswith("(pair 1)")


def test_longer_texts_are_refused_or_cut(words: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*lines(8), ("w5 " * 9, "w5"), ("w6", "w7 " * 9)])
    message = r"source_context: 1 of \d+ pairs to .* more than 6 tokens, up to 9, the first is pair 9 of .*a.jsonl"
    with pytest.raises(tiny.UserError, match=message):
        pairs(words, file, held_out_files=[file]).train()
    with pytest.raises(tiny.UserError, match="context: 1 of 10 pairs to train have more than 7 tokens, up to 11"):
        pairs(words, file, held_out_files=[file], source_context=9).train()
    rows = pairs(words, file, held_out_files=[file], cut=True).held_out()
    found = rows.__getitems__([8, 9])
    assert found["source"][0].tolist() == [5] * 6 and found["source_mask"][0].sum() == 6
    assert found["tokens"][1].tolist() == [0, *[7] * 6] and found["labels"][1].tolist() == [IGNORED, *[7] * 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "w5"}, r"row 2 has no 'target' \(found: source\); set source_field and text_field"),
        ({"source": " ", "target": "w5"}, "row 2: 'source' is empty, so nothing would be learned; leave the row out"),
        ({"source": "w5", "target": ""}, "row 2: 'target' is empty"),
        ({"source": "w5", "target": "\ud800"}, "row 2: 'target' holds half of a character"),
    ],
)
def test_rows_without_both_are_named(row: dict[str, str], message: str, words: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"source": "w5", "target": "w6"}) + "\n" + json.dumps(row))
    with pytest.raises(tiny.UserError, match=message):
        pairs(words, str(tmp_path / "a.jsonl")).train()


def test_what_is_no_pair_or_has_no_start_is_refused(words: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5 w6")
    with pytest.raises(tiny.UserError, match=r"a.txt: a text is no pair; give .jsonl or .parquet files"):
        pairs(words, str(tmp_path / "a.txt")).train()
    file = written(tmp_path / "a.jsonl", lines(4))
    (words / "generation_config.json").unlink()
    with pytest.raises(tiny.UserError, match="tokenizer: no file in .* says what a decoder begins with"):
        pairs(words, file).train()
    with pytest.raises(tiny.UserError, match="source_context is 1; expected at least 2 tokens"):
        pairs(words, file, source_context=1)


def recipe(work: Path, words: Path, family: str = "t5", **more: Any) -> str:
    data = {
        "tokenizer": str(words), "files": [written(work / "a.jsonl", lines(40))], "source_context": 6, "context": 7,
        "cache": str(work / "cache"),
    }  # fmt: skip
    backbone = {"model": str(folder(work / family, family)), "source_context": 6, "context": 7}
    content = {
        "backbone": {"class_path": "EncoderDecoder", "init_args": backbone},
        "loss": "NextToken",
        "data": {"class_path": "TextPairs", "init_args": data},
        "trainer": {"precision": "fp32", "batch_size": 4, "seed": 0},
        "search": {"class_path": "Search", "init_args": {"keep": {"encoder.block": 3, "decoder.block": 2}, "steps": 3}},
        "recover": {"steps": 3, "kd": {"class_path": "OutputKD", "init_args": {"alpha_kd": 0.5, "alpha_gt": 0.5}}},
        "evaluate": [
            {"class_path": "HeldOutLoss", "init_args": {"draws": 1}},
            {"class_path": "Latency", "init_args": {"rounds": 1}},
        ],
        **more,
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(work / "recipe.yaml")


@pytest.mark.slow
def test_a_recipe_from_pairs_to_a_student(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = recipe(tmp_path, words), tmp_path / "out"
    assert main(["validate", path]) == 0
    said = capsys.readouterr().out
    assert "limits\tprotect [0, 4], or nothing could save it" in said and "cannot be counted" not in said
    assert main(["run", path, "--run-dir", str(out)]) == 2
    assert "error: the teacher's loss on " in capsys.readouterr().err  # it knows nothing yet
    task = tiny.load_recipe(path).backbone
    teacher: Any = task.build().train()
    rows = tiny.load_recipe(path).data.train()
    batch = rows.__getitems__(list(range(len(rows))))
    given = {
        "input_ids": batch["source"],
        "attention_mask": batch["source_mask"],
        "labels": batch["labels"][:, 1:].contiguous(),
    }
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(60):
        loss = teacher(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 3
    teacher.save_pretrained(tmp_path / "t5")

    assert main(["run", path, "--run-dir", str(out)]) == 0
    student: Any = tiny.load_pretrained(out / "student")
    assert (student.config.num_layers, student.config.num_decoder_layers) == (3, 2)
    words_of = ["export", str(out), "--to", "transformers", "--out", str(tmp_path / "exported")]
    assert main(words_of) == 0
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(again(**given).logits, student(**given).logits)

    made = tmp_path / "made"
    assert main(["generate-data", path, "--out", str(made), "--samples", "12"]) == 0
    found = tiny.Generated(folder=str(made), num_held_out=0).train().__getitems__([0, 1])
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in batch.items()}
    assert torch.equal(found["source"], batch["source"][:2])


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("data", {"source_context": 5}, r"'source' of a sample is \[5\], the network of .* takes \[6\]"),
        ("backbone", {"units": ["attention"]}, "units: no branches of its blocks are known; leave units out"),
        ("backbone", {"source_context": 0}, "backbone.source_context is 0; expected at least 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_validate(
    section: str, content: dict[str, Any], message: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(Path(recipe(tmp_path, words)).read_text())
    settings[section]["init_args"] |= content
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_the_teacher_writes_targets(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, family), family == "whisper")
    task.teacher.generation_config.eos_token_id = 2
    asked = batch(4, family == "whisper")
    asked["tokens"][:, 0] = 0 if family == "t5" else 2  # the start
    asked["labels"][1, :3] = IGNORED  # a longer prompt
    rng = tiny.Rng(0, "generated data", rows=range(4))
    found = NextToken(top_p=1e-9).generated(task.teacher, asked, "tokens", rng)
    own = NextToken(top_p=1e-9).own_samples(task.teacher, asked, "tokens", rng)
    assert all(torch.equal(own[name], t) for name, t in found.items())  # the beginning counts in neither
    inputs = task.loss.prepare(found, tiny.Rng(0, "test"))
    with torch.no_grad():
        prediction = task.loss.predict(task.teacher, inputs)
        best = prediction.head(prediction.states).argmax(-1)
    assert found.keys() == asked.keys()
    for row in range(4):
        kept = 3 if row == 1 else 1
        assert torch.equal(found["tokens"][row, :kept], asked["tokens"][row, :kept])
        ends = (found["tokens"][row, kept:] == 2).nonzero()
        last = kept + int(ends[0]) + 1 if len(ends) else TOKENS
        assert torch.equal(found["tokens"][row, kept:last], best[row, kept - 1 : last - 1])
        assert found["labels"][row].tolist() == [
            *[IGNORED] * kept, *found["tokens"][row, kept:last].tolist(), *[IGNORED] * (TOKENS - last),
        ]  # fmt: skip
        alone = NextToken(top_p=1e-9).generated(
            task.teacher, {n: t[row : row + 1] for n, t in asked.items()}, "tokens", rng
        )
        assert all(torch.equal(alone[name], t[row : row + 1]) for name, t in found.items())
