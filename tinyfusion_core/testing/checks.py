"""What a backbone and a loss must hold to, so that everything here works with them: `CHECKS`, functions of a `Subject`.

They raise AssertionError, or the UserError that a user would see. `tinyfusion_core.testing` runs them.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..protocols.backbone import FIRST, Backbone, Streams, block_lists
from ..protocols.block_call import entering, watched_streams
from ..protocols.data import Tensors
from ..protocols.loss import LossAdapter, Prediction
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.gating import Gates
from ..pruning.prune import load_pretrained, remove_blocks, save_network
from ..runtime.seeding import Rng, generator
from ..training.distillation import captured, derive_taps

T = TypeVar("T")

Pair = tuple[type[Backbone] | Backbone, type[LossAdapter] | LossAdapter]
"""A backbone and a loss that fit each other. Of a class, its `tiny()` instance is checked."""

NUM_ROWS = 5
ROUNDINGS = 32
"""Units of rounding, of the largest number that went into a result, that are no difference between two results."""

HEAVY = frozenset(
    [
        *("accelerate", "cv2", "datasets", "diffusers", "jax", "lm_eval", "matplotlib", "pandas", "peft", "scipy"),
        *("sklearn", "tensorflow", "timm", "torch_fidelity", "torchvision", "transformers"),
    ]
)
"""Libraries that importing a plugin must not pull in: they belong inside its methods."""


@dataclass(frozen=True)
class Subject:
    """What a check looks at.

    Args:
        backbone: an instance whose network runs in milliseconds.
        loss: an instance that fits it.
        wide: networks and prepared inputs are cast to float64.
    """

    backbone: Backbone
    loss: LossAdapter
    wide: bool = False

    @classmethod
    def of(cls, pair: Pair) -> Subject:
        """Classes stand for their tiny instances."""
        backbone, loss = pair
        return cls(
            backbone if isinstance(backbone, Backbone) else backbone.tiny(),
            loss if isinstance(loss, LossAdapter) else loss.tiny(),
        )

    def batch(self) -> dict[str, Tensor]:
        """The backbone's example; where a tensor of numbers is all zeros, random ones in its place."""
        batch = self.backbone.example(NUM_ROWS)
        rng = generator("conformance", "batch")
        return {
            name: torch.randn(t.shape, generator=rng).to(t) if t.is_floating_point() and not t.any() else t
            for name, t in batch.items()
        }

    def inputs(self) -> dict[str, Tensor]:
        """Prepared inputs."""
        inputs = self.loss.prepare(self.batch(), _rng())
        return {name: t.double() if self.wide and t.is_floating_point() else t for name, t in inputs.items()}

    def gates(self, model: nn.Module) -> Gates:
        """Gates for all blocks of a network; a new one is probed, which is not cast."""
        batch = self.batch()
        task = Task(backbone=self.backbone, loss=self.loss, train=Tensors(batch), held_out=Tensors(batch))
        return Gates(model, task.blocks, task.batch_dim(task.teacher), self.backbone.streams)

    def network(self) -> nn.Module:
        """The whole network."""
        model = self.backbone.build()
        return model.double() if self.wide else model

    def pruned(self, removed: Sequence[int]) -> nn.Module:
        """The network without these blocks."""
        model = self.network()
        blocks = self.backbone.block_paths(model)
        remove_blocks(self.backbone, model, [blocks[i] for i in removed])
        return model.eval()

    def every_other(self) -> list[int]:
        """Indices of blocks that can all be removed together: every second one, the first stays."""
        return list(range(1, len(self.backbone.block_paths(self.backbone.build())), 2))


Check = Callable[[Subject], None]


def check_tiny(subject: Subject) -> None:
    """`tiny` is in eval mode and always the same, no parameter is all zeros; `example` gives the rows asked for."""
    model, again = subject.backbone.build(), subject.backbone.build()
    name = type(subject.backbone).__name__
    _hold(not model.training, f"{name}.build returns a network in training mode; end it with model.eval()")
    _same(model.state_dict(), again.state_dict(), f"{name}.build gives other weights each time; seed its generator")
    zeros = [key for key, p in model.named_parameters() if not p.any()]
    _hold(not zeros, f"{name}.tiny: {zeros[:3]} is all zeros, which hides mistakes; draw every weight at random")
    for num in (1, NUM_ROWS):
        for key, t in subject.backbone.example(num).items():
            _hold(len(t) == num, f"{name}.example({num}): '{key}' has {len(t)} rows")


