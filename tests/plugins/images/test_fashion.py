"""Fashion-MNIST from its original files, compressed or not, and what is said when they are not there or damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import tinyfusion_core as tiny
from tinyfusion_images import Digits, Fashion
from tinyfusion_images.fashion import read_idx
from tinyfusion_images.features import shipped


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    for part, num in (("train", 30), ("t10k", 12)):
        images = numbers.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        images[0, 0, :3] = [0, 255, 51]
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(num, dtype=np.uint8) % 10))
    return tmp_path


def test_reads_the_original_files(folder: Path) -> None:
    data = Fashion(folder=str(folder), num_held_out=5)
    train, held_out = data.train(), data.held_out()
    assert (len(train), len(held_out)) == (30, 5)
    batch = train.__getitems__([0, 11])
    assert batch["x"].shape == (2, 1, 28, 28)
    assert batch["x"][0, 0, 0, :3].tolist() == pytest.approx([-1, 1, -0.6])
    assert batch["y"].tolist() == [0, 1]
    assert data.pixels(batch["x"])[0, 0, 0, :3].tolist() == pytest.approx([0, 1, 0.2])


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=r"no train-images-idx3-ubyte or .*apt install dataset-fashion-mnist"):
        Fashion(folder=str(tmp_path)).train()


@pytest.mark.parametrize("damage", ["cut", "magic", "empty", "not gzip", "broken gzip"])
def test_a_damaged_file_is_named(folder: Path, damage: str) -> None:
    path = folder / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    broken = bytearray(gzip.compress(content))
    broken[12:20] = b"\xff" * 8
    damaged = {
        "cut": content[:-1],
        "magic": b"\1" + content[1:],
        "empty": b"",
        "not gzip": content,
        "broken gzip": bytes(broken),
    }[damage]
    if "gzip" in damage:
        path.unlink()
        path = path.with_name(path.name + ".gz")
    path.write_bytes(damaged)
    with pytest.raises(tiny.UserError, match="train-labels-idx1-ubyte"):
        Fashion(folder=str(folder)).train()


def test_images_of_another_size_are_refused(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((30, 32, 32), dtype=np.uint8)))
    with pytest.raises(tiny.UserError, match=r"expected \(n, 28, 28\)"):
        Fashion(folder=str(folder)).train()


def test_every_shape_is_read(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a").numpy(), array)


@pytest.mark.parametrize(("name", "side"), [("digits", 8), ("fashion", 28)])
def test_the_shipped_feature_spaces_fit_their_images(name: str, side: int) -> None:
    features, logits = shipped(name)(torch.zeros(3, 1, side, side))
    assert (features.shape, logits.shape) == ((3, 32), (3, 10))
    assert not features.requires_grad


def test_the_digits_features_know_the_digits() -> None:
    batch = Digits().held_out().__getitems__(list(range(297)))
    logits = Digits().feature_space()(batch["x"])[1]
    assert (logits.argmax(1) == batch["y"]).float().mean() > 0.98
