"""What is not ours is left alone: a folder is taken if it is new, empty, or has our mark."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from interrupted import recovered
from places import ROOT, TESTS
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.locking import LOCK, check_held, owned
from tinyfusion_core.runtime.run_folder import COMPARISON, RUN, RunFolder, is_comparison, is_run
from toys import Match

BEFORE = TESTS / "before_rooms"
USERS = (
    "recipe.yaml",
    "report.html",
    "decision.json",
    "student/weights.pt",
    "run.json",
    "cells/data.json",
    "x/.a.b.partial",
)


def users_folder(path: Path) -> dict[str, str]:
    """Make a folder with files of a user's, some of which are called as ours are."""
    for name in USERS:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"of": 1} if name == "run.json" else [name]))
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", path / "recipe.yaml")
    return content(path)


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("command", ["run", "compare", "audit"])
def test_a_folder_of_the_users_is_left_as_it_is(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = users_folder(tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    assert main([command, "recipe.yaml", "--run-dir", "."]) == 2
    assert "choose " in capsys.readouterr().err
    assert content(tmp_path / "p") == before


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("kind", [RUN, COMPARISON])
def test_one_file_of_the_users_is_enough(kind, name: str, tmp_path: Path) -> None:
    users_folder(tmp_path / "whole")
    (tmp_path / "p" / name).parent.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / name, tmp_path / "p" / name)
    if name == "x/.a.b.partial":  # which only looks as if a kill had left it: it stays
        with owned(tmp_path / "p", kind):
            assert (tmp_path / "p" / name).exists()
        return
    with pytest.raises(Exception, match="neither empty nor"), owned(tmp_path / "p", kind):
        pass
    assert [path.name for path in (tmp_path / "p").rglob("*") if path.is_file()] == [Path(name).name]


def test_a_link_in_an_empty_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "student").symlink_to(tmp_path / "data")
    with pytest.raises(Exception, match="it holds student"), owned(tmp_path / "p", RUN):
        pass


@pytest.mark.parametrize("option", [["run", "--run-dir", ""], ["compare", "--run-dir", " "], ["show", ""]])
def test_an_empty_path_is_no_folder(option: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = option
    with pytest.raises(SystemExit) as stopped:
        main([command, *([] if command == "show" else [str(recipe)]), *rest])
    assert stopped.value.code == 2
    assert "the path is empty" in capsys.readouterr().err


def test_the_root_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, Path("/")) == 2
    assert "/: is neither empty nor a run of tinyfusion's" in capsys.readouterr().err


def test_only_what_a_run_writes_is_cleaned_up(tmp_path: Path, recipe: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    ours = [
        ".recipe.yaml.ab12.partial",
        "student/.model.safetensors.ab12.partial",
        "checkpoints/search/.1.pt.a.partial",
    ]
    theirs = [
        ".film.mp4.ab12.partial",
        "downloads/.recipe.yaml.ab12.partial",
        "other/student/.model.a.partial",
        ".partial",
    ]
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    saved_aside, of_theirs = (folder / parent / ".saving.ab12.partial" for parent in ("student", "downloads"))
    for place in (saved_aside, of_theirs):
        place.mkdir()
        (place / "model.safetensors").write_text("half")
    with owned(folder, RUN):
        assert not saved_aside.exists()
        assert (of_theirs / "model.safetensors").exists()
        assert not [name for name in ours if (folder / name).exists()]
        assert all((folder / name).exists() for name in theirs)


def test_the_folder_above_a_run_is_not_a_run(tmp_path: Path, recipe: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "a")
    half = tmp_path / "runs" / "a" / "checkpoints" / "search" / ".00000001.pt.a.partial"
    half.parent.mkdir(parents=True)
    half.write_text("being written")
    before = content(tmp_path / "runs")
    assert run(recipe, tmp_path / "runs") == 2
    assert content(tmp_path / "runs") == before


def test_what_was_made_before_has_its_mark() -> None:
    runs = {"recover_stopped", "search_stopped", "rounds_stopped"}
    comparisons = {"compare", "audit", "compare_stopped"}
    folders = {path.name: path for path in BEFORE.iterdir() if path.is_dir()}
    assert {name for name, path in folders.items() if is_run(path)} == runs
    assert {name for name, path in folders.items() if is_comparison(path)} == comparisons
    assert not is_run(BEFORE / "rounds_stopped" / "d2")  # a round is no run


def test_an_export_does_not_replace_what_is_none(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.yaml"
    for _ in range(2):  # the second finds what it would write
        assert main(["export", str(finished), "--to", "indices", "--out", str(out)]) == 0
    text = out.read_text()
    assert main(["export", str(finished), "--to", "mergekit", "--out", str(out)]) == 2  # it may be a user's own
    assert f"--out: {out} exists and was not made by this command; delete it" in capsys.readouterr().err
    mine = tmp_path / "recipe.yaml"
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", mine)
    before = mine.read_bytes()
    assert main(["export", str(finished), "--to", "indices", "--out", str(mine)]) == 2
    assert "exists and was not made by this command" in capsys.readouterr().err
    assert (mine.read_bytes(), out.read_text()) == (before, text)
    folder = tmp_path / "mine"
    before_folder = users_folder(folder)
    assert main(["export", str(finished), "--to", "diffusers", "--out", str(folder)]) == 2
    assert "neither empty nor an export of tinyfusion's" in capsys.readouterr().err
    assert content(folder) == before_folder


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "in the way"])
def test_a_folder_that_goes_during_the_run_is_noticed_at_the_next_write(how: str, tmp_path: Path) -> None:
    class Gone(Match):
        def prepare(self, batch, rng):
            if rng.stage == "recover" and rng.step == 7 and (folder / LOCK).exists():
                shutil.rmtree(folder) if how == "deleted" else folder.rename(tmp_path / "elsewhere")
                if how == "replaced":
                    folder.mkdir()
                    (folder / LOCK).touch()
                elif how == "in the way":
                    folder.write_text("a file")
            return super().prepare(batch, rng)

    folder = tmp_path / "run"
    steps: list[int] = []
    with owned(folder, RUN), pytest.raises(UserError, match="run: was deleted, moved or replaced while"):
        try:
            recovered(RunFolder(folder), loss=Gone())
        finally:
            steps = [entry["step"] for entry in RunFolder(tmp_path / "elsewhere").metrics()]
    assert steps == ([] if how == "deleted" else [3, 6])  # its log ends before the step
    left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    assert left == ([LOCK] if how == "replaced" else [])  # nothing was made in its place
    check_held()  # and no longer is it ours