def check_blocks(subject: Subject) -> None:
    """Blocks exist, are children of lists, each named once, none inside another, in the order in which they run."""
    model = subject.backbone.build()
    blocks, name = subject.backbone.block_paths(model), f"{type(subject.backbone).__name__}.blocks"
    _hold(len(blocks) >= 2, f"{name} names {len(blocks)} block(s) of the tiny network; it needs 2 or more")
    for path in blocks:
        parent = model.get_submodule(path.rpartition(".")[0])
        _hold(
            isinstance(parent, (nn.ModuleList, nn.Sequential)),
            f"{name}: '{path}' is a child of a {type(parent).__name__}; blocks live in a ModuleList or Sequential",
        )
    ran: list[str] = []
    with _hooks(
        model.get_submodule(path).register_forward_pre_hook(lambda _m, _args, path=path: ran.append(path))
        for path in blocks
    ):
        _no_grad_losses(subject, model)
    _hold(ran == blocks, f"{name} gives {blocks}, but they run as {ran}; name each once, in the order of execution")


def check_streams(subject: Subject) -> None:
    """Every block gives its streams back in the shape and dtype in which they came."""
    model = subject.backbone.build()

    with watched_streams(model, subject.backbone.block_paths(model), subject.backbone.streams) as seen:
        _no_grad_losses(subject, model)
    for passage in seen:
        _hold(passage.before == passage.after, str(passage))


def check_all_ones_is_plain(subject: Subject) -> None:
    """Gated with a mask of ones the network gives what it gives without gates, bit for bit."""
    model, inputs = subject.backbone.build(), subject.inputs()
    plain = subject.loss.losses(model, inputs)
    with subject.gates(model) as gates:
        for learning in (False, True):
            gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_(learning)
            gated = subject.loss.losses(model, inputs)
            _hold(
                torch.equal(gated, plain), f"losses are {gated.tolist()} under a mask of ones, {plain.tolist()} without"
            )


def check_hard_gated_is_pruned(subject: Subject) -> None:
    """Skipping blocks by a mask gives what removing them and `after_prune` give: each alone, and every second one."""
    model, inputs = subject.backbone.build(), subject.inputs()
    lists = block_lists(subject.backbone.block_paths(model)).values()
    alone = [[i] for members in lists if len(members) > 1 for i in members]
    for removed in [*alone, subject.every_other()]:
        with subject.gates(model) as gates, torch.no_grad():
            mask = torch.ones(NUM_ROWS, len(gates.blocks))
            mask[:, removed] = 0
            gates.mask = mask
            gated = subject.loss.predict(model, inputs)
        with torch.no_grad():
            pruned = subject.loss.predict(subject.pruned(removed), inputs)
        message = f"the network without blocks {removed} predicts otherwise than one that skips them"
        for a, b in zip(_tensors(gated), _tensors(pruned), strict=True):
            _close(a, b, 1e-5, message, size=_largest(b))


def check_state_dict_untouched(subject: Subject) -> None:
    """Gates change no key and no value of the state dict, while they are open and after an exception."""
    model, inputs = subject.backbone.build(), subject.inputs()
    before = copy.deepcopy(model.state_dict())
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    try:
        with subject.gates(model) as gates:
            gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_()
            subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
            _same(before, model.state_dict(), "a gated forward pass changes the state dict")
            raise _Stop
    except _Stop:
        pass
    _same(before, model.state_dict(), "gating changes the state dict")
    left = [name for name, m in model.named_modules() if m.__dict__.get("forward") is not forwards[name]]
    _hold(not left, f"gating leaves its forward on {left[:3]}")


