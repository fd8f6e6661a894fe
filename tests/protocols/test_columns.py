"""What a network reads is in the data: labels, shapes, dtypes, when a plan is made and when samples are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import tinyfusion_core as tiny
from marks import slow_but
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.shards import write_shard
from tinyfusion_core.errors import UserError
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.protocols.columns import checked, columns_of, unchecked
from tinyfusion_core.protocols.data import Sharded, Tensors
from tinyfusion_diffusers.data import EncodedPrompts
from tinyfusion_dit import DiT

NUM = 40


def arrays(folder: Path, labels: Any, **more: Any) -> dict[str, Any]:
    """Latents of the digits' size, with these labels."""
    folder.mkdir()
    np.save(folder / "features.npy", np.random.default_rng(0).standard_normal((NUM, 1, 8, 8)).astype(np.float32))
    np.save(folder / "labels.npy", labels)
    (folder / "metadata.json").write_text(json.dumps({"format_version": 1}))
    return {"class_path": "Latents", "init_args": {"folder": str(folder), "num_held_out": 8, **more}}


def files(folder: Path, labels: Any) -> dict[str, Any]:
    for name in ("features", "labels"):
        (folder / name).mkdir(parents=True)
    for i, label in enumerate(labels):
        latent = np.random.default_rng(i).standard_normal((1, 8, 8)).astype(np.float32)
        np.save(folder / "features" / f"{i:03}.npy", latent)
        np.save(folder / "labels" / f"{i:03}.npy", np.array([label]))
    paths = {name: str(folder / name) for name in ("features", "labels")}
    return {"class_path": "LatentFolders", "init_args": {**paths, "num_held_out": 8}}


def shards(folder: Path, labels: Any) -> dict[str, Any]:
    x, y = torch.randn(NUM, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.as_tensor(labels)
    made = [write_shard(folder, f"{i}.safetensors", {"x": x[i : i + 20], "y": y[i : i + 20]}) for i in (0, 20)]
    (folder / "metadata.json").write_text(json.dumps({"format_version": 1, "shards": [vars(shard) for shard in made]}))
    return {"class_path": "Latents", "init_args": {"folder": str(folder), "num_held_out": 8}}


def recipe_of(tmp_path: Path, data: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": data}))
    return path


def with_one(value: int, at: int = 30) -> Any:
    labels = np.arange(NUM) % 10
    labels[at] = value
    return labels


@pytest.mark.parametrize("value", slow_but([10, 25, -1, 10**15], 10))
def test_wrong_labels_in_one_file_are_found_when_the_plan_is_made(tmp_path: Path, capsys, value: int) -> None:
    path = recipe_of(tmp_path, arrays(tmp_path / "latents", with_one(value)))
    for command in (["validate", str(path)], ["run", str(path), "--run-dir", str(tmp_path / "run")]):
        assert main(command) == 2
        out = "".join(capsys.readouterr())
        assert f"data: 'y' is {value} in {tmp_path / 'latents' / 'labels.npy'} (row 30); " in out
        assert "the network has 10 classes, 0 to 9: number the labels from 0" in out
        assert "Traceback" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_good_labels_pass(tmp_path: Path, capsys) -> None:
    assert main(["validate", str(recipe_of(tmp_path, arrays(tmp_path / "latents", np.arange(NUM) % 10)))]) == 0


@pytest.mark.filterwarnings("ignore:training sample")
@pytest.mark.parametrize("workers", slow_but([0, 1], 1))
@pytest.mark.parametrize(
    ("make", "place"), [(files, "labels/030.npy"), (shards, "20.safetensors (row 10)")], ids=["files", "shards"]
)
def test_wrong_labels_are_found_when_they_are_read(
    tmp_path: Path, capsys, make: Callable[..., dict[str, Any]], place: str, workers: int
) -> None:
    data = make(tmp_path / "latents", with_one(10))
    path = recipe_of(tmp_path, data)
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run"), f"--trainer.num_workers={workers}"]) == 2
    err = capsys.readouterr().err
    assert f"data: 'y' is 10 in {tmp_path / 'latents'}/{place}; the network has 10 classes, 0 to 9" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:training sample")
def test_one_wrong_sample_can_be_replaced_like_one_that_cannot_be_read(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, shards(tmp_path / "latents", with_one(10)))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run"), "--trainer.max_bad_samples=1000"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["bad_samples"] for line in lines) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.arange(4)}, None),
        ({"y": torch.arange(4).int()}, None),
        ({"x": torch.zeros(4, 1, 8, 8, dtype=torch.bfloat16)}, None),
        ({"other": torch.zeros(4)}, None),
        ({"y": torch.arange(4) + 7}, r"data: 'y' is 10 in held-out sample 3; the network has 10 classes, 0 to 9"),
        ({"y": torch.arange(4) - 1}, r"data: 'y' is -1 in held-out sample 0; "),
        (
            {"y": torch.arange(4.0)},
            r"data: 'y' is torch.float32 in held-out sample 0, the network of .*digits/config.json takes torch.int64",
        ),
        (
            {"y": torch.arange(4)[:, None]},
            r"data: 'y' of a sample is \[1\], the network of .*digits/config.json takes \[\]",
        ),
        (
            {"x": torch.zeros(4, 1, 8, 8).double()},
            r"data: 'x' is torch.float64 in .*, the network of .*digits/config.json takes torch.float32",
        ),
        ({"x": torch.zeros(4, 1, 8, 8).byte()}, r"data: 'x' is torch.uint8 in"),
        (
            {"x": torch.zeros(4, 1, 8, 4)},
            r"data: 'x' of a sample is \[1, 8, 4\], the network of .*digits/config.json takes \[1, 8, 8\]",
        ),
    ],
)
def test_columns(change: dict[str, torch.Tensor], message: str | None) -> None:
    backbone = DiT(checkpoint="digits")
    columns = columns_of(backbone, backbone.build(), "y")
    samples = Tensors({"x": torch.zeros(4, 1, 8, 8), "y": torch.arange(4), **change})
    read = checked(samples, columns, "held-out")
    assert unchecked(read) is samples
    if message is None:
        assert read.__getitems__([0, 3]).keys() == samples.columns.keys()
    else:
        with pytest.raises(UserError, match=message):
            read.__getitems__([0, 1, 2, 3])


