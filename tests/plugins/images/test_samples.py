"""`tinyfusion sample --to`: the same set however often it is interrupted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forks import command, start
from tinyfusion_core.cli import main


def sample(finished: Path, to: Path, num: int, *flags: str) -> int:
    return main(["sample", str(finished), "--num", str(num), "--to", str(to), "--batch-size", "3", *flags])


def test_killed_and_gone_on_with_it_is_the_same_set(finished: Path, tmp_path: Path) -> None:
    num, archive = 300, tmp_path / "set.npz"
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
    assert sorted(path.name for path in to.iterdir()) == [*(f"{i:06d}.png" for i in range(12)), "samples.json"]
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
    assert "was not made by this command" in capsys.readouterr().err
    for name, content in (("theirs.npz.json", "[]"), ("theirs.npz.parts/film", "film")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        assert sample(finished, tmp_path / "theirs.npz", 3) == 2
        assert "was not made by this command" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
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