def check_nobody_keeps_a_block(subject: Subject) -> None:
    """Blocks that no sample keeps, or that all keep, run; the ones that nobody keeps get zero gradients, not none."""
    model, inputs = subject.backbone.build(), subject.inputs()
    subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    for j, path in enumerate(subject.backbone.block_paths(model)):
        own = _own_parameters(model, path)
        for learning in (True, False):
            mask = _random_mask(len(subject.backbone.block_paths(model)))
            mask[:, j - 1], mask[:, j] = 1, 0
            model.zero_grad(set_to_none=True)
            with subject.gates(model) as gates:
                gates.mask = mask.requires_grad_(learning)
                losses = subject.loss.losses(model, inputs)
                _hold(bool(losses.isfinite().all()), f"losses are not finite when nobody keeps '{path}'")
                losses.sum().backward()  # type: ignore[no-untyped-call]
            grads = [p.grad for p in own if id(p) in trained]
            _hold(
                all(g is not None and not g.any() for g in grads),
                f"block '{path}', which nobody keeps, has a gradient that is none or not zero",
            )


def check_every_block_learns(subject: Subject) -> None:
    """The loss has a gradient to weights of every block, and to the gate of every block."""
    model, inputs = subject.backbone.build(), subject.inputs()
    with subject.gates(model) as gates:
        gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_()
        subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
        of_gates = gates.mask.grad
    assert of_gates is not None
    for j, path in enumerate(subject.backbone.block_paths(model)):
        grads = [p.grad for p in model.get_submodule(path).parameters() if p.grad is not None]
        _hold(any(bool(g.any()) for g in grads), f"the loss gives no weight of block '{path}' a gradient")
        _hold(bool(of_gates[:, j].any()), f"the loss does not depend on whether block '{path}' is kept")


def check_sparse_is_dense(subject: Subject) -> None:
    """Losses, weight and gate gradients are those of the dense formula `m * f(x) + (1 - m) * x`."""
    losses, gradients = zip(*_precisely(subject, _sparse_and_dense), strict=True)
    message = "gated losses are not those of the dense formula; see Backbone.streams"
    sparse, dense = losses
    _close(sparse, dense, 1e-5, message, size=_largest(dense))
    size = max(_largest(expected) for expected in gradients[1])
    for found, expected in zip(*gradients, strict=True):
        _close(found, expected, 1e-4, "gradients are not those of the dense formula", size=size)


def check_loss_per_sample(subject: Subject) -> None:
    """`loss` and `distance` are (B,) finite numbers, each of its own sample alone, whatever the order of the batch."""
    name = type(subject.loss).__name__
    for key, t in subject.inputs().items():
        _hold(len(t) == NUM_ROWS, f"{name}.prepare: '{key}' has {len(t)} rows for a batch of {NUM_ROWS}")
    order = torch.tensor([3, 0, 4, 2, 1])
    whole, permuted, part = _precisely(
        subject, lambda it: _loss_and_distance(it, [torch.arange(NUM_ROWS), order, order[:2]])
    )
    for method, found in whole.items():
        where = f"{name}.{method}"
        _hold(
            found.shape == (NUM_ROWS,),
            f"{where} returns the shape {tuple(found.shape)} for {NUM_ROWS} samples; return one number for each: "
            f"({NUM_ROWS},), the mean over everything but the batch",
        )
        _hold(bool(found.isfinite().all()), f"{where} is not finite: {found.tolist()}")
    size = max(map(_largest, whole.values()))  # a distance is the difference of such numbers
    for method, found in whole.items():
        where = f"{name}.{method}"
        _close(permuted[method], found[order], 1e-4, f"{where} changes when the samples change places", size)
        _close(part[method], found[order[:2]], 1e-4, f"{where} of a sample depends on the others of its batch", size)


