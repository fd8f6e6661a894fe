"""Folders of images become shards of latents, by one process or two, interrupted or not, and pictures again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from forks import command, kill_when, start, wait
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.errors import Interrupted, UserError
from tinyfusion_core.runtime.locking import owned
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_dit import Latents
from tinyfusion_dit.conditional import draw_latents
from tinyfusion_images.encoding.autoencoder import load_autoencoder
from tinyfusion_images.encoding.crops import centre_crop, list_images
from tinyfusion_images.encoding.encode import Encode
from tinyfusion_images.encoding.latents_folder import LATENTS

NUM, CLASSES, SIZE = 22, ("ape", "bee", "cat"), 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in three classes, of many sizes, one class with folders in it. Their grey tells label and number."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(NUM):
        label = i % 3
        folder = root / CLASSES[label] / ("deeper" if label == 1 and i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        width, height = random.integers(SIZE, 5 * SIZE, 2)
        noise = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.{'png' if i % 4 else 'JPEG'}")
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def encode(vae: Path, **how: Any) -> Encode:
    return Encode(vae=str(vae), name="tiny", size=SIZE, **{"shard_size": 5, "batch_size": 3} | how)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def all_rows(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def test_latents_are_what_the_autoencoder_gives(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "moments"
    made = encode(tiny_vae, kind="moments", flip=True)(images, out)
    assert made == json.loads((out / "metadata.json").read_text())
    names = [f"{i:05d}-of-00005.safetensors" for i in range(5)]
    assert sorted(path.name for path in out.iterdir()) == [".lock", *names, "metadata.json"]
    expected = {"vae": "tiny", "scale": 0.5, "shift": 0.25, "kind": "moments", "size": SIZE, "flips": True}
    assert {**expected, "num_images": NUM}.items() <= made.items()
    assert made["classes"] == list(CLASSES)
    assert [shard["count"] for shard in made["shards"]] == [10, 10, 10, 10, 4]
    rows = all_rows(out)
    assert rows["x"].shape == (2 * NUM, 4, SIZE // 2, SIZE // 2)
    assert rows["y"].bincount().tolist() == [16, 14, 14]
    assert torch.equal(rows["y"][::2], rows["y"][1::2])
    assert rows["y"][::2].diff().abs().sum() > 6  # in no order

    vae, folder = load_autoencoder(str(tiny_vae)), list_images(images)
    found = set()
    for file, label in zip(folder.files, folder.labels, strict=True):
        crop = torch.from_numpy(np.array(centre_crop(Image.open(images / file).convert("RGB"), SIZE)))
        x = crop.permute(2, 0, 1).float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(torch.stack([x, x.flip(-1)])).latent_dist
        means, stds = (posterior.mean - 0.25) * 0.5, posterior.std * 0.5
        row = 2 * int((rows["x"][::2] - means[0]).square().flatten(1).mean(1).argmin())
        found.add(row)
        assert label == CLASSES.index(file.split("/")[0])
        assert rows["y"][row] == label
        torch.testing.assert_close(rows["x"][row : row + 2], means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows["x_std"][row : row + 2], stds, rtol=1e-4, atol=1e-5)
    assert len(found) == NUM

    encode(tiny_vae, flip=True)(images, tmp_path / "samples")  # the same images in the same rows
    drawn = all_rows(tmp_path / "samples")
    assert torch.equal(drawn["y"], rows["y"])
    noise = ((drawn["x"] - rows["x"]) / rows["x_std"]).flatten(1)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert abs(noise.corrcoef().fill_diagonal_(0)).max() < 0.4  # each row its own


def test_what_a_recipe_reads_and_shows(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    for kind in ("sample", "moments"):
        encode(tiny_vae, kind=kind, dtype="float16")(images, tmp_path / kind)
    data = Latents(folder=str(tmp_path / "moments"), vae="tiny", scale=0.5, decoder=str(tiny_vae), num_held_out=4)
    batch = data.train().__getitems__(list(range(NUM - 4)))
    assert set(batch) == {"x", "x_std", "y"}
    drawn = draw_latents(batch, Rng(0, "test"))
    assert not torch.equal(drawn, batch["x"])
    pictures = data.pixels(batch["x"])
    assert pictures is not None
    assert pictures.shape == (NUM - 4, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = load_autoencoder(str(tiny_vae)).decode(batch["x"] / 0.5 + 0.25).sample / 2 + 0.5
    torch.testing.assert_close(pictures, expected.clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert pictures.std() > 0.01
    assert Latents(folder=str(tmp_path / "sample"), num_held_out=4).pixels(batch["x"]) is None
    with pytest.raises(UserError, match=r"^vae is 'other' in the recipe, but .* made with 'tiny'"):
        Latents(folder=str(tmp_path / "sample"), vae="other").train()
    with pytest.raises(UserError, match="nowhere: no autoencoder there"):
        Latents(folder=str(tmp_path / "sample"), decoder=str(tmp_path / "nowhere"), num_held_out=4).train()


def test_draws_depend_on_the_seed_and_the_image_alone(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    def latents(**how: Any) -> torch.Tensor:
        encode(tiny_vae, **how)(images, out := tmp_path / str(len(list(tmp_path.iterdir()))))
        return all_rows(out)["x"]

    first = latents()
    torch.testing.assert_close(latents(shard_size=7, batch_size=7), first, rtol=1e-5, atol=1e-5)
    assert torch.equal(latents(num_workers=1), first)
    assert not torch.allclose(latents(seed=1).sort(0).values, first.sort(0).values, atol=1e-3)


@pytest.mark.slow
def test_two_processes_and_a_kill_make_what_one_makes(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    words = [str(images), "--vae", str(tiny_vae), "--name", "tiny", "--size", str(SIZE), "--flip"]
    words += ["--shard-size", "1", "--batch-size", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)  # what a forked process can use
    assert main(["encode", *words, "--out", str(whole)]) == 0

    (process,) = start(command("encode", *words, "--out", killed), tmp_path / "killed.txt")
    kill_when(process, lambda: list(killed.glob("0*.json")))
    assert process.exitcode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.safetensors")}
    assert 0 < len(kept) < NUM
    with pytest.raises(UserError, match="lists no shards; let the command that makes them finish"):
        Latents(folder=str(killed)).train()
    recorded = {path.with_suffix(".safetensors").name for path in killed.glob("0*.json")}
    damaged = min(recorded) if len(recorded) > 1 else ""  # one of those that were finished
    if damaged:
        (killed / damaged).write_bytes(b"?")
    (killed / f".00009-of-{NUM:05d}.safetensors.x.partial").write_bytes(b"a kill in the middle of a write")

    log = tmp_path / "log.txt"
    ranks = start(command("encode", *words, "--out", killed), log, processes=2)
    assert wait(ranks) == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count(f"{NUM} images in {NUM} shards, all verified") == 1
    assert content(killed) == content(whole)
    for name in recorded - {damaged}:
        assert (killed / name).stat().st_mtime_ns == kept[name]


def test_what_is_finished_is_verified_and_kept(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "latents", encode(tiny_vae)
    how(images, out)
    before = content(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    (out / "00001-of-00005.safetensors").unlink()
    whole = before["00003-of-00005.safetensors"]
    (out / "00003-of-00005.safetensors").write_bytes(whole[:-4])
    how(images, out)
    assert content(out) == before
    made = {path.name for path in out.glob("*.safetensors") if path.stat().st_mtime_ns != times[path.name]}
    assert made == {"00001-of-00005.safetensors", "00003-of-00005.safetensors"}


def test_other_latents_are_not_mixed_in(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(tiny_vae)(images, out)
    before = content(out)
    for how, message in (
        ({"kind": "moments"}, "kind: 'sample', now 'moments'"),
        ({"scale": 0.75}, r"scale: 0\.5, now 0\.75"),
        ({"seed": 4, "flip": True}, "flips: False, now True; seed: 0, now 4"),
    ):
        with pytest.raises(UserError, match=f"latents that were made otherwise .*{message}.*; choose another"):
            encode(tiny_vae, **how)(images, out)
    assert content(out) == before


def test_two_encodings_do_not_share_a_folder(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "latents", encode(tiny_vae)
    refusal = rf"at work in this folder \(process {os.getpid()} on .* choose another --out"
    with owned(out, LATENTS), pytest.raises(UserError, match=refusal):
        how(images, out)
    assert [path.name for path in out.iterdir()] == [".lock"]
    how(images, out)


def test_a_folder_of_the_users_gets_no_latents(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (out / "films").mkdir(parents=True)
    (out / "films" / "00000-of-00005.safetensors").write_text("mine")
    with pytest.raises(UserError, match="is neither empty nor latents of tinyfusion's .it holds films/00000"):
        encode(tiny_vae)(images, out)
    assert [path.name for path in out.iterdir()] == ["films"]


def test_an_image_that_cannot_be_read_is_named_or_left_out(
    tiny_vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "images", tmp_path / "latents"
    for path in images.rglob("*.*"):
        target = copy / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    cut, text = copy / "ape" / "00.JPEG", copy / "bee" / "deeper" / "01.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("no image")
    words = ["encode", str(copy), "--out", str(out), "--vae", str(tiny_vae), "--size", str(SIZE), "--shard-size", "5"]
    for workers in ("0", "1"):
        assert main([*words, "--num-workers", workers]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") <= 2
        assert ("00.JPEG: not a readable picture" in error) != ("01.png: not a readable picture" in error)
        assert "leave such images out with --skip-bad" in error
    assert main([*words, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "20 images in 5 shards" in printed
    assert "left out: ape/00.JPEG\nleft out: bee/deeper/01.png" in printed
    assert len(all_rows(out)["y"]) == NUM - 2
    assert main([*words, "--skip-bad"]) == 0
    assert len(Latents(folder=str(out), num_held_out=3).train()) == NUM - 5


def test_a_signal_stops_between_batches_and_the_next_run_goes_on(
    tiny_vae: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyfusion_core.dataloading import encoding as module

    out, how, write = tmp_path / "latents", encode(tiny_vae), module.write_shard
    how(images, tmp_path / "whole")

    def write_and_signal(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args)

    monkeypatch.setattr(module, "write_shard", write_and_signal)
    with pytest.raises(Interrupted, match="stopped after 1 of 5 shards") as stopped:
        how(images, out)
    assert stopped.value.signum == signal.SIGTERM
    assert len(list(out.glob("*.safetensors"))) == 1
    monkeypatch.undo()
    how(images, out)
    assert content(out) == content(tmp_path / "whole")


def test_latents_that_are_not_finite_are_noticed(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latents that are not finite; does float16 hold them"):
        encode(tiny_vae, scale=1e9, dtype="float16")(images, tmp_path / "latents")


def test_folders_of_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; expected a folder with one folder of pictures for each class"):
        list_images(tmp_path / "none")
    with pytest.raises(UserError, match="no folders in it"):
        list_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a: no pictures"):
        list_images(tmp_path)


def test_what_cannot_be_asked_for(tiny_vae: Path) -> None:
    for how, message in (
        ({"size": 0}, "encode: size is 0"),
        ({"kind": "mean"}, r"kind \(of Encode\) is .mean.; expected .sample. or .moments."),
        ({"dtype": "int8"}, r"dtype \(of Encode\) is .int8.; expected .float32. or .float16. or .bfloat16."),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"batch_size": 10**18}, r"batch_size \(of Encode\) is 1\d+; expected at most 100,000"),
    ):
        with pytest.raises(UserError, match=message):
            Encode(vae=str(tiny_vae), **how)


@pytest.mark.parametrize(("width", "height"), [(16, 16), (70, 33), (33, 150), (20, 400), (31, 31), (9, 12)])
def test_the_crop_is_the_middle_square_whatever_the_size(width: int, height: int) -> None:
    across = np.linspace(0, 255, width)[None, :] + np.zeros((height, 1))
    down = np.linspace(0, 255, height)[:, None] + np.zeros((1, width))
    image = Image.fromarray(np.stack([across, down, np.full_like(down, 77)], -1).astype(np.uint8))
    crop = np.array(centre_crop(image, 16)).astype(float)
    assert crop.shape == (16, 16, 3)
    # The whole shorter side is there, of the longer one the same share in the middle.
    side = min(width, height)
    for channel, axis, length in ((0, 1, width), (1, 0, height)):
        line = crop[..., channel].mean(1 - axis)
        share = 255 * side / length
        assert line[-1] - line[0] == pytest.approx(share * 15 / 16, abs=20)
        assert line.mean() == pytest.approx(127, abs=255 * 2 / side)
    assert np.allclose(crop[..., 2], 77, atol=1)


def test_a_picture_is_averaged_before_it_is_scaled() -> None:
    # A fine checkerboard: averaging halves it to grey; bicubic scaling alone would leave stripes.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    crop = np.array(centre_crop(Image.fromarray(board), 24))
    assert abs(crop.astype(float) - 127.5).max() <= 1


@pytest.mark.slow
def test_a_run_on_encoded_images_from_its_teacher_to_pictures(
    recipe: Path, tiny_vae: Path, images: Path, tmp_path: Path
) -> None:
    encode(tiny_vae, kind="moments", flip=True)(images, tmp_path / "latents")
    settings = yaml.safe_load(recipe.read_text())
    sizes = {"input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 4, "num_heads": 2}
    settings["backbone"] = {"class_path": "DiT", "init_args": {**sizes, "num_classes": 3, "learn_sigma": False}}
    source = {"folder": str(tmp_path / "latents"), "vae": "tiny", "decoder": str(tiny_vae), "num_held_out": 4}
    settings["data"] = {"class_path": "Latents", "init_args": {**source, "mix": 2}}
    settings["trainer"]["num_workers"] = 1
    settings["train"] = {"steps": 8, "lr": 1e-3}
    recipe.write_text(yaml.safe_dump(settings))
    assert run(recipe, tmp_path / "run", "--search.steps=8", "--recover=null") == 0
    shown = load_file(tmp_path / "run" / "samples.safetensors")["pruned"]
    assert shown.shape[1:] == (3, SIZE, SIZE)
    assert len(shown.unique()) > 10
    out = tmp_path / "grid.png"
    assert main(["sample", str(tmp_path / "run"), "--num", "4", "--out", str(out)]) == 0
    assert np.array(Image.open(out)).std() > 1


def test_a_picture_smaller_than_one_latent_is_refused(tmp_path: Path, images: Path, tiny_vae: Path) -> None:
    with pytest.raises(UserError, match="encode: size is 1; expected at least 2 pixels"):
        Encode(vae=str(tiny_vae), size=1)(images, tmp_path / "out")


def test_captions_are_in_the_order_of_the_latents(tiny_vae: Path, images: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "images", tmp_path / "latents"
    files = list_images(images).files
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((images / file).read_bytes())
        (copy / file).with_suffix(".txt").write_text(f"a picture,\nnumbered {file}\n")
    (copy / files[3]).write_text("no image")
    encode(tiny_vae, flip=True, captions=True, skip_bad=True)(copy, out)
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted({*files} - {files[3]})
    assert all(line["caption"] == f"a picture, numbered {line['image']}" for line in lines)
    labels = [CLASSES.index(line["image"].split("/")[0]) for line in lines]
    assert all_rows(out)["y"].tolist() == [label for label in labels for _ in range(2)]
    before = content(out)
    (out / "captions.jsonl").unlink()
    encode(tiny_vae, flip=True, captions=True, skip_bad=True)(copy, out)
    assert content(out) == before
    (copy / files[5]).with_suffix(".txt").unlink()
    with pytest.raises(UserError, match="no such file; --captions needs one beside every image"):
        encode(tiny_vae, captions=True, skip_bad=True)(copy, tmp_path / "other")


def test_a_disk_that_is_too_small_is_noticed_first(
    tiny_vae: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    each = 2 * 2 * 4 * (SIZE // 2) ** 2 * 4
    with pytest.raises(UserError, match=f"encode: takes .* GB, {each:,} bytes for each of {NUM} examples, and"):
        encode(tiny_vae, kind="moments", flip=True)(images, tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("*.safetensors"))
