"""Data sets that are streamed: the rows that are asked for are read once, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyfusion_core as tiny
from llm_toys import folder as saved
from llm_toys import tokenizer, words
from tinyfusion_llm import TextTokens

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, of datasets and dill under a new numpy
ROWS = 40


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The rows that streams of the library have given away, in order."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    seen: list[int] = []
    iterate = datasets.IterableDataset.__iter__

    def counting(self: Any) -> Any:
        for row in iterate(self):
            seen.append(row["number"])
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", counting)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tokenizer(saved(tmp_path / "model", "llama"))


def rows() -> list[dict[str, Any]]:
    return [{"number": i, "text": words(i, 20)} for i in range(ROWS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows())))
    return path


def source(model: Path, folder: Path, tmp_path: Path, **options: Any) -> TextTokens:
    return TextTokens(tokenizer=str(model), dataset=str(folder), cache=str(tmp_path / "cache"), context=7, **options)


def test_so_many_rows_are_streamed_once(model: Path, folder: Path, tmp_path: Path, pulled: list[int]) -> None:
    data = source(model, folder, tmp_path, rows=10)
    assert len(data.train()) == 9 * 21 // 7
    assert pulled == list(range(10))
    again = source(model, folder, tmp_path, rows=10)  # as after a stop: the tokens are there
    indices = list(range(len(data.train())))
    assert torch.equal(*(part.train().__getitems__(indices)["tokens"] for part in (data, again)))
    assert pulled == list(range(10))
    # Streamed or stored, all rows are the same samples.
    whole, stored = source(model, folder, tmp_path, rows=ROWS), source(model, folder, tmp_path)
    assert torch.equal(*(part.held_out().__getitems__([0, 1])["tokens"] for part in (whole, stored)))
    assert len(pulled) == 10 + ROWS
    assert not list((tmp_path / "cache").glob(".making*"))


def test_parquet_files_are_streamed_alike(model: Path, folder: Path, tmp_path: Path, pulled: list[int]) -> None:
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    (tmp_path / "columns").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows()), tmp_path / "columns" / "train.parquet", row_group_size=8)
    both = [source(model, path, tmp_path, rows=10).train() for path in (folder, tmp_path / "columns")]
    assert torch.equal(*(part.__getitems__([0, 5, 9])["tokens"] for part in both))
    assert pulled == 2 * list(range(10))


def test_what_is_wrong_with_a_stream_is_one_sentence(
    model: Path, folder: Path, tmp_path: Path, pulled: list[int]
) -> None:
    for options, message in [
        ({"rows": 41}, "^rows is 41: the train split of .*texts has 40; give fewer$"),
        ({"rows": 4, "text_field": "body"}, "row 1 has no 'body' .found: number, text.; set text_field"),
        ({"rows": 4, "split": "test"}, "^dataset .*texts: cannot be read .*split"),
    ]:
        with pytest.raises(tiny.UserError, match=message):
            source(model, folder, tmp_path, **options).train()
    with pytest.raises(tiny.UserError, match="^dataset .*nowhere: cannot be read"):
        source(model, folder / "nowhere", tmp_path, rows=4).train()
    (folder / "train.jsonl").write_text('{"number": 0, "text": "w4"}\n{"number": 1, "text"')
    with pytest.raises(tiny.UserError, match="^dataset .*texts: cannot be read"):
        source(model, folder, tmp_path, rows=4).train()