def check_prepare(subject: Subject) -> None:
    """`prepare` is a function of its arguments, row by row: it leaves global generators and the batch alone."""
    batch, name = subject.batch(), f"{type(subject.loss).__name__}.prepare"
    before = copy.deepcopy(batch)
    _seed_everything(1)
    states = _global_states()
    first = subject.loss.prepare(batch, _rng())
    _hold(states == _global_states(), f"{name} draws from a global generator; draw from `rng`")
    _same(before, batch, f"{name} changes the batch it was given")
    _seed_everything(2)
    _same(first, subject.loss.prepare(batch, _rng()), f"{name} gives something else the second time; draw from `rng`")
    parts = [
        subject.loss.prepare({key: t[rows] for key, t in batch.items()}, _rng(first=rows.start))
        for rows in (slice(0, 2), slice(2, NUM_ROWS))
    ]
    for key, expected in first.items():
        joined = torch.cat([part[key] for part in parts])
        message = f"{name} gives a row something else in another batch: '{key}'; draw by row, as `rng.normal` does"
        _close(joined, expected, 1e-5, message, size=_largest(expected))


def check_same_inputs(subject: Subject) -> None:
    """Teacher and student are run on the same inputs: `predict` draws nothing and changes nothing that it is given."""
    teacher, student = subject.backbone.build(), subject.pruned(subject.every_other())
    inputs, name = subject.inputs(), f"{type(subject.loss).__name__}.predict"
    before = copy.deepcopy(inputs)
    path = subject.backbone.block_paths(teacher)[0]  # which both have, with nothing removed before it

    def entering(model: nn.Module, seed: int) -> list[Tensor]:
        _seed_everything(seed)
        seen: list[Tensor] = []
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: seen.extend(t.clone() for t in _tensors((args, kwargs))), with_kwargs=True
        )
        with _hooks([hook]), torch.no_grad():
            prediction = subject.loss.predict(model, inputs)
            subject.loss.loss(prediction, inputs)
        return seen

    pairs = zip(entering(teacher, 1), entering(student, 2), strict=True)
    _same(before, inputs, f"{name} or loss changes its inputs in place")
    _hold(
        all(torch.equal(t, s) for t, s in pairs),
        f"{name} gives teacher and student different inputs; draw everything random in prepare",
    )


def check_predict_deterministic(subject: Subject) -> None:
    """In eval mode `predict` gives the same twice, whatever the global generators, and changes no buffer."""
    model, inputs = subject.backbone.build(), subject.inputs()
    before = copy.deepcopy(model.state_dict())
    predictions = []
    for seed in (1, 2):
        _seed_everything(seed)
        with torch.no_grad():
            predictions.append(_tensors(subject.loss.predict(model, inputs)))
    _hold(
        all(torch.equal(a, b) for a, b in zip(*predictions, strict=True)),
        "the network in eval mode predicts something else the second time; is a dropout always on?",
    )
    _same(before, model.state_dict(), "predicting changes the network's state")


def check_save_and_load(subject: Subject) -> None:
    """A pruned network that is saved and loaded again predicts the same, bit for bit."""
    student, inputs = subject.pruned(subject.every_other()), subject.inputs()
    with tempfile.TemporaryDirectory() as folder:
        save_network(student, subject.backbone, subject.backbone.source(), Path(folder))
        again = load_pretrained(folder, type(subject.backbone))
    with torch.no_grad():
        pairs = zip(*(_tensors(subject.loss.predict(m, inputs)) for m in (student, again)), strict=True)
    _hold(
        all(torch.equal(a, b) for a, b in pairs),
        f"what is loaded predicts otherwise than what was saved; see {type(subject.backbone).__name__}.config and "
        "construct, and buffers that the state dict leaves out",
    )


def check_meta_device(subject: Subject) -> None:
    """`construct` rebuilds full and pruned networks from `config` on the meta device, as plans need it."""
    name = type(subject.backbone).__name__
    for model in (subject.backbone.build(), subject.pruned(subject.every_other())):
        with torch.device("meta"):
            planned = subject.backbone.construct(subject.backbone.config(model))
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, planned)]
        differ = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        _hold(not differ, f"{name}.construct(config) makes another network: {differ[:3]}; see config and after_prune")
        real = [k for k, p in planned.named_parameters() if not p.is_meta]
        _hold(not real, f"{name}.construct: {real[:3]} is not on the meta device")


