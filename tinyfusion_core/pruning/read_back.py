"""Write the files of a network, and make sure that they are the network: read as a stranger would read them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..protocols.backbone import config_of, owner
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..runtime.locking import PARTIAL, check_held
from ..runtime.seeding import Rng
from .removal import same_but_for_rounding, tensors_in


def weights_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder that readers take for weights, whoever has put them there."""
    return sorted({path.name for kind in ("*.safetensors", "*.bin", "*.index.json") for path in folder.glob(kind)})


def write_checked(
    model: nn.Module, task: Task, folder: Path, write: Callable[[Path], Sequence[str]], ours: Sequence[str] = ()
) -> list[str]:
    """Write files of a network to a folder once it is known that they give the same network when they are read.

    They are written to a folder inside of it, read by the backbone's `load` and compared with the network: the weights,
    and what it predicts, bit for bit. Then they replace what is there, of which no other weights are left.

    Args:
        model: the network, on any device.
        task: its family and objective, and an example to predict.
        folder: where to; created if missing.
        write: writes the files to a folder that it is given, and returns their names.
        ours: files in `folder` that an earlier network of ours left there; those that are not written are removed.

    Returns:
        The names of the files.

    Raises:
        UserError: the files are not the network, or `folder` holds weights of another that is not ours.
    """
    with _staging(folder) as made:
        files = list(write(made))
        _check_alone(folder, {*files, *ours})
        check_read_back(model, task, made)
        check_held()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)  # it may be a folder inside
            (made / name).replace(folder / name)
        for name in {*ours} - {*files}:
            (folder / name).unlink(missing_ok=True)
    return files


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside of a folder; what a killed process has left of an earlier one is removed."""
    check_held()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".saving.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        made = tempfile.mkdtemp(dir=folder, prefix=".saving.", suffix=PARTIAL)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e}); choose another folder") from e
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_alone(folder: Path, files: set[str]) -> None:
    if found := [name for name in weights_in(folder) if name not in files]:
        raise UserError(
            f"{folder}: holds weights of another network ({', '.join(found[:3])}), which readers would mix with the "
            "new ones; remove them, or choose another folder"
        )


def check_read_back(model: nn.Module, task: Task, folder: Path) -> None:
    """Read a network from the files that its backbone wrote, and compare the two bit by bit.

    Weights and buffers of the state dict, with their names, shapes and dtypes; then the predictions for two samples.

    Raises:
        UserError: they differ.
    """
    backbone = task.backbone
    config = json.loads(json.dumps(config_of(backbone, model)))  # as the record gives it back
    try:
        with torch.random.fork_rng():
            again = type(backbone).load(folder, config)
        problem = _difference(model.state_dict(), again.state_dict()) or _prediction(model, again, task)
    except UserError as e:
        problem = str(e)
    if problem:
        raise UserError(
            f"{owner(backbone)}: what was saved of the network is not what is in memory: {problem}. Nothing was "
            "replaced; see the backbone's save, load, config and construct, and buffers that the state dict leaves out"
        )


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What differs between two state dicts; empty if nothing does."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key not in theirs or key not in ours:
            return f"{key} is {'missing' if key in ours else 'unexpected'} in what is read"
        a, b = ours[key], theirs[key]
        if not isinstance(a, Tensor):
            if a != b:
                return f"{key} is {a!r} in memory, {b!r} in what is read"
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{key} is {_kind(a)} in memory, {_kind(b)} in what is read"
        elif not _same(a.cpu(), b.cpu()):
            return f"{key} has other values in what is read"
    return ""


def _prediction(model: nn.Module, again: nn.Module, task: Task) -> str:
    """How the predictions of two networks differ whose weights are the same; empty if they do not."""
    # With the very same memory: matrix products may depend on where numbers lie. And no device needs to hold both.
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    device = next((t.device for t in model.state_dict().values() if isinstance(t, Tensor)), torch.device("cpu"))
    again.to(device)
    inputs = task.loss.prepare({k: t.to(device) for k, t in task.backbone.example(2).items()}, Rng(0, "read back"))

    def run(network: nn.Module) -> list[Tensor]:
        return tensors_in(task.loss.predict(network, inputs))

    with torch.random.fork_rng(), torch.no_grad(), evaluating(model, again):
        try:
            expected = run(model)
        except (RuntimeError, TypeError, ValueError, LookupError):
            return ""  # the backbone's examples are not what this network is run on, so nothing can be tried
        try:
            found = run(again)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
            return f"the network that is read fails ({type(e).__name__}: {e})"
        if _all_same(expected, found):
            return ""
        if not _all_same(expected, run(model)) and same_but_for_rounding(expected, found):
            return ""  # sums in no fixed order, on some devices: not even the network itself repeats its bits
    return "the network that is read has the same weights and predicts otherwise"


def _all_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
