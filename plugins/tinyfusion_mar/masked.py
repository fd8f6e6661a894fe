"""Diffusion of masked tokens: training loss, distillation distance, generation in rounds.

Formulas: MAR (arXiv:2406.11838), MaskGIT (arXiv:2202.04200: cosine schedule of the rounds), improved DDPM
(arXiv:2102.09672: cosine noise schedule, learned-range variance), distillation of the variance (TinyFusion,
arXiv:2412.01199).

Shapes: B batch, C token width, L tokens of an image, M masked and V visible ones, R noisings of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.protocols.losses.diffusion import DiffusionLoss
from tinyfusion_core.runtime.seeding import Rng, to_device
from tinyfusion_dit.conditional import check_options, draw_label_drop, draw_latents, last
from tinyfusion_dit.diffusion import GaussianDiffusion
from tinyfusion_mar.tokens import patchify, take, unpatchify

_RATE_DEVIATION = 0.25  # of the normal distribution around 1 whose lower part the mask rate is drawn from


@dataclass(frozen=True, kw_only=True)
class MaskedTokenDiffusion(DiffusionLoss):
    """Noise prediction for the masked tokens of an image, as MAR trains and samples.

    One mask rate is drawn for a whole step, so every sample has the same number of visible tokens: the encoder
    runs on a dense (B, V, D) tensor, and samples that skip a block can leave its batch. Custom batches must
    keep to that: `visible` and `masked` are index tensors with a fixed number of columns, not boolean masks.

    Args:
        patch_size: side of a token, in positions of the latent; the backbone's.
        mask_rate_min: smallest share of masked tokens.
        label_drop: probability of replacing a label by "no label" in training.
        diffusion_batch_mul: noisings of every masked token in a step; only the head is run that often.
        num_iter: rounds of generation.
        sampling_steps: denoising steps of a token.
        spacing: which steps are kept: "even" from the first to the last one, "stride" at multiples of an integer.
        temperature: factor of the noise of a denoising step.
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        cfg_schedule: "constant", or "linear" from little in the first round to nearly all of the scale in the last.
    """

    patch_size: int = 1
    mask_rate_min: float = 0.7
    label_drop: float = 0.1
    diffusion_batch_mul: int = 4
    num_iter: int = 64
    sampling_steps: int = 100
    spacing: Literal["even", "stride"] = "even"
    temperature: float = 1.0
    cfg_scale: float = 1.0
    cfg_schedule: Literal["constant", "linear"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.patch_size >= 1, "loss.patch_size", self.patch_size, "at least 1")
        require(0 < self.mask_rate_min <= 1, "loss.mask_rate_min", self.mask_rate_min, "above 0, at most 1")
        require(self.diffusion_batch_mul >= 1, "loss.diffusion_batch_mul", self.diffusion_batch_mul, "at least 1")
        require(self.num_iter >= 1, "loss.num_iter", self.num_iter, "at least 1")
        require(self.temperature >= 0, "loss.temperature", self.temperature, "0 or more")
        check_options(self.label_drop)
        _ = self._diffusion  # raises when there is no such spacing

    @override
    def sampling_options(self) -> frozenset[str]:
        return frozenset({"num_iter", "sampling_steps", "spacing", "temperature", "cfg_scale", "cfg_schedule"})

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Choose the masked tokens and noise them.

        Args:
            batch: `x` (B, C, H, W) clean latents, `y` (B,) labels, optionally `x_std` like `x`: then `x` is the mean
                of a latent that is drawn here.
            rng: for the whole step "mask rate"; for every row "latent", "order", "time", "noise" and "label_drop".

        Returns:
            `tokens` (B, L, C) clean; `visible` (B, V) and `masked` (B, M) ascending positions; `x_start`, `noise`,
            `x_t` (B, R, M, C) and `t` (B, R, M) of the masked tokens; `y`, `drop` (B,).
        """
        x = draw_latents(batch, rng)
        if x.shape[-1] % self.patch_size:
            raise UserError(f"loss.patch_size is {self.patch_size}, and the latents have a side of {x.shape[-1]}")
        tokens = patchify(x, self.patch_size)
        num_rows, num_tokens, _ = tokens.shape
        order = to_device(rng.uniform("order", num_rows, num_tokens).argsort(1), x.device)
        rate = self.mask_rate(torch.rand((), generator=rng.batch("mask rate"), dtype=torch.float64))
        num_masked = math.ceil(num_tokens * rate)
        masked, visible = (part.sort(1).values for part in order.tensor_split([num_masked], dim=1))
        repeats = self.diffusion_batch_mul
        t = to_device(self._diffusion.steps(rng.uniform("time", num_rows, repeats, num_masked)), x.device)
        x_start = take(tokens, masked)[:, None].expand(-1, repeats, -1, -1)
        noised = self._diffusion.place(_rows(x_start), _rows(rng.normal("noise", x_start)), t.flatten())
        return {
            **{name: rows.view(*t.shape, *rows.shape[1:]) for name, rows in noised.items()},
            "tokens": tokens,
            "visible": visible,
            "masked": masked,
            "y": batch["y"],
            "drop": draw_label_drop(batch, rng, self.label_drop),
        }

    def mask_rate(self, quantile: Tensor) -> float:
        """Return the quantile of the mask rate's distribution, a normal one around 1 truncated to [mask_rate_min, 1].

        Args:
            quantile: a scalar in [0, 1).
        """
        low = torch.special.ndtr(torch.tensor((self.mask_rate_min - 1) / _RATE_DEVIATION, dtype=torch.float64))
        deviation = torch.special.ndtri(low + quantile * (0.5 - low))
        return min(1.0, 1 + _RATE_DEVIATION * float(deviation))

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Predict noise and variance of the masked tokens, (B, R, M, 2C)."""
        names = ("x_t", "t", "tokens", "visible", "masked", "y", "drop")
        out: Tensor = model(*(inputs[name] for name in names))
        return out

    @override
    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        """Average GaussianDiffusion's loss over a sample's masked tokens and their noisings, (B,)."""
        return self._per_sample(self._diffusion.loss(_rows(prediction), self._noised(inputs)), inputs)

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        """Average GaussianDiffusion's distance over a sample's masked tokens and their noisings, (B,)."""
        rows = self._diffusion.distance(_rows(student), _rows(teacher), self._noised(inputs))
        return self._per_sample(rows, inputs)

    @override
    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Sample (B, C, H, W). Row i uses only its own streams: "order" and those of `rounds`."""
        tokens = patchify(torch.zeros_like(like), self.patch_size)
        order = to_device(rng.uniform("order", *tokens.shape[:2]).argsort(1), like.device)
        tokens = last(self.rounds(model, tokens, conditions, order, rng.normal))
        return unpatchify(tokens, like, self.patch_size)

    def rounds(
        self, model: Any, tokens: Tensor, labels: Tensor, order: Tensor, normal: Callable[[str, Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yield the tokens after every round, (B, L, C), with more and more of them predicted.

        Args:
            model: the network.
            tokens: (B, L, C) zeros.
            labels: (B,) class labels.
            order: (B, L) positions; the last are predicted first.
            normal: a purpose ("x_T of round <i>", "noise <step> of round <i>") and a tensor -> standard normal
                numbers of the same shape.
        """
        num_tokens = tokens.shape[1]
        num_masked = num_tokens
        for i in range(self.num_iter):
            share = math.cos(math.pi / 2 * (i + 1) / self.num_iter)
            num_next = max(1, min(num_masked - 1, math.floor(num_tokens * share)))
            first = 0 if i == self.num_iter - 1 else num_next
            chosen = order[:, first:num_masked].sort(1).values
            if chosen.shape[1]:  # with more rounds than tokens, some have nothing to do
                visible = order[:, num_masked:].sort(1).values
                part = self.cfg_scale - 1
                scale = 1 + (part if self.cfg_schedule == "constant" else part * (num_tokens - num_next) / num_tokens)
                head = self._guided_head(model, tokens, visible, chosen, labels, scale)
                new = self._denoised(head, take(tokens, chosen), f"of round {i}", normal)
                tokens = tokens.scatter(1, chosen[..., None].expand_as(new), new)
            num_masked = num_next
            yield tokens

    def _denoised(
        self,
        head: Callable[[Tensor, Tensor], Tensor],
        like: Tensor,
        when: str,
        normal: Callable[[str, Tensor], Tensor],
    ) -> Tensor:
        """New tokens in the shape of `like`."""
        states = self._diffusion.trajectory(
            head,
            _rows(normal(f"x_T {when}", like)),
            lambda step: self.temperature * _rows(normal(f"noise {step} {when}", like)),
        )
        return last(states).view_as(like)

    def _guided_head(
        self, model: Any, tokens: Tensor, visible: Tensor, chosen: Tensor, labels: Tensor, scale: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The head as a function of noised tokens (rows, C) and time steps (rows,), for the chosen positions."""
        drop = torch.zeros_like(labels, dtype=torch.bool)
        if scale == 1:
            z = _rows(take(model.condition(tokens, visible, labels, drop), chosen))
            return lambda x, t: model.denoise(x, t, z)
        # Each block is called once in a round, as it is without guidance.
        tokens, visible, chosen, labels = (torch.cat([part, part]) for part in (tokens, visible, chosen, labels))
        z = take(model.condition(tokens, visible, labels, torch.cat([drop, ~drop])), chosen)
        both = torch.stack([_rows(part) for part in z.chunk(2)])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with_label, without = model.denoise(x.expand(2, *x.shape), t.expand(2, *t.shape), both)
            (e, v), (e_without, _) = with_label.chunk(2, dim=-1), without.chunk(2, dim=-1)
            return torch.cat([e_without + scale * (e - e_without), v], dim=-1)

        return denoise

    @property
    def _diffusion(self) -> GaussianDiffusion:
        """The diffusion of one token, whose components are the channels."""
        drawn = {name: getattr(self, name) for name in ("time", "mean", "std", "times", "min_snr")}
        return GaussianDiffusion(schedule="cosine", sampling_steps=self.sampling_steps, spacing=self.spacing, **drawn)

    def _noised(self, inputs: Batch) -> dict[str, Tensor]:
        return {name: inputs[name].flatten(0, 2) for name in ("x_start", "noise", "x_t", "t")}

    def _per_sample(self, rows: Tensor, inputs: Batch) -> Tensor:
        return rows.view(len(inputs["y"]), -1).mean(1)


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (rows, C)."""
    return x.flatten(0, -2)
