"""Text that is not what it should be ends in one message, before anything is trained on it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from llm_toys import folder, tokenizer
from tinyfusion_core.cli import main
from tinyfusion_llm import TextTokens
from tinyfusion_llm.documents import json_lines, lines

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(folder(tmp_path_factory.mktemp("model") / "model", "llama"))


def reading(model: Path, path: Path) -> TextTokens:
    good = path.parent / "good.txt"
    good.write_text("w5 w6 w7 " * 20)
    return TextTokens(tokenizer=str(model), files=[str(good), str(path)], context=4, cache=str(path.parent / "cache"))


SEVERAL = "w5 w6 w7\n" * 20 + "w8 \u00fc w9\n"
ROW = json.dumps({"text": "w5 w6 \u00fc"}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", SEVERAL.encode("utf-16"), r"a.txt: not text in UTF-8: byte 0 is 0xff. Convert .* -f UTF-16"),
        ("a.txt", SEVERAL.encode("utf-16-le"), r"a.txt: not text in UTF-8: byte 1 is 0x00. Convert .* -f UTF-16"),
        (
            "a.md",
            SEVERAL.encode("latin-1"),
            r"a.md: not text in UTF-8: byte 183 is 0xfc. Convert .* -f LATIN1 -t UTF-8",
        ),
        ("a.txt", b"w5 w6\nw7 \x89PNG", r"a.txt: not text in UTF-8: byte 9 is 0x89"),
        ("a.txt", b"w5 w6\nw7 \x00 w8", r"a.txt: not text in UTF-8: byte 9 is 0x00"),
        ("a.txt", "w5 \u00fc".encode()[:-1], r"a.txt: not text in UTF-8: byte 3 is 0xc3"),
        ("a.jsonl", ROW.encode() + ROW.encode("latin-1"), r"a.jsonl: not text in UTF-8: byte 37 is 0xfc"),
        ("a.jsonl", ROW.encode("utf-16"), r"a.jsonl: not text in UTF-8: byte 0 is 0xff"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl: line 1 is no JSON"),
        (
            "a.jsonl",
            b'{"text": "w5 \\ud800 w6"}',
            r"a.jsonl: row 1: 'text' holds half of a character, .* at character 3",
        ),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: damaged, cut short or not a Parquet file"),
        ("a.parquet", b"", r"a.parquet: damaged, cut short or not a Parquet file"),
    ],
)
def test_what_is_not_text(model: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(tiny.UserError, match=message):
        reading(model, tmp_path / name).train()
    assert not list((tmp_path / "cache").iterdir())


def test_a_parquet_file_that_is_cut_or_changed(model: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"w{i % 40} w5 w6" for i in range(4000)]}), path, compression="snappy")
    assert len(reading(model, path).train())
    whole = path.read_bytes()
    for content in (whole[:-40], whole[: len(whole) // 2], whole[:100] + bytes(400) + whole[500:]):
        path.write_bytes(content)
        with pytest.raises(tiny.UserError, match=r"a.parquet: damaged, cut short or not a Parquet file"):
            reading(model, path).train()


def test_good_text_is_read_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\u2028\ufeff \u00fc \ufffd\n\n".encode())
    assert "".join(lines(path)) == path.read_text(encoding="utf-8-sig")
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n{"a": 2}\r{"a": "\\ud83d\\ude00"}')
    assert list(json_lines(path)) == [(1, {"a": "\u2028"}), (2, {"a": 2}), (3, {"a": "\U0001f600"})]
    path.write_text('\n{"a": 1}\n \t\n\n{"a": 2}\n\n')
    assert list(json_lines(path)) == [(2, {"a": 1}), (5, {"a": 2})]  # as lines of the file


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_documents_are_left_out_and_counted(model: Path, tmp_path: Path, name: str) -> None:
    rows = [{"text": "w8 w9 " * 4}, {"text": ""}, {"text": " "}]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if name == "a.jsonl" else "\n \n")
    data = reading(model, tmp_path / name)
    if name == "a.txt":
        data = replace(data, files=[*data.files, data.files[0]])
    with pytest.warns(UserWarning, match=rf"data: {2 if name == 'a.jsonl' else 1} documents are empty and left out"):
        data.train()
    assert len(data._corpus(data.files).bounds) == 3  # two documents


def test_tokens_beyond_the_vocabulary_are_found_when_the_plan_is_made(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("w5 w25 w7 " * 20)
    data = reading(model, tmp_path / "a.txt")
    settings = {"tokenizer": data.tokenizer, "files": data.files, "context": 4, "cache": data.cache}
    small = folder(tmp_path / "small", "llama", vocab_size=20)
    recipe = {
        "backbone": {"class_path": "CausalLM", "init_args": {"model": str(small), "context": 4}},
        "loss": "NextToken",
        "data": {"class_path": "TextTokens", "init_args": settings},
        "search": {"class_path": "Search", "init_args": {"keep": 2, "steps": 2}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 2
    out = "".join(capsys.readouterr())
    assert re.search(
        r"data: 'tokens' is \d\d in .*a.txt with the data.tokenizer .*model; the network has 20 tokens", out
    )
    assert "0 to 19: take the model's own tokenizer" in out
