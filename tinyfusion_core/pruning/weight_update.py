"""Which weights move: in a search, to see what fine-tuning could recover, and in a recovery, for good."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ..errors import UserError, need, require
from ..parsing.settings import Settings
from ..protocols.undisturbed import restored, undisturbed
from .lora_layers import adaptable, uncalled


class WeightUpdate(Settings, ABC):
    """Which weights may change, and how: in a search, after which they are restored, or in a recovery."""

    @abstractmethod
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> AbstractContextManager[list[nn.Parameter]]:
        """Make the update's parameters part of the model and yield them; on exit the model is what it was.

        Keys, module types, `requires_grad` and values are restored, the values bit for bit.

        Args:
            model: the network.
            blocks: paths of its blocks.
        """

    def merged(self, model: nn.Module, blocks: Sequence[str]) -> AbstractContextManager[list[nn.Parameter]]:
        """As `applied`, but what was learned stays in the weights, and buffers keep their last values.

        Where the context ends with an exception, the values of the weights are undefined.

        Raises:
            UserError: it is an update that can only be undone.
        """
        raise UserError(f"update: {type(self).__name__} is for a search, and leaves nothing in the weights")


@contextmanager
def of_stage(update: AbstractContextManager[list[nn.Parameter]], stage: str) -> Iterator[list[nn.Parameter]]:
    """Enter what `applied` or `merged` returns; an error in this names the key, which begins with the stage."""
    with ExitStack() as stack:
        try:
            weights = stack.enter_context(update)
        except UserError as e:
            raise UserError(f"{stage}.{e}") from None
        yield weights


@contextmanager
def taken_along(
    update: WeightUpdate, model: nn.Module, blocks: Sequence[str], values: dict[str, Tensor]
) -> Iterator[list[nn.Parameter]]:
    """As `applied`, but take along what the update has made of the weights, before they are what they were.

    Args:
        update: one that can be merged.
        model: the network.
        blocks: paths of its blocks.
        values: is filled with the weights that have changed, of any shape, by name, on the CPU.
    """
    named = dict(model.named_parameters())  # now: meanwhile modules may be replaced
    with undisturbed(model), restored(named.values()) as original:
        with update.merged(model, blocks) as weights:
            yield weights
        for (name, p), before in zip(named.items(), original, strict=True):
            if not torch.equal(now := p.detach().cpu(), before):
                values[name] = now.clone()


@dataclass(frozen=True)
class Frozen(WeightUpdate):
    """The weights stay as they are: only the gates learn."""

    @contextmanager
    @override
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with undisturbed(model):
            model.requires_grad_(False)
            yield []


@dataclass(frozen=True)
class LoRA(WeightUpdate):
    """A low-rank update of linear layers and convolutions, (alpha / rank) B A (arXiv:2106.09685), by peft.

    Args:
        rank: rank of each update.
        alpha: numerator of the update's scale.
        targets: regular expression that a module's full path must match; default: every linear layer and every
            convolution that is not grouped inside the blocks. `nn.MultiheadAttention` and layers of state spaces are
            left alone whose weights are used without calling them.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, "update.rank", self.rank, "at least 1")
        require(self.alpha > 0, "update.alpha", self.alpha, "a number above 0")
        _check_pattern(self.targets or "")

    @contextmanager
    @override
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with undisturbed(model), self._adapted(model, blocks) as weights:
            yield weights

    @contextmanager
    @override
    def merged(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        adapter = need("peft", "tinyfusion[lora]", "update: LoRA").tuners.lora.LoraLayer
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with self._adapted(model, blocks) as weights:
                yield weights
                for module in model.modules():
                    if isinstance(module, adapter):
                        module.merge()
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    @contextmanager
    def _adapted(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        """Replace layers by peft's, and put them back in the end."""
        peft = need("peft", "tinyfusion[lora]", "update: LoRA")
        targets = self._targets(model, blocks)
        children = [(module, dict(module._modules)) for module in model.modules()]
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)
        try:
            with warnings.catch_warnings():  # that a Conv1D has its weight transposed, which peft sees by itself
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
                try:
                    peft.LoraModel(model, config, "recoverability")
                except ValueError as e:
                    reason = " ".join(str(e).split())
                    raise UserError(
                        f"update: peft cannot adapt these layers ({reason}); set update.targets, a regular expression "
                        "of layers that it can, or another update, such as Full"
                    ) from None
            yield [p for p in model.parameters() if p.requires_grad]
        finally:  # not by peft, which an exception while it wraps the layers leaves half done
            for module, before in children:
                module._modules.update(before)
            model.__dict__.pop("peft_config", None)

    def _targets(self, model: nn.Module, blocks: Sequence[str]) -> str:
        """Return a regular expression of the layers to adapt."""
        layers = {name: module for name, module in model.named_modules() if not list(module.children())}
        parts = uncalled(model)
        if self.targets is None:
            names = adaptable(model, blocks)
            targets, key = "|".join(map(re.escape, names)), "update"
            advice = "LoRA finds no linear layer and no ungrouped convolution inside the blocks; use update: Full"
            if parts:
                told = f"LoRA leaves nn.MultiheadAttention alone, {parts[0]} for one: its weights stand still"
                warnings.warn(told, stacklevel=2)
        else:
            targets, key = self.targets, "update.targets"
            advice = f"'{targets}' matches the whole path of no layer; paths are like {next(iter(layers))}"
        if part := next((part for part in parts if re.fullmatch(targets, part)), None):
            raise UserError(f"{key}: {part} is (in) an nn.MultiheadAttention, which LoRA cannot adapt")
        if not any(re.fullmatch(targets, name) for name in layers):
            raise UserError(f"{key}: {advice} ({type(model).__name__})")
        return targets


class _Direct(WeightUpdate):
    """Some of the weights themselves are trained; copies on the CPU restore them."""

    @abstractmethod
    def _chosen(self, model: nn.Module, blocks: Sequence[str]) -> list[nn.Parameter]:
        """Return the weights to train, among those that require a gradient."""

    @contextmanager
    @override
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with undisturbed(model), self.merged(model, blocks) as weights, restored(weights):
            yield weights

    @contextmanager
    @override
    def merged(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        weights = self._chosen(model, blocks)
        chosen = {id(p) for p in weights}
        still = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        try:
            for p in still:
                p.requires_grad_(False)
            yield weights
        finally:
            for p in still:
                p.requires_grad_(True)


@dataclass(frozen=True)
class Full(_Direct):
    """Every weight of the model is trained."""

    @override
    def _chosen(self, model: nn.Module, blocks: Sequence[str]) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class LastBlocks(_Direct):
    """The last blocks are trained, and the head; the rest stands still.

    Args:
        blocks: how many of the last blocks.
        head: whether what the network registers after its blocks is trained too: norms, output layers. A head that
            shares its weight with the embedding moves both.
    """

    blocks: int = 3
    head: bool = True

    def __post_init__(self) -> None:
        require(self.blocks >= (0 if self.head else 1), "update.blocks", self.blocks, "at least 1, or 0 with the head")

    @override
    def _chosen(self, model: nn.Module, blocks: Sequence[str]) -> list[nn.Parameter]:
        if self.blocks > len(blocks):
            raise UserError(f"update.blocks is {self.blocks}; the network has {len(blocks)} blocks")
        paths = tuple(f"{path}." for path in blocks[len(blocks) - self.blocks :])
        named = list(model.named_parameters(remove_duplicate=False))
        inside = [i for i, (name, _) in enumerate(named) if name.startswith(tuple(f"{path}." for path in blocks))]
        first = max(inside, default=-1) + 1 if self.head else len(named)
        chosen = [p for i, (name, p) in enumerate(named) if i >= first or (paths and name.startswith(paths))]
        return _required(chosen, "update: this network registers nothing after its blocks; train some of them too")


@dataclass(frozen=True)
class Matching(_Direct):
    """The weights are trained whose paths match a pattern; the rest stands still.

    Args:
        targets: regular expression that a parameter's full path must match, such as `.*(norm|bias).*`.
    """

    targets: str

    def __post_init__(self) -> None:
        _check_pattern(self.targets)

    @override
    def _chosen(self, model: nn.Module, blocks: Sequence[str]) -> list[nn.Parameter]:
        named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        chosen = [p for name, p in named.items() if re.fullmatch(self.targets, name)]
        advice = f"'{self.targets}' matches the whole path of no trained weight; paths are like {next(iter(named), '')}"
        return _required(chosen, f"update.targets: {advice}")


def _required(weights: Sequence[nn.Parameter], otherwise: str) -> list[nn.Parameter]:
    """Those that require a gradient, each once; there must be one."""
    chosen = list({id(p): p for p in weights if p.requires_grad}.values())
    if not chosen:
        raise UserError(otherwise)
    return chosen


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise UserError(f"update.targets: '{pattern}' is no regular expression ({e})") from None


def hold_statistics(model: nn.Module, weights: Sequence[nn.Parameter]) -> None:
    """Keep the statistics of batch norms none of whose weights are among those that move."""
    moving = {id(p) for p in weights}
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(id(p) in moving for p in module.parameters()):
            module.eval()
