"""Remove blocks from a network, and make sure that the rest does what it did when they were skipped."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..protocols.backbone import Backbone
from ..protocols.blocks.branches import Branch, remove_branches
from ..protocols.blocks.paths import block_lists, block_of
from ..protocols.loss import Prediction
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..runtime.seeding import Rng
from .decision import Decision
from .gating import Gates


def remove_blocks(backbone: Backbone, model: nn.Module, removed: Collection[str]) -> None:
    """Remove blocks, or branches inside them, from a network in place and let the backbone repair the rest.

    A block that loses its last branch goes as a whole.

    Args:
        backbone: the model family.
        model: the network.
        removed: paths of the blocks to remove, children of a `ModuleList` or `Sequential`; or of branches.

    Raises:
        UserError: the parent of a block is something else.
    """
    whole, branches = _sorted_out(backbone, model, removed)
    remove_branches(model, branches)  # first: with the blocks go the paths
    kept: dict[str, list[int]] = {}
    for path in block_lists(backbone.block_paths(model)):
        container = model.get_submodule(path)
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            raise UserError(f"'{path or 'the network itself'}' is a {type(container).__name__}; blocks live in lists")
        going = [i for i, name in enumerate(dict(container.named_children())) if f"{path}.{name}" in whole]
        # Children that are no blocks stay where they are.
        kept[path] = [i for i in range(len(container)) if i not in going]
        for i in reversed(going):
            del container[i]
    backbone.after_prune(model, kept)


def _sorted_out(backbone: Backbone, model: nn.Module, removed: Collection[str]) -> tuple[set[str], dict[str, Branch]]:
    """The blocks that go as a whole, and the branches of others that go, by path."""
    if not backbone.units:
        return set(removed), {}
    whole: set[str] = set()
    branches: dict[str, Branch] = {}
    known = {branch.path for branch in backbone.branches(model).values()}
    for block in backbone.block_paths(model):
        inside = backbone.branches_in(model, block)
        going = {path: branch for path, branch in inside.items() if path in removed}
        # A block that never had some of them may do something else in their place.
        if going and going == inside and known <= {path for path, _ in model.get_submodule(block).named_modules()}:
            whole.add(block)
        else:
            branches |= going
    return whole, branches


def in_blocks(backbone: Backbone, model: nn.Module, decision: Decision) -> tuple[Decision, Sequence[int]]:
    """Return what a decision says of whole blocks, and the kept ones with a gap beside or inside them.

    A decision about blocks is returned itself. One about branches becomes one whose `choices` end where the student has
    to stand in for what is gone, see `derive_taps`.

    Args:
        backbone: the model family.
        model: the network that the decision is about.
        decision: the decision.

    Returns:
        The decision, and positions among the kept blocks.
    """
    if not backbone.units:
        return decision, decision.beside_gaps
    whole, branches = _sorted_out(backbone, model, {decision.blocks[i] for i in decision.removed})
    blocks = backbone.block_paths(model)
    kept = tuple(i for i, path in enumerate(blocks) if path not in whole)
    thinned = [i for i in kept if any(block_of(path) == blocks[i] for path in branches)]
    ends = sorted({*thinned, *(i for i in range(len(blocks)) if i not in kept and i + 1 in kept)} - {len(blocks) - 1})
    bounds = [0, *(end + 1 for end in ends), len(blocks)]
    choices = tuple(tuple(range(first, last)) for first, last in pairwise(bounds))
    found = Decision(blocks=tuple(blocks), kept=kept, method=decision.method, choices=choices)
    return found, sorted({*found.beside_gaps, *map(kept.index, thinned)})


def without(task: Task, removed: Collection[int], shared: Iterable[Tensor] = ()) -> nn.Module:
    """Return a copy of the task's network without some blocks, in eval mode.

    Args:
        task: the network.
        removed: indices of blocks.
        shared: parameters and buffers, of any shape, that the copy has in common with the original.
    """
    # What goes is not copied: the copy of a removed block is an empty module, called as the block is.
    empty: dict[int, Any] = {}
    for i in removed:
        block = task.teacher.get_submodule(task.blocks[i])
        empty[id(block)] = nn.Identity()
        empty[id(block)].forward = block.forward
    student = copy.deepcopy(task.teacher, memo={**{id(t): t for t in shared}, **empty})
    remove_blocks(task.backbone, student, [task.blocks[i] for i in removed])
    return student.eval()


_checked: WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = WeakKeyDictionary()
"""The choices of blocks that a network is known to do with."""


def check_removal(task: Task, kept: Sequence[int]) -> None:
    """Make sure that a network without some blocks does what it does when they are skipped, once for every choice.

    Two samples are run, in eval mode, through the gated network and through one that is pruned and shares its weights.

    Raises:
        UserError: it fails or predicts otherwise, or what it makes of a sample depends on the others of a batch.
    """
    model = task.teacher
    known = _checked.setdefault(model, set())
    removed = [i for i in range(len(task.blocks)) if i not in set(kept)]
    first = next(model.parameters(), None)
    if not removed or tuple(kept) in known or first is None or first.is_meta:
        return
    _check_norms(model)
    device = first.device
    inputs = task.loss.prepare({k: t.to(device) for k, t in task.backbone.example(2).items()}, Rng(0, "removal"))
    mask = torch.ones(2, len(task.blocks), device=device).index_fill(1, torch.tensor(removed, device=device), 0)
    what = f"the network without {', '.join(task.blocks[i] for i in removed)}"
    advice = "what else depends on these blocks has to be repaired by after_prune: docs/writing-a-plugin.md"
    with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
        try:
            task.loss.predict(model, inputs)
        except (RuntimeError, TypeError, ValueError, LookupError):
            return  # the backbone's examples are not what this network is run on, so nothing can be tried
        with Gates(model, task.blocks, task.batch_dim(model), task.streams, task.backbone.unneeded) as gates:
            gates.mask = mask
            skipped = tensors_in(task.loss.predict(model, inputs))
        student = without(task, removed, shared=chain(model.parameters(), model.buffers()))
        try:
            with evaluating(student):
                found = tensors_in(task.loss.predict(student, inputs))
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{what} fails ({type(e).__name__}: {e}); {advice}") from e
    if not same_but_for_rounding(skipped, found):
        raise UserError(f"{what} predicts otherwise than when they are skipped; {advice}")
    known.add(tuple(kept))


def _check_norms(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UserError(
                f"'{path}' is a batch norm without running statistics: what it makes of a sample depends on the "
                "others, and a block sees those alone that keep it. Give it track_running_stats=True"
            )


def tensors_in(prediction: Prediction) -> list[Tensor]:
    """Return the tensors in a prediction, of any shape, in a fixed order."""
    return [leaf for leaf in tree_leaves(prediction) if isinstance(leaf, Tensor)]


def same_but_for_rounding(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether tensors, of any shape, are the same but for rounding."""
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    size = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=0, atol=64 * torch.finfo(a.dtype).eps * size, equal_nan=True)
