"""Pre-encoded latents: both layouts, the split, and files that are not what they should be."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyfusion_core.errors import UserError
from tinyfusion_dit.latents import LatentFolders, Latents
from tinyfusion_dit.stores import LatentSamples

NUM_IMAGES, HELD_OUT = 12, 3
METADATA = {"format_version": 1, "vae": "sd-vae-ft-ema", "scale": 0.18215, "kind": "sample"}


def images(num_channels: int = 4) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features in which entry (i, 0, 0, 0) is i, and their mirror images, all different."""
    features = np.random.default_rng(0).standard_normal((NUM_IMAGES, num_channels, 2, 3)).astype(np.float32)
    features[:, 0, 0, 0] = np.arange(NUM_IMAGES)
    flipped = features[..., ::-1] + 100
    return features, flipped


def write_arrays(folder: Path, flipped: bool = True, num_channels: int = 4, **metadata: Any) -> str:
    folder.mkdir()
    arrays = images(num_channels)
    np.save(folder / "features.npy", arrays[0])
    if flipped:
        np.save(folder / "flipped.npy", arrays[1])
    np.save(folder / "labels.npy", np.arange(NUM_IMAGES) * 10)
    (folder / "metadata.json").write_text(json.dumps(METADATA | metadata))
    return str(folder)


