"""Reads weights: state dicts in safetensors or torch files, which may hold anything."""

from __future__ import annotations

import argparse
import collections
import hashlib
import pathlib
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import MissingFileError, UserError, first_line, reason_behind
from .records import ShardIndex, check_regular, read_as
from .state_dicts import chosen_entry


def read_weights(path: Path, containers: Sequence[str] = ("ema", "model"), key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from safetensors, in one file or in several with an index, or from a torch file.

    Torch files are read with `weights_only=True`; data that training scripts keep beside the weights are allowed.

    Args:
        path: the file, or the index.
        containers: if the file holds a dict of state dicts, the entry to take: the first of these that exists.
        key: the entry to take instead; see `chosen_entry`.

    Returns:
        Tensors by name, of any shape, on the CPU.

    Raises:
        UserError: the file is missing, damaged, contains code, or holds no state dict.
    """
    content: Any = {}
    for file in weight_files(path):
        part = _content(file)
        content = {**content, **part} if isinstance(part, dict) else part
    return chosen_entry(content, containers, key, str(path))


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights of a file, or of the index of several.

    Raises:
        UserError: it is missing, or an index that is damaged or names files elsewhere.
    """
    check_regular(path)
    if path.suffix != ".json":
        return [path]
    index = read_as(path, ShardIndex, "copy or download it again")
    names = sorted(set(index["weight_map"].values()))
    if wrong := next((name for name in names if Path(name).name != name or name in ("", "..")), None):
        raise UserError(f"{path}: names the file {wrong!r}, which is not beside it")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise MissingFileError(
            f"{path.parent / missing[0]}: no such file, but {path.name} needs it; copy the whole folder"
        )
    return [path.parent / name for name in names]


def open_tensors(path: Path) -> Any:
    """Open a file of safetensors. Names, shapes and dtypes are read, and whether it is whole; no number is.

    Raises:
        UserError: it is missing or damaged.
    """
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: damaged or cut short ({first_line(e)}). Copy or download it again") from None


def _content(path: Path) -> Any:
    """What a file holds that has weights in it."""
    check_regular(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(_DATA), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old pickle protocols; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: refused, it is not a file of plain tensors; it may hold code, which would run while loading "
            f"({_refused(e)}). Ask its author for safetensors"
        ) from None
    except Exception as e:  # a damaged file makes the readers fail in any way they can
        raise UserError(f"{path}: damaged or cut short ({reason_behind(e)}). Copy or download it again") from None


def _mapping(*factory: Any) -> dict[Any, Any]:
    """What stands for a defaultdict, into which the reader puts nothing."""
    return collections.OrderedDict()


_SCALAR, _ARRAY = np.float32(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_DATA: list[Any] = [
    *(argparse.Namespace, list, dict, tuple, int, float, str, (_mapping, "collections.defaultdict")),
    *(pathlib.PosixPath, pathlib.PurePosixPath, (pathlib.PureWindowsPath, "pathlib.WindowsPath")),
    *(np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)),
    *(_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")),
    *(_ARRAY, (_ARRAY, "numpy.core.multiarray._reconstruct")),
]
"""Classes of training arguments that scripts keep beside the weights: data, not code."""


def load_strict(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict whose keys and shapes must match exactly.

    Args:
        model: the network.
        weights: tensors by name, each of the same shape as the model's.
        path: where they come from, for the message.

    Raises:
        UserError: names the first keys and shapes that differ.
    """
    own = model.state_dict()
    problems = [f"missing {k} {list(v.shape)}" for k, v in own.items() if k not in weights]
    problems += [f"unexpected {k} {list(v.shape)}" for k, v in weights.items() if k not in own]
    problems += [
        f"{k} is {list(weights[k].shape)}, expected {list(v.shape)}"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems and own.keys().isdisjoint(weights):
        theirs, ours = (sorted({name.partition(".")[0] for name in names})[:6] for names in (weights, own))
        raise UserError(
            f"{path}: none of its {len(weights)} names is one of {type(model).__name__}: they begin with "
            f"{', '.join(theirs) or 'nothing'}, not with {', '.join(ours)}. Of several networks in a file a key chooses"
        )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{path}: a checkpoint of another architecture than {type(model).__name__} as configured: "
            f"{'; '.join(problems[:4])}{more}"
        )
    model.load_state_dict(dict(weights), strict=True)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _refused(error: pickle.UnpicklingError) -> str:
    """What a torch file holds that is not read."""
    told = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", told)
    return found[1] if found else told.splitlines()[0][:200]