def check_taps(subject: Subject) -> None:
    """The outputs of matched blocks of teacher and student can be had, and have the same shapes."""
    teacher, removed = subject.backbone.build(), subject.every_other()
    blocks, student, inputs = subject.backbone.block_paths(teacher), subject.pruned(removed), subject.inputs()
    kept = tuple(i for i in range(len(blocks)) if i not in removed)
    taps = derive_taps(Decision(blocks=tuple(blocks), kept=kept, method="Keep"))
    ours = subject.backbone.block_paths(student)
    with torch.no_grad(), captured(student, [ours[s] for s, _ in taps], subject.backbone.streams) as found:
        subject.loss.predict(student, inputs)
    with torch.no_grad(), captured(teacher, [blocks[t] for _, t in taps], subject.backbone.streams) as expected:
        subject.loss.predict(teacher, inputs)
    for (ours_at, theirs_at), a, b in zip(taps, found, expected, strict=True):
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (a, b)]
        _hold(
            shapes[0] == shapes[1] and bool(shapes[0]),
            f"block {ours_at} of the student gives {shapes[0]}, block {theirs_at} of the teacher {shapes[1]}",
        )


def check_light_import(subject: Subject) -> None:
    """Importing the plugin pulls in no heavy library besides torch."""
    classes = {cls.__module__: inspect.getfile(cls) for cls in (type(subject.backbone), type(subject.loss))}
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import importlib, runpy\n"
        f"for name, file in {classes!r}.items():\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as e:\n"
        "        if e.name != name: raise\n"
        "        runpy.run_path(file)\n"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    names = ", ".join(classes)
    _hold(done.returncode == 0, f"{names}: cannot be imported in a new process: {done.stderr.strip()[-500:]}")
    heavy = done.stdout.strip()
    _hold(not heavy, f"importing {names} imports {heavy}; do that inside of the methods that need it")


def check_copies(subject: Subject) -> None:
    """Backbone and loss are frozen dataclasses that can be copied and pickled; `config` survives JSON."""
    for thing in (subject.backbone, subject.loss):
        name = type(thing).__name__
        frozen = is_dataclass(thing) and thing.__dataclass_params__.frozen
        _hold(frozen, f"{name} is no frozen dataclass, whose fields would be its options")
        for how, again in (("deepcopy", copy.deepcopy(thing)), ("pickle", pickle.loads(pickle.dumps(thing)))):
            _hold(again == thing, f"{name} is something else after {how}")
            own = [f.name for f in fields(thing) if f.compare]  # type: ignore[arg-type]
            _hold(all(getattr(again, k) == getattr(thing, k) for k in own), f"{name} loses options by {how}")
    config = subject.backbone.config()
    again = json.loads(json.dumps(config, allow_nan=False))
    _hold(again == copy.deepcopy(config), f"{type(subject.backbone).__name__}.config comes back otherwise from JSON")


CHECKS: tuple[Check, ...] = (
    check_tiny,
    check_blocks,
    check_streams,
    check_all_ones_is_plain,
    check_hard_gated_is_pruned,
    check_state_dict_untouched,
    check_nobody_keeps_a_block,
    check_every_block_learns,
    check_sparse_is_dense,
    check_loss_per_sample,
    check_prepare,
    check_same_inputs,
    check_predict_deterministic,
    check_save_and_load,
    check_meta_device,
    check_taps,
    check_light_import,
    check_copies,
)


