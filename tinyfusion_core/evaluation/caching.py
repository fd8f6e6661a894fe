"""Sampling that reuses, for some of its steps, what blocks have added to their streams a few steps before.

The method is SmoothCache's (arXiv:2411.10510): some calibration samplings tell how much the change that a block makes
differs from one call to a later one. Where it differs by less than a threshold, the earlier change is added again and
the block is not run. The blocks of a list are decided upon together, by the mean of their errors, as the paper decides
for all layers of a kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError
from ..protocols.backbone import Backbone, Batch, owner
from ..protocols.blocks.call import Call, in_the_form_of, items_of, positional_names, version
from ..protocols.blocks.paths import block_lists
from ..protocols.blocks.streams import Stream, Streams, streams_of
from ..protocols.loss import LossAdapter, Prediction
from ..protocols.task import Task
from ..protocols.undisturbed import replaced_forward
from ..runtime.distributed import on_main_process
from ..runtime.seeding import Rng
from ..training.trainer import Trainer
from .generation import sample_rows, training_conditions

Schedule = Mapping[str, Sequence[bool]]
"""Of every block, whether each of its calls in one sampling is computed; those after the last one always are."""


@dataclass(frozen=True)
class Profile:
    """How much the changes that blocks make differ between the calls of one sampling.

    Attributes:
        blocks: paths of the blocks.
        errors: (num_blocks, calls, lags) the mean over the samples of the L1 norm of the difference between the change
            in this call and the one `lag + 1` calls before, relative to the former; infinite where the two cannot be
            compared, as there is no such call or it had other shapes.
    """

    blocks: Sequence[str]
    errors: Tensor

    def schedule(self, threshold: float) -> Schedule:
        """Return which calls are computed if an error below the threshold is accepted; with 0, all are."""
        plan: dict[str, Sequence[bool]] = {}
        for members in block_lists(self.blocks).values():
            computed, age = list[bool](), 0
            for errors in self.errors[members].mean(0).tolist():
                reuse = 0 < age <= len(errors) and errors[age - 1] < threshold
                computed.append(not reuse)
                age = age + 1 if reuse else 1
            plan |= {self.blocks[i]: computed for i in members}
        return plan


def computed_share(schedule: Schedule) -> float:
    """Return the share of the calls of blocks that a schedule computes."""
    calls = [computed for row in schedule.values() for computed in row]
    return sum(calls) / len(calls)


def profiled(task: Task, model: nn.Module, trainer: Trainer, num_samples: int, longest: int) -> Profile:
    """Sample with a network and compare the changes that its blocks make. A collective call; one process samples.

    Args:
        task: objective and data.
        model: the network, in eval mode on the trainer's device.
        trainer: device, precision and seed.
        num_samples: how many samples, of the conditions of the first training samples and with noise of their own.
        longest: how many calls in a row a change may be reused at most.

    Raises:
        UserError: the objective cannot generate, or runs each block no more than once.
    """
    return on_main_process(partial(_profile, task, model, trainer, num_samples, longest))


def _profile(task: Task, model: nn.Module, trainer: Trainer, num_samples: int, longest: int) -> Profile:
    blocks = task.backbone.block_paths(model)
    errors: dict[str, list[list[float]]] = {path: [] for path in blocks}
    before: dict[str, deque[_Added]] = {path: deque(maxlen=longest) for path in blocks}

    def observe(call: _BlockCall) -> Any:
        output = call.run()
        added = call.added_by(output)
        errors[call.path].append([_error(added, earlier) for earlier in reversed(before[call.path])])
        before[call.path].append(added)
        return output

    with answered(task.backbone, model, blocks, observe):
        rows = range(num_samples)
        sample_rows(task, model, trainer, rows, training_conditions(task, rows), stage="cache calibration")
    num_calls = max(map(len, errors.values()))
    if num_calls < 2:
        raise UserError(f"loss: {owner(task.loss)} {_ONCE}")
    found = torch.full((len(blocks), num_calls, longest), torch.inf)
    for i, path in enumerate(blocks):
        for number, row in enumerate(errors[path]):
            found[i, number, : len(row)] = torch.tensor(row)
    return Profile(blocks, found)


def check_repeats(task: Task) -> None:
    """Check that an objective runs blocks more than once for a sample, as far as the meta device can tell.

    Args:
        task: its network is on the meta device.

    Raises:
        UserError: it runs each block once.
    """
    seen: set[str] = set()

    def answer(call: _BlockCall) -> Any:
        if call.path in seen:
            raise _SeenAgain
        seen.add(call.path)
        return call.run()

    model = task.teacher.eval()
    try:
        rows = {name: column.to("meta") for name, column in task.train.__getitems__([0]).items()}
        with answered(task.backbone, model, task.backbone.block_paths(model), answer), torch.no_grad():
            task.loss.sample(model, rows["x"], rows[task.conditions], Rng(0, "plan"))
    except UserError:
        raise
    except Exception:  # it is, or code of somebody else's knows no such device: the sampling itself will tell
        return
    raise UserError(f"loss: {owner(task.loss)} {_ONCE}")


class _SeenAgain(Exception):
    """A block is called a second time."""


_ONCE = "runs each block once for a sample, so that there is nothing to reuse; sample in more steps, or without a cache"


class Reusing(LossAdapter):
    """An objective that samples by schedules. A row's sample depends on no other row, as it does without.

    Args:
        objective: what it is in all else.
        backbone: the model family.
        schedules: what each network computes.
    """

    def __init__(self, objective: LossAdapter, backbone: Backbone, schedules: Mapping[nn.Module, Schedule]) -> None:
        self.objective, self.backbone, self.schedules = objective, backbone, schedules

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        return self.objective.predict(model, inputs)

    @override
    def loss(self, prediction: Prediction, inputs: Batch) -> Tensor:
        return self.objective.loss(prediction, inputs)

    @override
    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Sample as the objective does, (batch, ...); with a schedule that computes every call, bit for bit."""
        # Blocks that reuse nothing are left alone.
        calls = {path: iter(computed) for path, computed in self.schedules[model].items() if not all(computed)}
        coming = {path: next(left) for path, left in calls.items()}
        kept: dict[str, tuple[Any, _Added]] = {}

        def answer(call: _BlockCall) -> Any:
            computed, coming[call.path] = coming[call.path], next(calls[call.path], True)
            if not computed:
                return call.again(*kept[call.path])
            output = call.run()
            if not coming[call.path]:
                kept[call.path] = call.form_of(output), call.added_by(output)
            return output

        with answered(self.backbone, model, list(calls), answer):
            return self.objective.sample(model, like, conditions, rng)