def test_ignored_values_and_rows_of_many() -> None:
    lookup = tiny.Lookup(20, "tokens", ignored=-100)
    assert lookup.holds(torch.tensor([[0, 19, -100], [20, -1, 5]])).tolist() == [[True] * 3, [False, False, True]]
    assert [lookup.allows(value) for value in (0, 19, 20, -1, -100)] == [True, True, False, False, True]


def test_data_in_shards_stay_so(tmp_path: Path) -> None:
    task = make_task(tiny.load_recipe(recipe_of(tmp_path, shards(tmp_path / "latents", with_one(3)))))
    assert isinstance(task.train, Sharded)
    assert (task.train.sizes, task.train.mix) == (unchecked(task.train).sizes, 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_encoded_prompts_know_their_labels(tmp_path: Path, kind: str) -> None:
    y, x = torch.arange(6) + 1, torch.zeros(6, 2)
    if kind == "npy":
        np.save(tmp_path / "x.npy", x.numpy())
        np.save(tmp_path / "y.npy", y.numpy())
    else:
        tiny_save = pytest.importorskip("safetensors.torch").save_file
        tiny_save({"x": x, "y": y}, tmp_path / "all.safetensors")
    source = EncodedPrompts(folder=str(tmp_path), num_held_out=2)
    for samples in (source.train(), source.held_out()):
        own = samples.__getitems__(list(range(len(samples))))["y"]
        (least, where), (most, _) = samples.extremes("y")
        assert (least, most) == (own.min(), own.max())
        assert where == f"{tmp_path / ('y.npy' if kind == 'npy' else 'all.safetensors')} (row {least - 1})"
        assert samples.extremes("x") == samples.extremes("text") == []
