"""Latents as MAR's own code caches them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tinyfusion_core as tiny
from tinyfusion_dit import Latents
from tinyfusion_mar import CachedMoments

CLASSES = {"n02": 3, "n01": 2, "n10": 4}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Means of the first element tell the image and its copy: 10 * class + image, and 100 more of the mirror image."""
    for c, (name, count) in enumerate(sorted(CLASSES.items())):
        (tmp_path / name).mkdir()
        for i in range(count):
            moments = np.full((4, 2, 3), 10.0 * c + i, dtype=np.float32)
            moments[2:] = 2 * np.log(0.5)  # a deviation of a half
            mirrored = moments + np.array([100, 100, 0, 0], dtype=np.float32)[:, None, None]
            np.savez(tmp_path / name / f"{i}.JPEG.npz", moments=moments, moments_flip=mirrored)
    return tmp_path


def test_means_and_deviations_are_scaled_and_labels_are_the_classes_in_order(cache: Path) -> None:
    data = CachedMoments(folder=str(cache), scale=0.2, num_held_out=2)
    both = []
    for samples in (data.train(), data.held_out()):
        rows = samples.__getitems__(list(range(len(samples))))
        assert rows["x"].shape == rows["x_std"].shape == (len(samples), 2, 2, 3)
        assert torch.allclose(rows["x_std"], torch.tensor(0.5 * 0.2))
        told = (rows["x"][:, 0, 0, 0] / 0.2).round().long()
        assert torch.equal(told % 100 // 10, rows["y"])
        both.append(set(told.tolist()))
    train, held = both
    assert not train & held
    images = [10 * c + i for c, (_, count) in enumerate(sorted(CLASSES.items())) for i in range(count)]
    assert train | held == {image + flipped for image in images for flipped in (0, 100)}
    assert {t % 100 for t in held} & {t % 100 for t in train} == set()  # no copy of a held-out image is trained on


def test_a_log_variance_is_clipped_as_the_posterior_does(cache: Path) -> None:
    path = cache / "n01" / "0.JPEG.npz"
    wild = np.zeros((4, 2, 3), dtype=np.float32)
    wild[2:] = 1000.0
    np.savez(path, moments=wild, moments_flip=wild)
    data = CachedMoments(folder=str(cache), num_held_out=1)
    rows = data.train().__getitems__(list(range(len(data.train()))))
    assert rows["x_std"].max() <= 0.2325 * np.exp(10.0) * 1.001


def test_what_is_no_cache_is_told(cache: Path) -> None:
    with pytest.raises(tiny.UserError, match=r"lacks metadata\.json, but holds \.npz .*: .*CachedMoments"):
        Latents(folder=str(cache)).train()
    with pytest.raises(tiny.UserError, match=r"^kind is 'sample'"):
        CachedMoments(folder=str(cache), kind="sample")
    with pytest.raises(tiny.UserError, match=r"nowhere: not a readable folder"):
        CachedMoments(folder=str(cache / "nowhere")).train()
    (cache / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(tiny.UserError, match=r"empty: holds no \.npz files in folders of classes"):
        CachedMoments(folder=str(cache / "empty")).train()
    np.savez(cache / "n01" / "0.JPEG.npz", other=np.zeros(3))
    with pytest.raises(tiny.UserError, match=r"0\.JPEG\.npz: holds no array 'moments"):
        CachedMoments(folder=str(cache), num_held_out=1).train()
    (cache / "n01" / "0.JPEG.npz").write_bytes(b"PK nothing")
    with pytest.raises(tiny.UserError, match=r"0\.JPEG\.npz"):
        CachedMoments(folder=str(cache), num_held_out=1).train()
