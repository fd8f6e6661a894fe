"""Safe file access: reading untrusted files without running code, and atomic writes."""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import MissingFileError, UserError, first_line
from ..parsing.records import ShardIndex, check_regular, read_as
from ..parsing.state_dicts import chosen_entry
from .locking import PARTIAL, check_held


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, flush it to disk, then rename it: readers see the old file or the new one, never a part.

    A process that is killed half-way leaves a file that ends in `PARTIAL`; see `remove_partial`. Once a folder that
    this process has locked is gone, nothing is written.

    Args:
        path: the file to write; its folder is created.
        write: writes the content to the open binary file it is given.

    Raises:
        UserError: the folder is not writable or the disk is full; an existing file is untouched.
    """
    check_held()
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL, delete=False
        ) as file:
            temporary = Path(file.name)
            write(file)  # type: ignore[arg-type]  # a BinaryIO in all but name
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _flush_names(path.parent)
    except (OSError, RuntimeError, SafetensorError) as e:
        # torch and safetensors report a full disk as errors of their own.
        kept = "; the file that was there is intact" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({_reason(e)}){kept}. Free space or choose another folder") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """Make a rename outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def map_array(path: Path) -> Any:
    """Memory-map a .npy file of numbers; an .npz archive is returned as numpy reads it.

    Raises:
        UserError: the file is missing, truncated, or holds anything but numbers.
    """
    check_regular(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # a damaged header makes numpy fail in any way it can
        raise UserError(f"{path}: cut short, or not a .npy file of numbers ({e})") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: of any shape, by name. Tensors that share memory are written once for each name.
        metadata: text entries of the file's header.

    Raises:
        UserError: the file cannot be written.
    """
    ready: dict[str, Tensor] = {}
    storages = set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        ready[name] = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())

    def write(file: BinaryIO) -> None:
        save_file(ready, file.name, metadata=dict(metadata or {}))

    write_atomic(path, write)


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
        raise UserError(f"{path}: damaged or cut short ({_reason(e)}). Copy or download it again") from None


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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex; cached while its size and modification time stay the same.

    Raises:
        UserError: it is missing, or no file.
    """
    check_regular(path)
    status = path.stat()
    return _sha256(path, status.st_mtime_ns, status.st_size)


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: BaseException) -> str:
    """The first line of an error, or of the operating system error behind it."""
    behind = error.__cause__ or error.__context__
    if isinstance(behind, OSError) and not isinstance(error, OSError):
        return _reason(behind)
    return first_line(error)


def _refused(error: pickle.UnpicklingError) -> str:
    """What a torch file holds that is not read."""
    told = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", told)
    return found[1] if found else told.splitlines()[0][:200]


def digest(value: Any) -> str:
    """Return the SHA-256, as hex, of any value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


NEUTRAL = "neutral"
"""Metadata key of a field that was added later: the value that means the behaviour before the field existed.

While the field has that value, the keys of cached results leave it out, so that earlier results stay valid. A class
that is no dataclass has a mapping of that name, from such arguments of its constructor to these values.
"""


def without_later(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a class without those that were added later and mean what was before."""
    found = fields(cls) if is_dataclass(cls) else ()
    later = {**getattr(cls, NEUTRAL, {}), **{f.name: f.metadata[NEUTRAL] for f in found if NEUTRAL in f.metadata}}
    return {name: value for name, value in options.items() if name not in later or value != later[name]}
