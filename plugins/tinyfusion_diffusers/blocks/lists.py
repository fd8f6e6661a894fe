"""Which blocks of a transformer of diffusers its config can do without: found by building it with fewer.

Networks are built on the meta device, without weights. What counts is that the config of the shorter network builds
what is left: modules of the same classes, with the same parameters and options, at the same places.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import first_line

PLAIN = (bool, int, float, str, tuple, type(None))
"""Types of the options of a module."""
Build = Callable[[Mapping[str, Any]], nn.Module]
"""Builds the network of a config."""


@dataclass(frozen=True)
class BlockList:
    """A list of modules, and which of them can go.

    Attributes:
        key: entry of the config that says its length; empty if there is none.
        free: indices of those that can go.
        why: why others cannot.
    """

    key: str
    free: tuple[int, ...]
    why: str


def module_lists(model: nn.Module) -> dict[str, Any]:
    """Return the lists of modules that a network holds itself, by name, in the order in which it declares them."""
    return {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList) and len(child)}


def block_lists(build: Build, config: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, BlockList]:
    """Return the lists of a network by path, and which single blocks can go.

    Args:
        build: builds the network of a config.
        config: JSON-able config of the whole network.
        names: paths of the lists to look at; by default those that the network holds itself.
    """
    return dict(_block_lists(build, json.dumps(config), tuple(names)))


@lru_cache(maxsize=64)
def _block_lists(build: Build, config_json: str, names: tuple[str, ...]) -> dict[str, BlockList]:
    config = json.loads(config_json)
    model = _on_meta(build, config)
    return {path: _examined(build, config, model, path) for path in names or module_lists(model)}


def _examined(build: Build, config: Mapping[str, Any], model: nn.Module, path: str) -> BlockList:
    """Which blocks of a list can go: by the first entry of the config with which any can."""
    blocks: Any = model.get_submodule(path)
    runs, whys = list(_runs(blocks, config)), []
    for key in _keys(config, len(blocks)):
        faults = [_fault(build, config, model, path, key, run[0]) for run in runs]
        whys.append(next(filter(None, faults), ""))
        if free := [i for run, fault in zip(runs, faults, strict=True) if not fault for i in run]:
            return BlockList(key, tuple(free), whys[-1])
    return BlockList("", (), next(iter(whys), f"no entry of the config is {len(blocks)}"))


def shortened(
    config: Mapping[str, Any], kept: Mapping[str, Sequence[int]], keys: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of the network with these blocks only, and which entries of it are new.

    Args:
        config: config of the whole network.
        kept: for every list, indices of the blocks that stay.
        keys: for every list, the entry that says its length.
    """
    edits: dict[str, Any] = {}
    for path, indices in kept.items():
        length, edits[keys[path]] = config[keys[path]], len(indices)
        for name, value in config.items():
            # Layers named by their index, such as SD3.5's dual_attention_layers.
            if _are_indices(name, value, length):
                edits[name] = type(value)(j for j, i in enumerate(indices) if i in value)
            # Kinds of layers, such as layer_types of ACE-Step.
            elif isinstance(value, (list, tuple)) and len(value) == length and all(isinstance(v, str) for v in value):
                edits[name] = type(value)(value[i] for i in indices)
    return {**config, **edits}, edits


def _are_indices(name: str, value: Any, length: int) -> bool:
    return (
        name.endswith("_layers")
        and isinstance(value, (list, tuple))
        and all(isinstance(i, int) and 0 <= i < length for i in value)
    )


def _keys(config: Mapping[str, Any], length: int) -> list[str]:
    """The entries of a config that may say a length; those first whose name speaks of layers."""
    found = [key for key, value in config.items() if type(value) is int and value == length]
    return sorted(found, key=lambda key: not any(word in key for word in ("layers", "blocks", "depth")))


def _runs(blocks: Any, config: Mapping[str, Any]) -> Iterator[list[int]]:
    """The indices of blocks, those together that stand side by side and are alike: one of them can go if any can."""
    length = len(blocks)
    named = [set(value) for name, value in config.items() if _are_indices(name, value, length)]

    def like(i: int) -> Any:
        return _described(blocks[i]), [i in some for some in named]

    for _, run in groupby(range(length), like):
        yield list(run)


def _fault(build: Build, config: Mapping[str, Any], model: nn.Module, path: str, key: str, index: int) -> str:
    """Why the network without a block is not the one that a config builds; empty if it is."""
    rest = [i for i in range(config[key]) if i != index]
    fewer, _ = shortened(config, {path: rest}, {path: key})
    try:
        fresh = _on_meta(build, fewer)
    except Exception as e:  # of any network's constructor
        return f"with {key} {fewer[key]} it says: {first_line(e)}"
    blocks: Any = model.get_submodule(path)
    block = blocks.pop(index)
    different = _differences(model, fresh)
    blocks.insert(index, block)
    elsewhere = [name for name in different if not name.startswith(f"{path}.")]
    return _why(model, fresh, (elsewhere or different)[0], f"{key} {fewer[key]}") if different else ""


def _why(model: nn.Module, fresh: nn.Module, name: str, told: str) -> str:
    """Why a network is not the one that a config with fewer blocks builds, which has something else by this name."""
    of, _, tensor = name.rpartition(".")
    ours, theirs = module_lists(model), module_lists(fresh)
    if (other := name.partition(".")[0]) in ours and len(ours[other]) != len(theirs.get(other, ())):
        return f"with {told} '{other}' is shorter too"
    holder = dict(model.named_modules()).get(of)
    lost = holder is not None and tensor in holder._non_persistent_buffers_set
    return f"with {told} it builds another '{name}'{', which is saved in no file' if lost else ''}"


def _differences(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of modules and tensors that two networks do not have alike, in alphabetical order."""
    one, other = _described(a), _described(b)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _on_meta(build: Build, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def _described(model: nn.Module) -> dict[str, Any]:
    """Classes, options and shapes of all that is in a network, by name."""
    described: dict[str, Any] = {}
    for name, module in model.named_modules():
        # The network itself may say how many blocks it has; what a module keeps and never looks at is no difference.
        used = _used(type(module).__module__) if name else frozenset()
        options = {k: v for k, v in vars(module).items() if k in used and isinstance(v, PLAIN)}
        described[f"{name}()"] = type(module), options
        tensors = {**module._parameters, **module._buffers}
        described |= {f"{name}.{key}": None if t is None else tuple(t.shape) for key, t in tensors.items()}
    return described


@cache
def _used(module: str) -> frozenset[str]:
    """The attributes that the source of a module reads, of any object; none if there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return frozenset()
    read = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return frozenset(node.attr for node in read)
