"""Weight updates trained jointly with the gates, so that the search sees what fine-tuning could recover."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from ..errors import UserError, require
from ..parsing.settings import Settings
from ..protocols.undisturbed import undisturbed


class WeightUpdate(Settings, ABC):
    """How the weights may change during a search. The original weights are always restored."""

    @abstractmethod
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> AbstractContextManager[list[nn.Parameter]]:
        """Make the update's parameters part of the model and yield them; on exit the model is what it was.

        Keys, module types, `requires_grad` and values are restored, the values bit for bit.

        Args:
            model: the network.
            blocks: paths of its blocks.
        """


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
            convolution that is not grouped inside the blocks.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, "search.update.rank", self.rank, "at least 1")
        try:
            re.compile(self.targets or "")
        except re.error as e:
            raise UserError(f"search.update.targets: '{self.targets}' is no regular expression ({e})") from None

    @contextmanager
    @override
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        from peft import LoraConfig, LoraModel
        from transformers.pytorch_utils import Conv1D  # a linear layer, of GPT-2

        layers = {name: module for name, module in model.named_modules() if not list(module.children())}
        if self.targets is None:
            targets = "|".join(re.escape(name) for name in layers if _adaptable(name, layers[name], blocks, Conv1D))
            advice = "LoRA finds no linear layer and no ungrouped convolution inside the blocks; use update: Full"
        else:
            targets, advice = self.targets, f"'{self.targets}' matches no layer; paths are like {next(iter(layers))}"
        chosen = [module for name, module in layers.items() if re.fullmatch(targets, name)]
        if not chosen:
            raise UserError(f"search.update{'.targets' * bool(self.targets)}: {advice} ({type(model).__name__})")
        children = [(module, dict(module._modules)) for module in model.modules()]
        with undisturbed(model):
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)  # type: ignore[arg-type]
            try:
                with warnings.catch_warnings():  # that a Conv1D has its weight transposed, which peft sees by itself
                    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
                    try:
                        LoraModel(model, config, "recoverability")
                    except ValueError as e:
                        reason = " ".join(str(e).split())
                        raise UserError(
                            f"search.update: peft cannot adapt these layers ({reason}); set search.update.targets, a "
                            "regular expression of layers that it can, or update: Full or Frozen"
                        ) from None
                yield [p for p in model.parameters() if p.requires_grad]
            finally:  # not by peft, which an exception while it wraps the layers leaves half done
                for module, before in children:
                    module._modules.update(before)
                model.__dict__.pop("peft_config", None)


@dataclass(frozen=True)
class Full(WeightUpdate):
    """Every weight of the model is trained; a copy on the CPU restores it."""

    @contextmanager
    @override
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        # A network that is only planned with, on the meta device, has no values to restore.
        original = [(p, p.detach().to("meta" if p.is_meta else "cpu", copy=True)) for p in model.parameters()]
        with undisturbed(model):
            try:
                yield [p for p in model.parameters() if p.requires_grad]
            finally:
                with torch.no_grad():
                    for p, values in original:
                        p.copy_(values)


def _adaptable(name: str, module: nn.Module, blocks: Sequence[str], transposed: type[nn.Module]) -> bool:
    """Whether LoRA updates a layer by default."""
    inside = any(name.startswith(f"{path}.") or name == path for path in blocks)
    linear = isinstance(module, nn.Linear | transposed)
    return inside and (linear or (isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1))
