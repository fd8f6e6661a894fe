"""A LoRA of the teacher for its student: what belongs to removed blocks goes, and the others get their new numbers."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ...errors import UserError, first_line
from ...parsing.records import check_regular, read_as
from ...protocols.backbone import Backbone
from ...protocols.blocks.paths import block_lists, block_of
from ...pruning.decision import Decision
from ...pruning.record import decision_of
from ...pruning.removal import in_blocks, remove_blocks
from ...runtime.files import save_tensors, write_json
from ...runtime.locking import check_replaceable
from ...runtime.run_folder import RunFolder
from ..recipe import load_recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter that peft has saved as a folder."""
SETTINGS = "lora_adapter_metadata"
"""Entry of the metadata of a file of diffusers: the settings that peft needs."""
MARK = "tinyfusion"
"""Entry of the metadata of an adapter that was written here."""


def export_adapter(folder: RunFolder, adapter: Path, out: Path | None = None) -> str:
    """Write an adapter of a run's teacher as one of its student.

    Args:
        folder: a run with a decision.
        adapter: a safetensors file whose keys name blocks as diffusers, peft or kohya do; or a folder of peft.
        out: where to; by default `export/lora` in the run folder, under the adapter's name.

    Returns:
        The path that was written, and in a further line how much of the adapter is left.

    Raises:
        UserError: the adapter is of another network or of another kind, or `out` holds something else.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    moves: dict[str, str | None] = {}
    model = copy.deepcopy(recipe.on_meta)
    for name in recipe.each_round():
        decision = decision_of(folder, name)
        moves = _then(moves, moves_of(recipe.backbone, model, decision))
        remove_blocks(recipe.backbone, model, {decision.blocks[i] for i in decision.removed})
    target = out or folder / "export" / "lora" / adapter.name
    left, number = move_adapter(adapter, moves, target)
    return f"{target}\n{left} of {number} tensors are left"


def move_adapter(adapter: Path, moves: Mapping[str, str | None], target: Path) -> tuple[int, int]:
    """Write an adapter of a teacher as one of its student.

    Args:
        adapter: a safetensors file, or a folder of peft.
        moves: where the teacher's blocks are in the student, see `moves_of`.
        target: the file or folder to write.

    Returns:
        How many tensors are left, and how many there were.

    Raises:
        UserError: the adapter is of another network or of another kind, or `target` is something else.
    """
    source = adapter / WEIGHTS if adapter.is_dir() else adapter
    with _opened(source) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata() or {})
    renamed = {key: moved(key, moves, source) for key in tensors}
    if not any(_named(key, moves) for key in tensors):
        raise UserError(
            f"{source}: none of its keys, such as {min(tensors, default='none at all')}, names a block of "
            f"{', '.join(_lists(moves))}. Is it of another network, or named as its publisher named it? Load it in "
            "diffusers and save it from there"
        )
    kept = {new: tensors[key] for key, new in renamed.items() if new is not None}
    weights = target / WEIGHTS if adapter.is_dir() else target
    check_replaceable(weights, "--out", _is_ours)
    if SETTINGS in metadata:  # as diffusers writes them
        try:
            settings = json.loads(metadata[SETTINGS])
        except ValueError as e:
            raise UserError(f"{source}: its metadata are damaged ({SETTINGS}: {e}); save the adapter again") from None
        metadata[SETTINGS] = json.dumps(_moved_settings(settings, moves, source))
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, kept, {**metadata, MARK: "of a student"})
    if adapter.is_dir():
        settings = read_as(adapter / CONFIG, dict[str, Any], "copy the folder again")
        write_json(target / CONFIG, _moved_settings(settings, moves, adapter / CONFIG))
    return len(kept), len(tensors)


def moves_of(backbone: Backbone, model: nn.Module, decision: Decision) -> dict[str, str | None]:
    """Return where every block of a network is in the student, by path; None for what is gone, branches too.

    Args:
        backbone: the model family.
        model: the network, on any device.
        decision: what the student keeps of it.
    """
    whole, _ = in_blocks(backbone, model, decision)
    gone = {whole.blocks[i] for i in whole.removed}
    moves: dict[str, str | None] = {decision.blocks[i]: None for i in decision.removed}
    for path in block_lists(whole.blocks):
        children = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
        stay = [child for child in children if child not in gone]
        moves |= {child: f"{path}.{stay.index(child)}" if child in stay else None for child in children}
    return moves


def _then(moves: Mapping[str, str | None], further: Mapping[str, str | None]) -> dict[str, str | None]:
    """Where blocks of the first network are after two rounds."""
    if not moves:
        return dict(further)
    first = {new: old for old, new in moves.items() if new is not None}
    found = {old: new and further[new] for old, new in moves.items()}
    branches = [path for path in further if path != block_of(path)]
    return found | {path.replace(block_of(path), first[block_of(path)], 1): None for path in branches}


def moved(key: str, moves: Mapping[str, str | None], source: Path) -> str | None:
    """Return the name of an adapter's tensor in the student's adapter; None if its block is gone.

    Args:
        key: its name: `transformer.transformer_blocks.3.attn.to_q.lora_A.weight` (diffusers),
            `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight` (peft), or
            `lora_unet_transformer_blocks_3_attn_to_q.lora_down.weight` (kohya).
        moves: see `moves_of`.
        source: the adapter's file, for messages.

    Raises:
        UserError: it names a block that the teacher does not have.
    """
    if (found := _named(key, moves)) is None:
        return key
    before, block, after, between = found
    if block not in moves:
        raise UserError(f"{source}: {key} is of '{block}', which the teacher does not have; give an adapter of it")
    lost = (path.removeprefix(f"{block}.") for path, to in moves.items() if to is None and path.startswith(f"{block}."))
    if (new := moves[block]) is None or any(after.startswith(path.replace(".", between) + between) for path in lost):
        return None
    return f"{before}{new.replace('.', between)}{between}{after}"


def _named(key: str, moves: Mapping[str, str | None]) -> tuple[str, str, str, str] | None:
    """What a key says before its block, the block, what it says after it, and what stands between the parts."""
    lists = sorted(_lists(moves), key=len, reverse=True)
    dotted = "|".join(map(re.escape, lists))
    if found := re.fullmatch(rf"((?:.*\.)?)({dotted})\.(\d+)\.(.+)", key):
        return found[1], f"{found[2]}.{found[3]}", found[4], "."
    under = {path.replace(".", "_"): path for path in lists}
    if found := re.fullmatch(rf"((?:lora_[a-z0-9]+_)?)({'|'.join(under)})_(\d+)_(.+)", key):
        return found[1], f"{under[found[2]]}.{found[3]}", found[4], "_"
    return None


def _moved_settings(settings: Mapping[str, Any], moves: Mapping[str, str | None], source: Path) -> dict[str, Any]:
    """The settings of an adapter by peft, which may name layers by path or by number."""
    found = dict(settings)

    def path_now(path: str) -> str | None:
        return None if (new := moved(f"{path}.", moves, source)) is None else new.removesuffix(".")

    for name, value in settings.items():
        if name in ("rank_pattern", "alpha_pattern") and isinstance(value, Mapping):
            found[name] = {new: number for path, number in value.items() if (new := path_now(path)) is not None}
        elif name == "target_modules" and isinstance(value, list):
            found[name] = [new for path in value if (new := path_now(path)) is not None]
        elif name == "layers_to_transform" and isinstance(value, list):
            found[name] = _numbers_now(value, moves, source)
    return found


def _numbers_now(numbers: Sequence[int], moves: Mapping[str, str | None], source: Path) -> list[int]:
    """What layers are numbered in the student, those that stay."""
    lists = list(_lists(moves))
    if len(lists) > 1:
        raise UserError(f"{source}: layers_to_transform: of which list? The network has {', '.join(lists)}")
    places = [moves.get(f"{lists[0]}.{number}") for number in numbers]
    return [int(place.rpartition(".")[2]) for place in places if place is not None]


def _lists(moves: Mapping[str, str | None]) -> dict[str, list[int]]:
    return block_lists([path for path in moves if path == block_of(path)])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which only what is asked for is read."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not an adapter in safetensors ({first_line(e)}); save it as one") from None


def _is_ours(path: Path) -> bool:
    with _opened(path) as file:
        return MARK in (file.metadata() or {})