_Added = Mapping[int | str, Tensor]
"""What a call of a block adds to its streams, (batch, ...) each, by their place in its output."""


class _BlockCall:
    """A call of a block while somebody else answers it."""

    def __init__(self, path: str, call: Call, streams: Sequence[Stream]) -> None:
        self.path, self._call, self._streams = path, call, streams
        self._entered = {stream.item: call.stream(stream, path) for stream in streams}

    def run(self) -> Any:
        """Run the block."""
        versions = [*map(version, self._entered.values())]
        output = self._call.plain(*self._call.args, **self._call.kwargs)
        if versions != [*map(version, self._entered.values())]:
            raise UserError(f"block '{self.path}' changes its input in place, so that what it adds cannot be reused")
        return output

    def added_by(self, output: Any) -> _Added:
        """What an output of it adds to its streams."""
        items = self._items(output)
        return {i: items[i] - x for i, x in self._entered.items()}

    def form_of(self, output: Any) -> Any:
        """An output of it without the values of its streams."""
        items = self._items(output)
        empty = {i: items[i].new_empty(0, *items[i].shape[1:]) for i in self._entered}
        return in_the_form_of(output, {**items, **empty}, self._streams)

    def again(self, form: Any, added: _Added) -> Any:
        """The output that an earlier one, of this form, makes of the streams of now."""
        items = self._items(form)
        now = {i: (x + added[i]).to(items[i].dtype) for i, x in self._entered.items()}
        return in_the_form_of(form, {**items, **now}, self._streams)

    def _items(self, output: Any) -> dict[int | str, Any]:
        return items_of(output, self._streams) or {}


@contextmanager
def answered(
    backbone: Backbone, model: nn.Module, blocks: Sequence[str], answer: Callable[[_BlockCall], Any]
) -> Iterator[None]:
    """Have a function answer all calls of these blocks while the context is open."""
    with ExitStack() as stack:
        for path in blocks:
            block = model.get_submodule(path)
            stack.enter_context(replaced_forward(block, _forward(path, block.forward, backbone.streams, answer)))
        yield


def _forward(
    path: str, plain: Callable[..., Any], streams: Streams, answer: Callable[[_BlockCall], Any]
) -> Callable[..., Any]:
    names, own = positional_names(plain), streams_of(streams, path)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(_BlockCall(path, Call(plain, names, args, kwargs, lambda leaf: None), own))

    return forward


def _error(now: _Added, then: _Added) -> float:
    """The mean over the rows of the L1 norm of the difference, relative to that of now; infinite if shapes differ."""
    if any(x.shape != then[i].shape for i, x in now.items()):
        return torch.inf
    off, size = (
        torch.stack([part.float().abs().flatten(1).sum(1) for part in parts]).sum(0)
        for parts in ([x - then[i] for i, x in now.items()], now.values())
    )
    return float((off / size.clamp_min(torch.finfo(torch.float).tiny)).mean())
