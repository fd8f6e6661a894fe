"""What a call says of the teacher's blocks by their number, told to a student: residuals of ControlNets, skips."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyfusion_core.errors import UserError
from tinyfusion_core.pruning.decision import Decision
from tinyfusion_diffusers.structure import class_of, lists_of, settings

JOINT, SINGLE = "transformer_blocks", "single_transformer_blocks"
RESIDUALS: Mapping[str, Mapping[str, str]] = {
    "BriaTransformer2DModel": {"controlnet_block_samples": JOINT},  # those of the other list diffusers cannot add
    "FluxTransformer2DModel": {"controlnet_block_samples": JOINT, "controlnet_single_block_samples": SINGLE},
    "QwenImageTransformer2DModel": {"controlnet_block_samples": JOINT},
    "SD3Transformer2DModel": {"block_controlnet_hidden_states": JOINT},
    "SanaTransformer2DModel": {"controlnet_block_samples": JOINT},
    "SanaVideoTransformer3DModel": {"controlnet_block_samples": JOINT},
    "ZImageTransformer2DModel": {"controlnet_block_samples": "layers"},
}
"""The arguments of a network that hold residuals, and the list behind whose blocks these are added."""
SKIPS = "skip_layers"
"""The argument of SD 3 that names blocks to leave out, for the guidance that skips layers."""


def _stretched(block: int, depth: int, number: int) -> int:
    return block // math.ceil(depth / number)


def _in_proportion(block: int, depth: int, number: int) -> int:
    return int(block / (depth / number))


def _behind_the_first(block: int, depth: int, number: int) -> int | None:
    return block - 1 if 0 < block <= number else None


def _repeated(block: int, depth: int, number: int) -> int:
    return block % number


RULES: Mapping[str, Callable[[int, int, int], int | None]] = {
    "SD3Transformer2DModel": _in_proportion,
    "SanaTransformer2DModel": _behind_the_first,
    "SanaVideoTransformer3DModel": _behind_the_first,
}
"""A block, how many there are, how many residuals -> which of these is added behind the block; others `_stretched`.
With as many residuals as blocks each has its own.
"""


def follow_teacher(student: nn.Module, *decisions: Decision) -> RemovableHandle:
    """Make a student's calls mean the teacher's blocks wherever they count them, also inside of a pipeline.

    The residuals of a ControlNet of the teacher are spread over the teacher's blocks, as its transformer does. Each is
    added behind the block that it is meant for, or, if that is gone, behind the one before it, where the stream is the
    same. What is meant for blocks before the first that takes any is added behind that one. `skip_layers` of SD 3
    (`skip_guidance_layers` of its pipeline) takes the teacher's numbers; what is gone is skipped already.

    Args:
        student: the transformer; its calls are changed until the handle is removed.
        decisions: which blocks it kept of the teacher; of several rounds, one after the other.

    Returns:
        A handle whose `remove` ends it.

    Raises:
        UserError: it is not known where the student's class adds residuals, the decisions are of another network, or it
            follows its teacher already.
    """
    cls = class_of(student)
    if cls.__name__ not in RESIDUALS:
        raise UserError(
            f"student: it is not known where {cls.__name__} adds the residuals of a ControlNet; it is for "
            f"{', '.join(RESIDUALS)}"
        )
    if any(hook.__module__ == __name__ for hook in student._forward_pre_hooks.values()):
        raise UserError("student: follows its teacher already; call `remove` of the handle that was returned first")
    for decision in decisions:
        if not {block.rpartition(".")[0] for block in decision.blocks} <= {name for name, _ in student.named_modules()}:
            raise UserError(
                f"decisions: one is about {decision.blocks[0]} and others, which {cls.__name__} does not have"
            )
    stay = {path: _stay(student, path, decisions) for path in RESIDUALS[cls.__name__].values()}
    signature = inspect.signature(cls.forward)

    def told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = signature.bind(module, *args, **kwargs)
        given = call.arguments
        for name, path in RESIDUALS[cls.__name__].items():
            repeats = path == JOINT and given.get("controlnet_blocks_repeat")
            rule = _repeated if repeats else RULES.get(cls.__name__, _stretched)
            if given.get(name):
                given[name] = _followed(given[name], *stay[path], rule)
        if given.get(SKIPS):
            kept, _ = stay[JOINT]
            given[SKIPS] = [kept.index(block) for block in given[SKIPS] if block in kept]
        return call.args[1:], call.kwargs

    return student.register_forward_pre_hook(told, with_kwargs=True)


def _stay(student: nn.Module, path: str, decisions: Sequence[Decision]) -> tuple[list[int], int]:
    """Which blocks of the teacher a list of the student still has, and how many the teacher had."""
    length = len(student.get_submodule(path))  # type: ignore[arg-type]  # a list of modules
    gone = [_numbers(decision, decision.removed, path) for decision in decisions]
    depth = length + sum(map(len, gone))
    stay = list(range(depth))
    for some in gone:
        stay = [block for i, block in enumerate(stay) if i not in some]
    kept = [len(_numbers(decision, decision.kept, path)) for decision in decisions]
    free = len(lists_of(settings(student), (path,))[path].free) if any(kept[-1:]) else 0
    whole = [len(_numbers(decision, range(len(decision.blocks)), path)) for decision in decisions]
    if kept != [*whole[1:], free][: len(kept)] or len(stay) != length:
        raise UserError(
            f"decisions: the last keeps {kept[-1]} blocks of '{path}' that could have gone, the student has {free}; "
            "give the decision of this student (decision.json beside it), of several rounds all of them"
        )
    return stay, depth


def _numbers(decision: Decision, indices: Sequence[int], path: str) -> list[int]:
    """The numbers in a list of some blocks of a decision."""
    named = (decision.blocks[i].rpartition(".") for i in indices)
    return [int(number) for before, _, number in named if before == path]


def _followed(given: Any, stay: Sequence[int], depth: int, rule: Callable[[int, int, int], int | None]) -> Any:
    """The residuals for the blocks that stay, in the form in which the teacher is given them."""
    by_block = isinstance(given, Mapping)
    which = {} if by_block else {block: rule(block, depth, len(given)) for block in range(depth)}
    meant = given if by_block else {block: given[i] for block, i in which.items() if i is not None}
    first = int(which.get(0, 0) is None)  # the first block that takes any
    found: dict[int, Tensor] = {}
    for block, residual in meant.items():
        place = max((j for j in range(first, len(stay)) if stay[j] <= block), default=first)
        found[place] = found[place] + residual if place in found else residual
    return found if by_block else list(found.values())
