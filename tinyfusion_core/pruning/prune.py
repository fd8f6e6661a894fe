"""Remove blocks for good, and save or load the pruned network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..errors import MissingFileError, UserError
from ..parsing.settings import check_arguments
from ..protocols.backbone import WEIGHTS, Backbone, config_of
from ..protocols.blocks.paths import word_for
from ..protocols.task import Task
from ..registry.registry import record_of, registry
from ..runtime.files import digest, sha256, write_json, write_text
from .decision import Decision
from .interop_formats import describe_clients
from .read_back import write_checked
from .record import DECISION, RECORDS, read_record, record_path
from .removal import check_removal, without

FORMAT_VERSION = 1


def prune(task: Task, decision: Decision) -> nn.Module:
    """Return a copy of the task's network without the removed blocks, in eval mode. The original is not changed.

    Raises:
        UserError: the decision is about other blocks than the network has, or the network cannot do without them.
    """
    check_arguments(task=(task, Task), decision=(decision, Decision))
    decision.check_fits(task.blocks, type(task.teacher).__name__)
    check_removal(task, decision.kept)
    return without(task, decision.removed)


def save_pretrained(student: nn.Module, task: Task, decision: Decision, folder: Path | str) -> Path:
    """Write the network, its record, `decision.json` and a model card.

    Args:
        student: the pruned network.
        task: what it was pruned from.
        decision: which blocks were kept.
        folder: where to; created if missing.

    Returns:
        The folder.

    Raises:
        UserError: what was written is not the student when it is read, or the folder holds weights that are not ours.
    """
    check_arguments(student=(student, nn.Module), task=(task, Task), decision=(decision, Decision))
    folder = Path(folder)
    save_network(student, task, folder, decision)
    usage = f"```python\n{task.backbone.loading}\n```"
    write_text(folder / "README.md", model_card(student, task, decision, task.backbone.library, usage))
    return folder


def save_network(
    model: nn.Module,
    task: Task,
    folder: Path,
    decision: Decision | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a network of a task's family, and the record from which it is rebuilt and verified.

    Args:
        model: the network.
        task: its family, objective and source.
        folder: where to.
        decision: which blocks it has kept of another, written beside it.
        source: where the network comes from; by default the task's source.

    Raises:
        UserError: what was written is not the network when it is read, or the folder holds another that is not ours.
    """
    backbone = task.backbone
    files = write_checked(model, task, folder, lambda made: backbone.save(model, made), _recorded(folder))
    if decision is not None:
        decision.save(folder / DECISION)
        files = [*files, DECISION]
    record = folder / (RECORDS[0] if "config.json" in files else RECORDS[1])
    content = {
        "format_version": FORMAT_VERSION,
        "backbone": type(backbone).__name__,
        "network": config_of(backbone, model),
        "sha256": {name: sha256(folder / name) for name in files},
        "source": dict(task.source if source is None else source),
        "plugin": record_of(type(backbone)),
    }
    write_json(record, content)


def _recorded(folder: Path) -> list[str]:
    """Files of a network that was saved there before; none if it is not one of ours."""
    try:
        return list(read_record(folder)["sha256"])
    except UserError:
        return []


def origin(folder: Path) -> dict[str, Any]:
    """Return the source of a network saved there, with the hash of its own weights."""
    record = read_record(folder)
    hashes = record["sha256"]
    return {**record["source"], "sha256": hashes.get(WEIGHTS) or digest(hashes)}


def load_pretrained(folder: Path | str, backbone: type[Backbone] | None = None) -> nn.Module:
    """Load a network that `save_pretrained` wrote, in eval mode; every file is verified by hash.

    Args:
        folder: where it is.
        backbone: its model family; by default looked up by the recorded name.

    Raises:
        UserError: a file is missing, damaged or does not belong with the others, or the plugin is not installed.
    """
    folder = Path(folder)
    record = read_record(folder)
    for name, expected in record["sha256"].items():
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name}: no such file")
        if sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name}: not the file that {record_path(folder).name} was written for; restore the whole "
                "folder"
            )
    family = backbone or registry().find("backbone", record["backbone"], record.get("plugin"))
    model: nn.Module = family.load(folder, record["network"])
    return model.eval()


def push_to_hub(folder: Path | str, repo_id: str, private: bool = True) -> str:
    """Upload a saved folder to the Hugging Face hub and return the address of the commit.

    Needs a login (`hf auth login`).

    Raises:
        UserError: the folder holds no saved network.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; give the folder that save_pretrained wrote")
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)).commit_url)


def model_card(student: nn.Module, task: Task, decision: Decision, library: str, usage: str) -> str:
    """Return the model card of a student, or of what it is made with.

    Args:
        student: the pruned network.
        task: what it was pruned from.
        decision: which blocks were kept.
        library: what reads it.
        usage: its last part: how it is read.
    """
    backbone, source = task.backbone, task.source
    # Of what a source says of itself nothing is taken as markup: neither as YAML nor as lines of the page.
    licence = " ".join(str(source.get("licence", "unknown")).split())
    checkpoint = " ".join(str(source.get("checkpoint", "a network trained in the same run")).replace("`", "'").split())
    front = {"license": licence, "library_name": library, "tags": ["pruned", "depth-pruning", "tinyfusion"]}
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=None)
    parameters = sum(p.numel() for p in student.parameters())
    weights = f"- weights of the source checkpoint: {source['weights']}\n" if "weights" in source else ""
    what = word_for(decision.blocks)
    names = decision.blocks if what == "branches" else [str(i) for i in range(len(decision.blocks))]
    clients = backbone.clients(task.teacher, student, decision.kept)
    runs = f"- other tools: {describe_clients(clients)}\n" if clients else ""
    return f"""---
{matter}---

# {type(backbone).__name__}, {len(decision.blocks)} → {len(decision.kept)} {what}

Depth-pruned from `{checkpoint}` with [TinyFusion](https://arxiv.org/abs/2412.01199) ({decision.method}).
The licence is that of the source checkpoint: **{licence}**.

- parameters: {parameters:,}
- kept {what}: {", ".join(names[i] for i in decision.kept)}
- removed {what}: {", ".join(names[i] for i in decision.removed)}
- sha256 of the source checkpoint: {source.get("sha256", "none")}
{weights}{runs}
{usage}
"""
