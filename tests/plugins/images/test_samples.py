"""`tinyfusion sample --to`: the same set however often it is interrupted."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forks import command, start
from tinyfusion_core.cli import main
from tinyfusion_core.evaluation.generation import sample_rows


def sample(finished: Path, to: Path, num: int, *flags: str) -> int:
    return main(["sample", str(finished), "--num", str(num), "--to", str(to), "--batch-size", "3", *flags])


@pytest.mark.slow
def test_killed_and_gone_on_with_it_is_the_same_set(finished: Path, tmp_path: Path) -> None:
    num, archive = 90, tmp_path / "set.npz"
    words = ["sample", str(finished), "--num", str(num), "--to", str(archive), "--batch-size", "3"]
    (process,) = start(command(*words), finished.parent / "sample.txt")
    deadline = time.monotonic() + 120
    parts = tmp_path / "set.npz.parts"
    while len(list(parts.glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    (tmp_path / ".set.npz.x.partial").write_bytes(b"a kill in the middle of a write")
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert 3 <= len(before) < num / 3
    assert not archive.exists()
    assert main(words) == 0
    assert sample(finished, tmp_path / "pictures", num) == 0
    with np.load(archive, allow_pickle=False) as content:
        assert content["arr_1"].tolist() == [i % 10 for i in range(num)]
        for i, image in enumerate(content["arr_0"]):
            assert np.array_equal(image[..., 0], np.asarray(Image.open(tmp_path / "pictures" / f"{i:06d}.png")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "set.npz", "set.npz.json"]


def test_a_folder_is_completed_and_grows(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "pictures"
    assert sample(finished, to, 9) == 0
    first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in to.glob("*.png")}
    assert sorted(first) == [f"{i:06d}.png" for i in range(9)]
    (to / "000004.png").unlink()
    (to / ".000004.png.x.partial").write_bytes(b"a kill in the middle of a write")
    assert sample(finished, to, 12) == 0
    for name, (content, when) in first.items():
        assert (to / name).read_bytes() == content
        assert name in ("000003.png", "000004.png", "000005.png") or (to / name).stat().st_mtime_ns == when
    assert sorted(path.name for path in to.iterdir()) == [".lock", *(f"{i:06d}.png" for i in range(12)), "samples.json"]
    record = json.loads((to / "samples.json").read_text())
    assert record["labels"] == [*range(10), 0, 1]
    assert record["num"] == 12
    assert record["made_with"]["seed"] == 0
    capsys.readouterr()
    assert sample(finished, to, 12, "--seed", "1") == 2
    assert "has samples made with another seed" in capsys.readouterr().err
    assert sample(finished, to, 11) == 2
    assert "--num: 11, but" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").touch()
    assert sample(finished, tmp_path / "mine", 3) == 2
    assert "mine: is neither empty nor samples of tinyfusion's" in capsys.readouterr().err
    not_made, not_empty = "was not made by this command; delete it", "is neither empty nor samples"
    for name, content, said in (
        ("theirs.npz", "numbers", not_made),
        ("theirs.npz.json", "[]", not_made),
        ("theirs.npz.parts/film", "film", not_empty),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        assert sample(finished, tmp_path / "theirs.npz", 3) == 2
        assert said in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
        assert not [path for path in tmp_path.glob("theirs.npz*") if path.is_file()]
    assert sample(finished, to, 0) == 2
    assert "--num is 0" in capsys.readouterr().err


def test_an_archive_that_is_there_is_left_alone(finished: Path, tmp_path: Path) -> None:
    to = tmp_path / "set.npz"
    assert sample(finished, to, 4) == 0
    before = (to.stat().st_mtime_ns, to.read_bytes())
    assert sample(finished, to, 4) == 0
    assert (to.stat().st_mtime_ns, to.read_bytes()) == before
    assert sample(finished, to, 5) == 0
    with np.load(to) as content:
        assert content["arr_0"].shape == (5, 8, 8, 3)
    assert sample(finished, to, 3) == 2
    assert json.loads((tmp_path / "set.npz.json").read_text())["num"] == 5


def test_caches_make_other_samples_and_are_on_record(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, threshold in (("plain", None), ("zero", "0"), ("cached", "0.9"), ("again", "0.9")):
        assert sample(finished, tmp_path / name, 7, *([] if threshold is None else ["--cache", threshold])) == 0
    made = {path.name: [(path / f"{i:06d}.png").read_bytes() for i in range(7)] for path in tmp_path.iterdir()}
    assert made["plain"] == made["zero"] != made["cached"] == made["again"]
    assert "cache" not in json.loads((tmp_path / "zero" / "samples.json").read_text())["made_with"]
    assert json.loads((tmp_path / "cached" / "samples.json").read_text())["made_with"]["cache"] == 0.9
    capsys.readouterr()
    assert sample(finished, tmp_path / "plain", 9, "--cache", "0.9") == 2
    assert "has samples made with another cache" in capsys.readouterr().err
    for threshold in ("-0.1", "nan", "inf"):
        assert sample(finished, tmp_path / "bad", 3, "--cache", threshold) == 2
        assert f"--cache is {threshold}; expected a threshold, 0 or more" in capsys.readouterr().err
    out = tmp_path / "grid.png"
    assert main(["sample", str(finished), "--num", "2", "--out", str(out), "--cache", "0.9"]) == 0
    first = out.read_bytes()
    assert main(["sample", str(finished), "--num", "2", "--out", str(out)]) == 0
    assert out.read_bytes() != first


def test_a_grid_replaces_a_grid_and_no_picture_of_the_users(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "x.png", ["sample", str(finished), "--num", "2", "--out"]
    assert main([*words, str(out)]) == 0
    first = out.read_bytes()
    assert main([*words, str(out), "--seed", "1"]) == 0
    assert out.read_bytes() != first
    capsys.readouterr()
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    (tmp_path / "broken.png").write_text("no picture")
    for name in ("holiday.png", "broken.png"):
        before = (tmp_path / name).read_bytes()
        assert main([*words, str(tmp_path / name)]) == 2
        assert f"--out: {tmp_path / name} exists and was not made by this command" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before


def test_samples_whose_folder_goes_while_they_are_made(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*given: Any) -> Any:
        shutil.rmtree(tmp_path / "gone")
        return sample_rows(*given)

    monkeypatch.setattr("tinyfusion_images.pictures.sample_rows", made)
    assert sample(finished, tmp_path / "gone", 3) == 2
    assert "gone: was deleted, moved or replaced while this command was at work" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()
