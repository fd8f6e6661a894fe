"""What objectives on class-conditional latents share: drawing latents, dropping labels, guidance, plain means."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.runtime.seeding import Rng


def draw_latents(batch: Batch, rng: Rng) -> Tensor:
    """The clean latents; drawn (stream "latent") where the data give their means and deviations."""
    if "x_std" not in batch:
        return batch["x"]
    return batch["x"] + batch["x_std"] * rng.normal("latent", batch["x"])


def draw_label_drop(batch: Batch, rng: Rng, probability: float) -> Tensor:
    """(B,) whether to drop the label; stream "label_drop"."""
    return (rng.uniform("label_drop", len(batch["y"])) < probability).to(batch["y"].device)


def run_network(model: nn.Module, inputs: Batch, label_drop: float) -> Tensor:
    """`model(x_t, t, y)`, y being `model.null_class` where dropped. A network without one must not drop labels."""
    y = inputs["y"]
    if label_drop:
        y = y.masked_fill(inputs["drop"], model.null_class)  # type: ignore[arg-type]
    out: Tensor = model(inputs["x_t"], inputs["t"], y)
    return out


def guided_network(
    model: nn.Module, labels: Tensor, cfg_scale: float, guided_channels: int | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of x (B, C, H, W) and t (B,), with classifier-free guidance unless the scale is 1."""
    if cfg_scale == 1:
        return lambda x, t: model(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])  # type: ignore[arg-type]

    def run(x: Tensor, t: Tensor) -> Tensor:
        guided = x.shape[1] if guided_channels is None else guided_channels
        doubled = torch.cat([x, x]), torch.cat([t, t]), both
        return model.forward_with_cfg(*doubled, cfg_scale, guided)[: len(x)]  # type: ignore[operator, no-any-return]

    return run


def last(states: Iterator[Tensor]) -> Tensor:
    """Run a sampler to its last state, without gradients."""
    with torch.no_grad():
        return deque(states, maxlen=1).pop()


def sample_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def check_options(label_drop: float, guided_channels: int | None = None) -> None:
    """Raises UserError when one of the options that these objectives share has no meaning."""
    if not 0 <= label_drop <= 1:
        raise UserError(f"loss.label_drop is {label_drop}; expected a probability")
    require(
        guided_channels is None or guided_channels >= 0, "loss.guided_channels", guided_channels, "a number of channels"
    )