@contextmanager
def dense_formula(model: nn.Module, blocks: Sequence[str], mask: Tensor, streams: Streams = FIRST) -> Iterator[None]:
    """Gate by the published formula: every block computed for every sample, `m * f(x) + (1 - m) * x`.

    What `Gates` must agree with, and what its cost is compared with.

    Args:
        model: the network.
        blocks: paths of the N blocks.
        mask: (B, N) of any numbers.
        streams: the blocks' residual streams.
    """

    def mix(j: int, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        items = [output] if isinstance(output, Tensor) else list(output)
        for stream, before in entering(block, args, kwargs, streams, path):
            m = mask[:, j].view(-1, *[1] * (before.ndim - 1))
            i = stream.output or 0
            items[i] = items[i] * m + before * (1 - m)
        if isinstance(output, Tensor):
            return items[0]
        return type(output)._make(items) if hasattr(output, "_make") else type(output)(items)

    with _hooks(
        model.get_submodule(path).register_forward_hook(partial(mix, j, path), with_kwargs=True)
        for j, path in enumerate(blocks)
    ):
        yield


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    """Take these hooks away again."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _precisely(subject: Subject, run: Callable[[Subject], T]) -> T:
    """What `run` finds in float64, where rounding decides nothing; as things are when they cannot be run in it."""
    with suppress(Exception):  # whatever a stranger's class raises; it raises it again if float64 is not the reason
        return run(replace(subject, wide=True))
    return run(subject)


def _sparse_and_dense(subject: Subject) -> list[tuple[Tensor, list[Tensor]]]:
    """(B,) losses with the gradients of mask and weights, of gates and of the dense formula."""
    model, inputs = subject.network(), subject.inputs()
    blocks = subject.backbone.block_paths(model)
    mask = _random_mask(len(blocks)).to(torch.float64 if subject.wide else torch.float32).requires_grad_()
    wanted = [mask, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, list[Tensor]]:
        losses = subject.loss.losses(model, inputs)
        found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        return losses.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]

    with dense_formula(model, blocks, mask, subject.backbone.streams):
        dense = run()
    with subject.gates(model) as gates:
        gates.mask = mask
        return [run(), dense]


@torch.no_grad()
def _loss_and_distance(subject: Subject, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """For each selection of the rows: the losses of the network and of a pruned one, and their distances."""
    teacher, student, inputs = subject.network(), subject.pruned(subject.every_other()), subject.inputs()
    found = []
    for rows in batches:
        some = {key: t[rows] for key, t in inputs.items()}
        theirs, ours = subject.loss.predict(teacher, some), subject.loss.predict(student, some)
        numbers = {"loss": subject.loss.loss(theirs, some), "loss of a pruned network": subject.loss.loss(ours, some)}
        with suppress(UserError):  # an objective that cannot distil says so
            numbers["distance"] = subject.loss.distance(ours, theirs, some)
        found.append(numbers)
    return found


def _no_grad_losses(subject: Subject, model: nn.Module) -> None:
    with torch.no_grad():
        subject.loss.losses(model, subject.inputs())


class _Stop(Exception):
    """Ours, to leave a context by an exception."""


def _own_parameters(model: nn.Module, path: str) -> list[nn.Parameter]:
    """The parameters that a block shares with nobody."""
    shared = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(f"{path}.")}
    return [p for p in model.get_submodule(path).parameters() if id(p) not in shared]


def _tensors(tree: Prediction) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _random_mask(num_blocks: int) -> Tensor:
    return (torch.rand(NUM_ROWS, num_blocks, generator=generator("conformance", "mask")) < 0.5).float()


def _rng(first: int = 0) -> Rng:
    return Rng(0, "conformance", step=3, first=first)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _global_states() -> tuple[bytes, bytes, object]:
    return bytes(torch.get_rng_state().tolist()), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index]


def _hold(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], message: str) -> None:
    _hold(list(before) == list(after), f"{message}: {sorted(set(before) ^ set(after))[:3]}")
    differ = [k for k, t in before.items() if t.shape != after[k].shape or not torch.equal(t, after[k])]
    _hold(not differ, f"{message}: {differ[:3]}")


def _largest(x: Tensor) -> float:
    """The largest of the finite numbers, without sign."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _close(found: Tensor, expected: Tensor, tolerance: float, message: str, size: float) -> None:
    """Equal up to a share of the largest value, and to the rounding of the numbers that went into it.

    Args:
        found: a tensor of any shape; one of whole numbers must be equal.
        expected: of the same shape.
        tolerance: the share.
        message: what is wrong otherwise.
        size: the largest number that was added or subtracted on the way; beyond the values when they cancel.
    """
    _hold(found.shape == expected.shape, f"{message}: {tuple(found.shape)} and {tuple(expected.shape)}")
    if torch.equal(found, expected):
        return
    _hold(found.is_floating_point(), message)
    error, scale = float((found - expected)[found != expected].abs().max()), _largest(expected)
    rounding = ROUNDINGS * torch.finfo(found.dtype).eps * size
    _hold(error <= tolerance * scale + rounding, f"{message} (off by {error:.2g} of {scale:.2g})")
