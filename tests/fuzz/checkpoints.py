"""Checkpoints, in a file or a folder, of our own, of diffusers and of transformers, with one file damaged."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import llm_toys
from fuzz.mutations import altered, damaged, harm_file, written
from fuzz.runner import Case, warm_up
from places import TESTS
from small_run import RECIPE

TEACHER = TESTS / "before_rooms" / "teacher"
KINDS = {"folder": "DiT", "file": "DiT", "torch": "DiT", "parts": "CausalLM"}
"""Forms of checkpoints, and their backbones."""
KEEP = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 2]}}


def prepare(base: Path) -> None:
    """Make the checkpoints to damage, and a recipe for each."""
    shutil.copytree(TEACHER, base / "folder")
    weights = load_file(TEACHER / "model.safetensors")
    for name in ("file", "torch", "parts"):
        (base / name).mkdir()
    save_file(weights, base / "file" / "model.safetensors")
    torch.save({"model": weights}, base / "torch" / "model.pt")
    llm_toys.folder(base / "parts", "llama")
    llm_toys.tokenizer(base / "parts")
    _split(base / "parts")
    sizes = json.loads((TEACHER / "config.json").read_text())["network"]
    backbones: dict[str, dict[str, Any]] = {
        "folder": {"checkpoint": "folder"},
        "file": {"checkpoint": "file/model.safetensors", **sizes},
        "torch": {"checkpoint": "torch/model.pt", **sizes},
        "parts": {"model": "parts", "context": 8, "dtype": "float32"},
    }
    (base / "text.txt").write_text("w5 w6 w7 w8 " * 200)
    for name, arguments in backbones.items():
        recipe = {**RECIPE, "backbone": {"class_path": KINDS[name], "init_args": arguments}, "search": KEEP}
        recipe = {**recipe, "recover": None, "evaluate": []}
        if name == "parts":
            text = {"tokenizer": "parts", "files": ["text.txt"], "held_out_files": ["text.txt"], "context": 8}
            recipe |= {"loss": "NextToken", "data": {"class_path": "TextTokens", "init_args": {**text, "cache": "own"}}}
        (base / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        warm_up(
            base, ["run", f"{name}.yaml", "--run-dir", f"{name} run"], code=2 if name == "parts" else 0
        )  # it is random


def _split(folder: Path) -> None:
    """Split the weights over two files, with the index that transformers writes."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make(rng: random.Random, base: Path, folder: Path) -> Case:
    """A run that begins with a damaged checkpoint, in a place where it cannot begin."""
    name = rng.choice(list(KINDS))
    shutil.copytree(base / name, folder / name)
    for file in (f"{name}.yaml", "text.txt"):
        shutil.copy(base / file, folder)
    (folder / "file there").touch()
    path = rng.choice(sorted(p for p in (folder / name).iterdir() if p.suffix in (".json", ".safetensors", ".pt")))
    if path.name.endswith(".index.json") and rng.random() < 0.5:
        what = _elsewhere(rng, path, folder)
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        what = _header(rng, path)
    else:
        what = harm_file(rng, path)
    argv = ["run", f"{name}.yaml", "--run-dir", str(folder / "file there" / "run")]
    told = [
        path.name,
        f"{name}.yaml",
        f"{name}/",
        "'parts'",
        "parts:",
        "backbone.",
        "data.tokenizer",
        "file there",
        "the teacher's loss",
    ]
    return Case(argv, folder, told, f"{name}: {what}", owned=(folder / "own", folder / "file there" / "run"))


def _elsewhere(rng: random.Random, path: Path, folder: Path) -> str:
    """Let an index name a file outside of its folder."""
    index = json.loads(path.read_text())
    parameter = rng.choice(sorted(index["weight_map"]))
    (folder / "elsewhere").mkdir()
    shutil.copy(path.with_name(index["weight_map"][parameter]), folder / "elsewhere" / "model.safetensors")
    outside = rng.choice(("../elsewhere/model.safetensors", str(folder / "elsewhere" / "model.safetensors")))
    index["weight_map"][parameter] = outside
    path.write_text(json.dumps(index))
    return f"{path.name}: {parameter} is in {outside}"


def _header(rng: random.Random, path: Path) -> str:
    """Damage the header of a safetensors file, or what it says of its length."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.3:
        size = rng.choice((0, 1, size - 1, size + 1, len(content), 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", size) + header + rest)
        return f"{path.name}: a header of {size} bytes"
    if rng.random() < 0.3:
        header, what = damaged(rng, header)
    else:
        made, _, what = altered(rng, json.loads(header))
        header = written(json.dumps(made))
    path.write_bytes(struct.pack("<Q", len(header)) + header + rest)
    return f"{path.name}: header: {what}"
