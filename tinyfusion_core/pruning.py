"""Remove blocks for good, and keep the result as a folder that anybody can load."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .backbone import Backbone, block_lists
from .decision import Decision
from .errors import UserError
from .files import load_strict, read_json, read_weights, save_tensors, sha256, write_json, write_text
from .plugins import record_of, registry
from .task import Task

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"


def prune(task: Task, decision: Decision) -> nn.Module:
    """A copy of the task's network without the removed blocks, in eval mode. The original keeps its own.

    Raises:
        UserError: the decision is about other blocks than the network has.
    """
    decision.check_fits(task.blocks, type(task.teacher).__name__)
    # What goes is not copied: the copy of a removed block is an empty module.
    removed: dict[int, Any] = {id(task.teacher.get_submodule(task.blocks[i])): nn.Identity() for i in decision.removed}
    student = copy.deepcopy(task.teacher, memo=removed)
    remove_blocks(task.backbone, student, [task.blocks[i] for i in decision.removed])
    return student.eval()


def remove_blocks(backbone: Backbone, model: nn.Module, removed: Sequence[str]) -> None:
    """Take blocks out of a network in place and let the backbone repair the rest.

    Args:
        backbone: the model family.
        model: the network.
        removed: paths of the blocks that go, children of a `ModuleList` or `Sequential`.

    Raises:
        UserError: a block is the child of something else.
    """
    kept: dict[str, list[int]] = {}
    for path in block_lists(backbone.block_paths(model)):
        container = model.get_submodule(path)
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            raise UserError(f"'{path or 'the network itself'}' is a {type(container).__name__}; blocks live in lists")
        going = [i for i, name in enumerate(dict(container.named_children())) if f"{path}.{name}" in removed]
        # Children that are no blocks stay where they are.
        kept[path] = [i for i in range(len(container)) if i not in going]
        for i in reversed(going):
            del container[i]
    backbone.after_prune(model, kept)


def save_pretrained(student: nn.Module, task: Task, decision: Decision, folder: Path | str) -> Path:
    """Write `model.safetensors`, `config.json`, `decision.json` and a model card.

    Args:
        student: the pruned network.
        task: what it was pruned from.
        decision: which blocks it kept.
        folder: where to; made when missing.

    Returns:
        The folder.
    """
    folder = Path(folder)
    source = task.source
    decision.save(folder / "decision.json")
    save_network(student, task.backbone, source, folder)
    write_text(folder / "README.md", _model_card(student, task.backbone, decision, source))
    return folder


def save_network(model: nn.Module, backbone: Backbone, source: Mapping[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and the `config.json` from which the network is rebuilt and verified."""
    save_tensors(folder / WEIGHTS, model.state_dict())
    files = [name for name in (WEIGHTS, "decision.json") if (folder / name).exists()]
    config = {
        "format_version": FORMAT_VERSION,
        "backbone": type(backbone).__name__,
        "network": backbone.config(model),
        "sha256": {name: sha256(folder / name) for name in files},
        "source": dict(source),
        "plugin": record_of(type(backbone)),
    }
    write_json(folder / "config.json", config)


def load_pretrained(folder: Path | str, backbone: type[Backbone] | None = None) -> nn.Module:
    """The network that `save_pretrained` wrote, in eval mode; every file is verified.

    Args:
        folder: that holds it.
        backbone: its model family; by default looked up by the recorded name among what plugins bring.

    Raises:
        UserError: a file is missing, damaged or does not belong with the others, or the plugin is not installed.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder / 'config.json'}: not of format_version {FORMAT_VERSION}")
    weights = folder / WEIGHTS
    tensors = read_weights(weights)
    if not {"backbone", "network"} <= config.keys() or WEIGHTS not in config.get("sha256", {}):
        raise UserError(f"{folder / 'config.json'}: incomplete; expected backbone, network and the files' sha256")
    for name, expected in config["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: not the file that config.json was written for; restore the whole folder")
    family = backbone or registry().find("backbone", config["backbone"], config.get("plugin"))
    model: nn.Module = family.construct(config["network"])
    load_strict(model, tensors, weights)
    return model.eval()


def push_to_hub(folder: Path | str, repo_id: str, private: bool = True) -> str:
    """Upload a saved folder to the Hugging Face hub; needs a login (`hf auth login`). Returns the commit's address.

    Raises:
        UserError: the folder holds no saved network.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; give the folder that save_pretrained wrote")
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)).commit_url)


def _model_card(student: nn.Module, backbone: Backbone, decision: Decision, source: Mapping[str, Any]) -> str:
    licence = source.get("licence", "unknown")
    checkpoint = source.get("checkpoint", "a network trained in the same run")
    parameters = sum(p.numel() for p in student.parameters())
    return f"""---
license: {licence}
library_name: tinyfusion
tags: [pruned, depth-pruning, tinyfusion]
---

# {type(backbone).__name__}, {len(decision.blocks)} → {len(decision.kept)} blocks

Depth-pruned from `{checkpoint}` with [TinyFusion](https://arxiv.org/abs/2412.01199) ({decision.method}).
The licence is that of the source checkpoint: **{licence}**.

- parameters: {parameters:,}
- kept blocks: {", ".join(str(i) for i in decision.kept)}
- removed blocks: {", ".join(str(i) for i in decision.removed)}
- sha256 of the source checkpoint: {source.get("sha256", "none")}

```python
import tinyfusion_core as tiny

model = tiny.load_pretrained("path/to/this/folder")
```
"""
