"""Safe file access: atomic writes, and hashes. Without tensors it needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from ..errors import UserError, reason_behind
from ..parsing.records import check_regular
from .locking import PARTIAL, check_held

if TYPE_CHECKING:
    from torch import Tensor


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
        raise UserError(
            f"{path}: cannot be written ({reason_behind(e)}){kept}. Free space or choose another folder"
        ) from e
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
    import numpy as np

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
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    storages = set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        ready[name] = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())

    def write(file: BinaryIO) -> None:
        save_file(ready, file.name, metadata=dict(metadata or {}))

    write_atomic(path, write)


def check_space(folder: Path, size: int, what: str, remedy: str) -> None:
    """Check that a folder's disk has room for its safetensors files; those that are there already count as room.

    Args:
        folder: the folder, which exists.
        size: bytes of all files.
        what: begins the message: what takes how much.
        remedy: ends it.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if size > free + sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        raise UserError(f"{what}, and {folder.absolute()} has {free / 1e9:,.3g} GB; {remedy}")


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


def digest(value: Any) -> str:
    """Return the SHA-256, as hex, of any value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


NEUTRAL = "neutral"
"""Metadata key of a field that was added later: the value that means the behaviour before the field existed.

While the field has that value, the keys of cached results leave it out, so that earlier results stay valid. A class
that is no dataclass has a mapping of that name, from such arguments of its constructor to these values.
"""


FORMERLY = "formerly"
"""Metadata key of a field that was renamed: its name before, which recipes may still use."""


def named_now(cls: type[Any], options: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return options of a class, those under a former name by their name of now."""
    found = fields(cls) if is_dataclass(cls) else ()
    names = {field.metadata[FORMERLY]: field.name for field in found if FORMERLY in field.metadata}
    return {names.get(name, name): value for name, value in options.items()}


def without_later(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a class without those that were added later and mean what was before."""
    found = fields(cls) if is_dataclass(cls) else ()
    later = {**getattr(cls, NEUTRAL, {}), **{f.name: f.metadata[NEUTRAL] for f in found if NEUTRAL in f.metadata}}
    # A recipe has lists where a class's default is a tuple.
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {name: value for name, value in options.items() if name not in later or plain[name] != later[name]}