def write_files(folder: Path, flipped: bool = True) -> dict[str, str]:
    """The layout of the reference. Names sort as text, not as numbers: 10 comes before 9."""
    arrays = images()
    for name in ("features", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(NUM_IMAGES):
        latent = np.stack([arrays[0][i], arrays[1][i]]) if flipped else arrays[0][i]
        np.save(folder / "features" / f"{i}.npy", latent)
        np.save(folder / "labels" / f"{i}.npy", np.array([i * 10]))
    return {"features": str(folder / "features"), "labels": str(folder / "labels")}


def everything(samples: LatentSamples) -> dict[str, torch.Tensor]:
    return samples.__getitems__(list(range(len(samples))))


def source(layout: str, tmp_path: Path, flipped: bool = True) -> Latents | LatentFolders:
    if layout == "arrays":
        return Latents(folder=write_arrays(tmp_path / "data", flipped), num_held_out=HELD_OUT)
    return LatentFolders(**write_files(tmp_path / "data", flipped), num_held_out=HELD_OUT)


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("layout", ["arrays", "files"])
def test_every_image_is_on_one_side_with_all_its_copies(layout: str, flipped: bool, tmp_path: Path) -> None:
    data, features = source(layout, tmp_path, flipped), images()
    found: dict[str, set[int]] = {}
    for side, count in (("train", NUM_IMAGES - HELD_OUT), ("held_out", HELD_OUT)):
        samples = getattr(data, side)()
        assert len(samples) == count * (2 if flipped else 1)
        rows = everything(samples)
        assert rows["x"].dtype == torch.float32
        assert rows["y"].dtype == torch.int64
        labels = (rows["y"] // 10).tolist()
        found[side] = set(labels[:count])
        assert len(found[side]) == count
        assert labels == labels[:count] * (2 if flipped else 1)
        for row, image in enumerate(labels):
            assert torch.equal(rows["x"][row], torch.from_numpy(features[row // count][image].copy()))
    assert not found["train"] & found["held_out"]
    assert found["train"] | found["held_out"] == set(range(NUM_IMAGES))


@pytest.mark.parametrize("layout", ["arrays", "files"])
def test_any_order_of_indices(layout: str, tmp_path: Path) -> None:
    samples = source(layout, tmp_path).train()
    whole, indices = everything(samples), [17, 0, 5, 5, 9]
    for name, value in samples.__getitems__(indices).items():
        assert torch.equal(value, whole[name][indices])
    for index in (-1, len(samples)):
        with pytest.raises(IndexError, match="there are 18"):
            samples.__getitems__([0, index])


def test_the_files_are_read_in_lexicographic_order(tmp_path: Path) -> None:
    labels = everything(source("files", tmp_path).train())["y"][: NUM_IMAGES - HELD_OUT] // 10
    names = [str(i) for i in labels.tolist()]
    assert names == sorted(names)
    assert names != sorted(names, key=int)


def test_the_split_is_spread_and_always_the_same(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data")
    held = [everything(Latents(folder=folder, num_held_out=n).held_out())["y"].unique().tolist() for n in (3, 3, 4)]
    assert held[0] == held[1]
    assert set(held[0]) < set(held[2])
    assert held[0] not in ([0, 10, 20], [90, 100, 110])


def test_moments(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data", num_channels=8, kind="moments")
    rows = everything(Latents(folder=folder, num_held_out=HELD_OUT).train())
    assert set(rows) == {"x", "x_std", "y"}
    image = int(rows["y"][0]) // 10
    whole = torch.from_numpy(images(8)[0][image])
    assert torch.equal(torch.cat([rows["x"][0], rows["x_std"][0]]), whole)


def test_folders_take_the_word_of_the_recipe_or_the_metadata(tmp_path: Path) -> None:
    folders = write_files(tmp_path / "data")
    rows = everything(LatentFolders(**folders, kind="moments", scale=1.0, num_held_out=HELD_OUT).train())
    assert rows["x"].shape[1] == rows["x_std"].shape[1] == 2
    (tmp_path / "data" / "features" / "metadata.json").write_text(json.dumps(METADATA))
    assert set(everything(LatentFolders(**folders, num_held_out=HELD_OUT).train())) == {"x", "y"}
    with pytest.raises(UserError, match=r"^scale is 1\.0 in the recipe, but .* made with 0\.18215"):
        LatentFolders(**folders, scale=1.0, num_held_out=HELD_OUT).train()


@pytest.mark.parametrize("field", ["vae", "scale", "kind"])
def test_what_the_recipe_says_must_agree_with_the_metadata(field: str, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data")
    Latents(folder=folder, num_held_out=HELD_OUT, **{field: METADATA[field]}).train()
    other: Any = {"vae": "kl-16", "scale": 0.2325, "kind": "moments"}[field]
    with pytest.raises(UserError, match=rf"^{field} is {other!r} in the recipe, but .*{METADATA[field]!r}"):
        Latents(folder=folder, num_held_out=HELD_OUT, **{field: other}).held_out()


def test_what_the_recipe_says_must_stand_in_the_metadata(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "latents")
    (Path(folder) / "metadata.json").write_text('{"format_version": 1}')
    assert len(Latents(folder=folder, num_held_out=2).train())
    with pytest.raises(UserError, match="does not say 'vae', which the recipe states"):
        Latents(folder=folder, vae="sd", num_held_out=2).train()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"kind": "mean"}, "kind 'mean' is unknown"),
    ],
)
def test_metadata_of_another_kind(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Latents(folder=write_arrays(tmp_path / "data", **metadata), num_held_out=HELD_OUT).train()


def test_moments_need_an_even_number_of_channels(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data", num_channels=3, kind="moments")
    with pytest.raises(UserError, match="the latents have 3 channels"):
        Latents(folder=folder, num_held_out=HELD_OUT).train()


@pytest.mark.parametrize("count", [0, NUM_IMAGES])
def test_both_sides_need_images(count: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^num_held_out is {count}; expected 1 to 11"):
        Latents(folder=write_arrays(tmp_path / "data"), num_held_out=count).train()


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "metadata.json"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(UserError, match=f"^folder: .* lacks {name}. Put there"):
        Latents(folder=folder, num_held_out=HELD_OUT).train()


def test_arrays_that_do_not_fit_each_other(tmp_path: Path) -> None:
    data = Latents(folder=write_arrays(tmp_path / "data"), num_held_out=HELD_OUT)
    for name, array, message in (
        ("labels.npy", np.zeros(NUM_IMAGES), "labels.npy: holds float64, expected integers"),
        ("labels.npy", np.arange(3), r"labels.npy: shape \(3,\), expected \(12,\)"),
        ("flipped.npy", np.zeros((2, 4, 2, 3)), r"flipped.npy: shape \(2, 4, 2, 3\), expected \(12, 4, 2, 3\)"),
        ("features.npy", np.zeros((12, 24)), r"features.npy: shape \(12, 24\), expected \(images"),
    ):
        path = tmp_path / "data" / name
        intact = path.read_bytes()
        np.save(path, array)
        with pytest.raises(UserError, match=message):
            data.train()
        path.write_bytes(intact)
    data.train()


def test_files_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "data" / "labels.npy"
    data = Latents(folder=write_arrays(tmp_path / "data"), num_held_out=HELD_OUT)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"labels\.npy: cut short, or not a \.npy file of numbers"):
        data.train()
    path.write_bytes(pickle.dumps(list(range(NUM_IMAGES))))
    with pytest.raises(UserError, match=r"labels\.npy: cut short, or not a \.npy file of numbers"):
        data.train()
    with path.open("wb") as file:
        np.savez(file, np.arange(NUM_IMAGES))
    with pytest.raises(UserError, match=r"labels\.npy: holds an archive"):
        data.train()


def test_arrays_that_are_cut_short_or_vanish_during_the_run(tmp_path: Path) -> None:
    path = tmp_path / "data" / "flipped.npy"
    samples = Latents(folder=write_arrays(tmp_path / "data"), num_held_out=HELD_OUT).train()
    everything(samples)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"flipped\.npy: cut short"):
        everything(samples)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"flipped\.npy: cut short"):
        everything(samples)
    path.unlink()
    with pytest.raises(UserError, match=r"flipped\.npy: no such file"):
        everything(samples)


@pytest.mark.parametrize("folder", ["features", "labels"])
def test_files_that_are_cut_short_or_vanish_during_the_run(folder: str, tmp_path: Path) -> None:
    samples = source("files", tmp_path).train()
    rows = everything(samples)
    path = tmp_path / "data" / folder / f"{int(rows['y'][0]) // 10}.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{folder}/{path.name}: cut short"):
        everything(samples)
    np.save(path, np.zeros((2, 2)) if folder == "features" else np.zeros(2, dtype=int))
    with pytest.raises(UserError, match=rf"{folder}/{path.name}: shape \(2"):
        everything(samples)
    path.unlink()
    with pytest.raises(UserError, match=rf"{folder}/{path.name}: no such file"):
        everything(samples)


def test_folders_that_do_not_fit_each_other(tmp_path: Path) -> None:
    folders = write_files(tmp_path / "data")
    (tmp_path / "data" / "labels" / "3.npy").rename(tmp_path / "data" / "labels" / "x.npy")
    with pytest.raises(UserError, match="do not hold files of the same names"):
        LatentFolders(**folders, num_held_out=HELD_OUT).train()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.npy files"):
        LatentFolders(**folders | {"features": str(tmp_path / "empty")}, num_held_out=HELD_OUT).train()
    with pytest.raises(UserError, match=r"nowhere: not a readable folder \(No such file"):
        LatentFolders(**folders | {"features": str(tmp_path / "nowhere")}, num_held_out=HELD_OUT).train()
    np.save(tmp_path / "empty" / "0.npy", np.zeros(5))
    np.save(tmp_path / "data" / "0.npy", np.zeros(1, dtype=int))
    with pytest.raises(UserError, match=r"0\.npy: shape \(5,\), expected \(\[copies,\] channels"):
        LatentFolders(features=str(tmp_path / "empty"), labels=str(tmp_path / "data"), num_held_out=1).train()


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    num_images = 100_000  # 100 MB of features, as a sparse file
    folder = tmp_path / "data"
    folder.mkdir()
    np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (num_images, 4, 8, 8))[-1] = 7
    np.save(folder / "labels.npy", np.zeros(num_images, dtype=np.int32))
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    tracemalloc.start()
    try:
        samples = Latents(folder=str(folder), num_held_out=10).train()
        rows = samples.__getitems__([0, len(samples) - 1, 5000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows["x"][1].unique().tolist() == [7]
    assert not rows["x"][0].any()
    assert peak < 1_000_000


def test_another_layout_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "imagenet256")
    for part in ("features", "labels"):  # as fast-DiT and TinyFusion have it
        (tmp_path / "imagenet256" / part).rename(tmp_path / "imagenet256" / f"imagenet256_{part}")
    with pytest.raises(UserError, match=r"a file for each image: .*LatentFolders.*256_features, labels: .*256_labels"):
        Latents(folder=str(tmp_path / "imagenet256")).train()
