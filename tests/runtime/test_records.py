"""Files of JSON and logs that hold something else than what was written: one message each."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from places import TESTS
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.shards import read_bytes
from tinyfusion_core.errors import UserError
from tinyfusion_core.parsing.records import check_folder, parse_json, read_as, read_text
from tinyfusion_core.parsing.yaml12 import load_yaml
from tinyfusion_core.registry.registry import load_plugin
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_diffusers.arrays import columns_in
from tinyfusion_dit import Latents
from tinyfusion_images.fashion import read_idx
from tinyfusion_images.image_sets import open_picture

BEFORE = TESTS / "before_rooms"


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


class Outer(TypedDict):
    version: Literal[1]
    loss: float | None
    inner: list[Inner]
    more: NotRequired[dict[str, float]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "'version' is 2; expected 1; mend it"),
        ({"version": True}, "'version' is True; expected 1"),
        ({"loss": "x"}, "'loss' is 'x'; expected a finite number or null"),
        ({"loss": float("nan")}, "'loss' is nan; expected a finite number or null"),
        ({"inner": {}}, "'inner' is {}; expected a list"),
        ({"inner": [{"name": "a", "sizes": [1, True]}]}, r"'inner\[0\].sizes\[1\]' is True; expected an integer"),
        ({"inner": [{}]}, r"'inner\[0\].name' is missing; expected a text"),
        ({"more": {"a": []}}, r"'more.a' is \[\]; expected a finite number"),
    ],
)
def test_a_part_of_another_type_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sound = {"version": 1, "loss": None, "inner": [{"name": "a", "sizes": [1], "new": 3}]}
    path = tmp_path / "it.json"
    path.write_text(json.dumps(sound))
    assert read_as(path, Outer, "mend it")["inner"] == [Inner("a", (1,))]
    path.write_text(json.dumps(sound | change))
    with pytest.raises(UserError, match=rf"it\.json: {message}"):
        read_as(path, Outer, "mend it")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a FIFO; expected a file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a folder; expected a file"):
        read_text(tmp_path)
    (tmp_path / "text").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="text: not text in UTF-8 .* at byte 2"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 150 + "]" * 150, '{"a": "\\ud800"}', "[1, 2"])
def test_json_that_nothing_could_use(text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply|half of a character|delimiter"):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "[" * 150 + "]" * 150, '"a\\0b"', '"\\ud800"', "a: &a [x, *a]", "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
     + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))],
)  # fmt: skip
def test_yaml_that_nothing_could_use(text: str) -> None:
    with pytest.raises(Exception, match="nested too deeply|zero byte|too large"):
        load_yaml(text)


@pytest.mark.parametrize("outside", ["../elsewhere/model.safetensors", "/elsewhere/model.safetensors", ""])
def test_an_index_names_files_of_its_folder(tmp_path: Path, outside: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": outside}}))
    with pytest.raises(UserError, match=r"index\.json: names .*; expected a file in its folder"):
        check_folder(tmp_path)


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"[1, 2]", b'{"stage": 3, "step": 1}', b"{" * 5000, b'{"stage": "rec'])
def test_a_damaged_line_of_a_log_is_said_and_stops_nothing(tmp_path: Path, bad: bytes) -> None:
    folder = Path(shutil.copytree(BEFORE / "recover_stopped", tmp_path / "run"))
    log = folder / "metrics.jsonl"
    first, *others = log.read_bytes().splitlines()
    sound = len(RunFolder(folder).metrics())
    log.write_bytes(b"\n".join([first, bad, *others, b'{"stage": "rec']))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: left out what is no line of a log: 2"):
        assert len(RunFolder(folder).metrics()) == sound
    with pytest.warns(UserWarning, match="left out"):
        RunFolder(folder).rewind("recover", 6)
    assert len(log.read_bytes().splitlines()) == sound  # the next look finds nothing to say


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", {"format_version": 1, "settings": []}, r"run\.json: 'settings' is \[\]; expected a mapping"),
        ("stages.json", {"search": "x"}, r"stages\.json: 'search' is 'x'; expected a mapping"),
        ("decision.json", {"format_version": 1, "blocks": 3}, r"decision\.json: 'blocks' is 3; expected a list"),
        ("checkpoints/recover/manifest.json", {"checkpoints": "\0"}, r"manifest\.json: damaged; delete .*recover"),
    ],
)
def test_a_run_folder_with_json_of_another_shape(
    tmp_path: Path, name: str, content: Any, message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE / "teacher", "teacher")
    folder = Path(shutil.copytree(BEFORE / "recover_stopped", tmp_path / "run"))
    (folder / name).write_text(json.dumps(content))
    assert main(["run", str(folder / "recipe.yaml"), "--run-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err


def test_names_that_no_file_can_have(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["show", "n" * 300])
    assert stopped.value.code == 2
    assert "is too long for the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metadata.json", lambda path: Latents(folder=str(path.parent)).train()),
        ("metadata.json", lambda path: read_bytes(path.parent.as_uri(), path.name)),
        ("train-images-idx3-ubyte", read_idx),
        ("picture.png", open_picture),
        ("mine.py", load_plugin),
        ("x.safetensors", columns_in),
    ],
)
def test_no_reader_waits_for_a_pipe(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a FIFO|is no file"):
        read(tmp_path / name)
