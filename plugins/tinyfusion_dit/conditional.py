"""Common parts of objectives on class-conditional latents: posterior draws, label dropout, guidance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.runtime.seeding import Rng, to_device


def draw_latents(batch: Batch, rng: Rng) -> Tensor:
    """Return clean latents, (batch, channels, height, width).

    They are drawn (stream "latent") if the data give their means `x` and standard deviations `x_std`.
    """
    if "x_std" not in batch:
        return batch["x"]
    return batch["x"] + batch["x_std"] * rng.normal("latent", batch["x"])


def draw_label_drop(batch: Batch, rng: Rng, probability: float) -> Tensor:
    """Draw which labels to drop: booleans, (batch,), from the stream "label_drop"."""
    return to_device(rng.uniform("label_drop", len(batch["y"])) < probability, batch["y"].device)


def run_network(model: nn.Module, inputs: Batch, label_drop: float) -> Tensor:
    """Run `model(x_t, t, y)` with y replaced by `model.null_class` where dropped.

    Args:
        model: the network. One without a null class must not drop labels.
        inputs: `x_t` (batch, channels, height, width); `t`, `y` and `drop` (batch,).
        label_drop: the probability; 0 ignores `drop`.

    Returns:
        (batch, output channels, height, width)
    """
    y = inputs["y"]
    if label_drop:
        y = y.masked_fill(inputs["drop"], model.null_class)  # type: ignore[arg-type]
    out: Tensor = model(inputs["x_t"], inputs["t"], y)
    return out


def guided_network(
    model: nn.Module, labels: Tensor, cfg_scale: float, guided_channels: int | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network with classifier-free guidance (arXiv:2207.12598) as a function of x and t.

    Args:
        model: the network.
        labels: (batch,) class labels.
        cfg_scale: guidance scale; 1 runs the plain network.
        guided_channels: number of channels that are guided; None for all.

    Returns:
        A function of x, (batch, channels, height, width), and t, (batch,).
    """
    if cfg_scale == 1:
        return lambda x, t: model(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])  # type: ignore[arg-type]

    def run(x: Tensor, t: Tensor) -> Tensor:
        guided = x.shape[1] if guided_channels is None else guided_channels
        doubled = torch.cat([x, x]), torch.cat([t, t]), both
        return model.forward_with_cfg(*doubled, cfg_scale, guided)[: len(x)]  # type: ignore[operator, no-any-return]

    return run


def last(states: Iterator[Tensor]) -> Tensor:
    """Run a sampler without gradients to its last state, (batch, ...)."""
    with torch.no_grad():
        return deque(states, maxlen=1).pop()


def sample_mean(x: Tensor) -> Tensor:
    """Average each sample: (batch, ...) -> (batch,)."""
    return x.flatten(1).mean(1)


def check_options(label_drop: float, guided_channels: int | None = None) -> None:
    """Check the options that these objectives share.

    Raises:
        UserError: one is out of range.
    """
    if not 0 <= label_drop <= 1:
        raise UserError(f"loss.label_drop is {label_drop}; expected a probability")
    require(
        guided_channels is None or guided_channels >= 0, "loss.guided_channels", guided_channels, "a number of channels"
    )
