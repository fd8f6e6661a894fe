"""Latents in the layouts of REPA, EDM2 and LightningDiT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_dit import LatentFolders, Latents, LatentTensors, ListedMoments
from tinyfusion_dit.conditional import draw_latents
from tinyfusion_images.encoding.autoencoder import load_autoencoder
from tinyfusion_mar import CachedMoments

NUM, CHANNELS, SIDE = 12, 4, 3
MEAN, STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]


def everything(samples: Samples) -> dict[str, torch.Tensor]:
    return samples.__getitems__(list(range(len(samples))))


def numbers(*key: object) -> torch.Tensor:
    return torch.randn(NUM, CHANNELS, SIDE, SIDE, generator=generator("layouts", *key))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """As `dataset_tools.py encode` leaves a folder: means of image i are numbers("mean")[i]; its label is i % 5."""
    means, stds = numbers("mean"), numbers("std").exp()
    labels = []
    for i in reversed(range(NUM)):
        name = f"{i // 5:05d}/img-mean-std-{i:08d}.npy"
        (tmp_path / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "vae-sd" / name, torch.cat([means[i], stds[i]]).numpy())
        labels.append([name, i % 5])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "vae-sd"


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    """As `extract_features.py` leaves a folder."""
    folder = tmp_path / "extracted"
    folder.mkdir()
    x, flipped, labels = numbers("x"), numbers("flipped"), torch.arange(NUM) % 5
    for rank, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, NUM))):
        tensors = {"latents": x[rows], "latents_flip": flipped[rows], "labels": labels[rows]}
        save_file({k: t.clone() for k, t in tensors.items()}, folder / f"latents_rank0{rank}_shard000.safetensors")
    stats = {"mean": torch.tensor(MEAN).view(1, -1, 1, 1), "std": torch.tensor(STD).view(1, -1, 1, 1)}
    torch.save(stats, folder / "latents_stats.pt")
    return folder


@pytest.mark.parametrize("edm2", [False, True])
def test_moments_are_scaled_and_drawn_from_as_their_authors_do(listed: Path, edm2: bool) -> None:
    options: dict[str, Any] = {"scale": 0.5, "mean": MEAN, "std": STD} if edm2 else {}
    data = ListedMoments(folder=str(listed), num_held_out=3, **options)
    mean, std, scale = (torch.tensor(n).view(-1, 1, 1) for n in ((MEAN, STD, 0.5) if edm2 else (0.0, 1.0, 0.18215)))
    found = []
    for samples, size in ((data.train(), NUM - 3), (data.held_out(), 3)):
        rows = everything(samples)
        assert len(rows["y"]) == size
        for x, x_std, y in zip(rows["x"], rows["x_std"], rows["y"], strict=True):
            raw = x / scale * std + mean
            image = int((numbers("mean") - raw).square().flatten(1).sum(1).argmin())
            found.append(image)
            assert y == image % 5
            torch.testing.assert_close(x, (numbers("mean")[image] - mean) / std * scale)
            torch.testing.assert_close(x_std, numbers("std").exp()[image] * scale / std)
    assert sorted(found) == list(range(NUM))
    drawn = draw_latents(everything(data.train()), Rng(0, "test"))
    assert (drawn - everything(data.train())["x"]).std() > 0.01
    place = data.train().where("x", 0)
    assert place.startswith(str(listed)) and place.endswith(".npy")
    assert [value for value, _ in data.train().extremes("y")] == [0, 4]


def test_latents_of_each_channel_are_normalised(extracted: Path) -> None:
    mean, std = (torch.tensor(n).view(-1, 1, 1) for n in (MEAN, STD))
    for data, factor in (
        (LatentTensors(folder=str(extracted), num_held_out=4), 1.0),
        (LatentTensors(folder=str(extracted), num_held_out=4, scale=0.18215), 0.18215),
    ):
        both = {
            key: torch.cat([everything(part)[key] for part in (data.train(), data.held_out())]) for key in ("x", "y")
        }
        assert len(both["y"]) == 2 * NUM
        expected = (torch.cat([numbers("x"), numbers("flipped")]) - mean) / std * factor
        for i, row in enumerate(expected):
            nearest = int((both["x"] - row).square().flatten(1).sum(1).argmin())
            torch.testing.assert_close(both["x"][nearest], row, rtol=1e-5, atol=1e-6)
            assert both["y"][nearest] == i % NUM % 5
    held = everything(data.held_out())
    assert torch.equal(held["y"][:4], held["y"][4:])  # an image and its mirrored copy
    given = LatentTensors(folder=str(extracted), num_held_out=4, mean=[0.0] * 4, std=[1.0] * 4)
    raw = torch.cat([everything(given.train())["x"], everything(given.held_out())["x"]])
    torch.testing.assert_close(raw.sum(), (numbers("x") + numbers("flipped")).sum())
    train = data.train()
    assert {train.where("x", i).partition(" (")[2] for i in range(len(train))} > {
        "latents, row 0)",
        "latents_flip, row 0)",
    }


def test_what_was_normalised_is_shown_as_it_was(extracted: Path, tiny_vae: Path) -> None:
    data = LatentTensors(folder=str(extracted), num_held_out=4, decoder=str(tiny_vae))
    x = everything(data.train())["x"]
    raw = x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    with torch.no_grad():
        expected = load_autoencoder(str(tiny_vae)).decode(raw).sample / 2 + 0.5
    pictures = data.pixels(x)
    assert pictures is not None
    torch.testing.assert_close(pictures, expected.clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_a_reader_of_another_layout_names_the_right_one(listed: Path, extracted: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "metadata.json").write_text("{}")
    (tmp_path / "mar" / "n01").mkdir(parents=True)
    np.savez(tmp_path / "mar" / "n01" / "0.npz", moments=np.zeros((2, 1, 1)))
    folders = {
        "ListedMoments": listed,
        "LatentTensors": extracted,
        "Latents": tmp_path / "ours",
        "CachedMoments": tmp_path / "mar",
    }
    for reader in (Latents, LatentTensors, ListedMoments, CachedMoments, LatentFolders):
        for right, folder in folders.items():
            places = {"features": folder, "labels": folder} if reader is LatentFolders else {"folder": folder}
            if right != reader.__name__:
                with pytest.raises(UserError, match=rf"data: {{class_path: {right}}}"):
                    reader(**{key: str(place) for key, place in places.items()}).train()


def test_what_cannot_be_read_is_told(listed: Path, extracted: Path, tmp_path: Path) -> None:
    def refused(message: str, data: Any) -> None:
        with pytest.raises(UserError, match=message):
            everything(data.train())

    moments = {"folder": str(listed), "num_held_out": 2}
    refused("mean is .1.0.; expected a number for each of 4 channels", ListedMoments(**moments, mean=[1.0]))
    refused("kind is 'sample' in the recipe, but the latents were made with", ListedMoments(**moments, kind="sample"))
    for how, message in (({"scale": 0.0}, "scale is 0.0"), ({"std": [1.0, 0.0, 1.0, 1.0]}, "std is .*numbers above 0")):
        with pytest.raises(UserError, match=message):
            ListedMoments(**moments, **how)
    path = listed / "dataset.json"
    whole = path.read_text()
    for content, message in (
        ({"labels": None}, "'labels' is no list of .file, label."),
        ({"labels": [["00000/a.png", 1]]}, "lists '00000/a.png', which is no latent"),
        ({"labels": [["../a.npy", 1]]}, "names '../a.npy'; expected a file in its folder"),
        ({"labels": [["a.npy", 1]]}, "a.npy: "),
    ):
        path.write_text(json.dumps(content))
        refused(message, ListedMoments(**moments))
    path.write_text(whole)
    np.save(listed / "00000" / "img-mean-std-00000003.npy", np.zeros((8, 1, 1), np.float32))
    refused(r"00000003.npy: shape \(8, 1, 1\), expected \(8, 3, 3\)", ListedMoments(**moments | {"num_held_out": 1}))
    (tmp_path / "vae.zip").touch()
    refused("vae.zip is a file; unpack it", ListedMoments(folder=str(tmp_path / "vae.zip")))

    tensors = {"folder": str(extracted), "num_held_out": 2}
    (extracted / "latents_stats.pt").rename(tmp_path / "stats.pt")
    with pytest.raises(MissingFileError, match="latents_stats.pt: no such file; put there .* or set mean and std"):
        LatentTensors(**tensors).train()
    torch.save({"mean": torch.zeros(4)}, extracted / "latents_stats.pt")
    refused("latents_stats.pt: holds mean, and no 'std'", LatentTensors(**tensors))
    (tmp_path / "stats.pt").replace(extracted / "latents_stats.pt")
    second = extracted / "latents_rank01_shard000.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    refused("rank01_shard000.safetensors: damaged or cut short", LatentTensors(**tensors))
    save_file({"latents": torch.zeros(1, 4, 2, 2), "labels": torch.zeros(1).long()}, second)
    refused("rank01_shard000.*without latents_flip, and those of latents_rank00.* differ", LatentTensors(**tensors))
    save_file({"latents": torch.zeros(1, 4, 2, 2)}, second)
    refused(r"holds latents \[1, 4, 2, 2\]; expected latents", LatentTensors(**tensors))
