"""Data of every kind that is read from files, with one of them damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import llm_toys
from fuzz.mutations import harm_file
from fuzz.runner import Case, warm_up
from tinyfusion_core.dataloading.shards import write_shard

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
DIT = {"class_path": "DiT", "init_args": {**SIZES, "num_classes": 3, "learn_sigma": False}}
TRAINED = {"steps": 1, "lr": 1e-3}
LATENT: dict[str, Any] = {"vae": None, "num_held_out": 4}
SOURCES: dict[str, dict[str, Any]] = {
    "shards": {"class_path": "Latents", "init_args": {"folder": "shards", **LATENT}},
    "arrays": {"class_path": "Latents", "init_args": {"folder": "arrays", **LATENT}},
    "files": {"class_path": "LatentFolders", "init_args": {"features": "files/x", "labels": "files/y", **LATENT}},
    "listed": {"class_path": "ListedMoments", "init_args": {"folder": "listed", "scale": 1.0, **LATENT}},
    "tensors": {"class_path": "LatentTensors", "init_args": {"folder": "tensors", **LATENT}},
    "text": {
        "class_path": "TextTokens",
        "init_args": {"tokenizer": "llm", "files": ["text"], "context": 8, "cache": "own/cache"},
    },
}


def prepare(base: Path) -> None:
    """Make the data to damage, and a recipe for each kind."""
    x, y = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    parts = [write_shard(base / "shards", f"{i}.safetensors", {"x": x[i::2], "y": y[i::2]}) for i in (0, 1)]
    metadata = {"format_version": 1, "vae": "v", "scale": 1.0, "shift": 0.0, "kind": "sample", "flips": False}
    listed = [{"name": p.name, "count": p.count, "sha256": p.sha256} for p in parts]
    (base / "shards" / "metadata.json").write_text(json.dumps({**metadata, "shards": listed}))
    for name in ("arrays", "files/x", "files/y", "text", "llm", "images/a", "images/b"):
        (base / name).mkdir(parents=True)
    (base / "arrays" / "metadata.json").write_text(json.dumps(metadata))
    np.save(base / "arrays" / "features.npy", x.numpy())
    np.save(base / "arrays" / "labels.npy", y.numpy())
    for i in range(12):
        np.save(base / "files" / "x" / f"{i}.npy", x[i].numpy())
        np.save(base / "files" / "y" / f"{i}.npy", y[i : i + 1].numpy())
        (base / "listed" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(base / "listed" / f"{i % 2}" / f"{i}.npy", torch.cat([x[i], x[i].abs()]).numpy())
    labels = [[f"{i % 2}/{i}.npy", int(y[i])] for i in range(12)]
    (base / "listed" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (base / "tensors").mkdir()
    for i in (0, 1):
        columns = {"latents": x[i::2], "latents_flip": x[i::2].flip(-1), "labels": y[i::2]}
        save_file(
            {name: column.contiguous() for name, column in columns.items()}, base / "tensors" / f"{i}.safetensors"
        )
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, base / "tensors" / "latents_stats.pt")
    for name in ("a.txt", "b.txt"):
        (base / "text" / name).write_text("w5 w6 w7 w8 \n" * 50)
    (base / "text" / "c.jsonl").write_text("".join(json.dumps({"text": f"w{i} w9 " * 9}) + "\n" for i in range(9)))
    llm_toys.folder(base / "llm", "llama")
    llm_toys.tokenizer(base / "llm")
    save_file({"x": x}, base / "arrays" / "other.safetensors")
    for name in ("a/0.png", "a/1.jpg", "b/0.png"):
        Image.new("RGB", (9, 12), (200, 10, 30)).save(base / "images" / name)
    common = {"train": TRAINED, "trainer": {"precision": "fp32", "batch_size": 2}, "evaluate": []}
    for name, source in SOURCES.items():
        backbone, loss = DIT, {"class_path": "GaussianDiffusion", "init_args": {"learn_sigma": False}}
        recipe: dict[str, Any] = {"backbone": backbone, "loss": loss, "data": source, **common}
        if name == "text":
            network = llm_toys.settings("llama")
            recipe["backbone"] = {"class_path": "CausalLM", "init_args": {"network": network, "context": 8}}
            recipe["loss"] = "NextToken"
        (base / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        warm_up(base, ["validate", f"{name}.yaml"])


def make(rng: random.Random, base: Path, folder: Path) -> Case:
    """A plan with a damaged file of data."""
    name = rng.choice(list(SOURCES))
    for part in (name, "llm") if name == "text" else (name,):
        shutil.copytree(base / part, folder / part)
    shutil.copy(base / f"{name}.yaml", folder)
    path = rng.choice(sorted(p for p in (folder / name).rglob("*") if p.is_file()))
    what = f"{path.relative_to(folder)}: {harm_file(rng, path)}"
    told = [path.name, f"{name}.yaml", f"{name}/", "data.", "data: ", "labels.npy", "features.npy", name]
    (folder / "file there").touch()
    argv = ["run", f"{name}.yaml", "--run-dir", str(folder / "file there" / "run")]
    return Case(argv, folder, [*told, "file there"], what, owned=(folder / "own", folder / "file there" / "run"))
