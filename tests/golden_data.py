"""The parity data under `tests/golden`: numbers made by the public reference implementations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of one case."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def weights(tensors: dict[str, Tensor], prefix: str = "w.") -> dict[str, Tensor]:
    """The state dict of a case."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_close_rel(actual: Tensor, expected: Tensor, tol: float) -> None:
    """Assert max|actual - expected| <= tol * max|expected|, shapes equal."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual.detach().to(torch.float64) - expected.to(torch.float64)).abs().max()
    scale = expected.to(torch.float64).abs().max()
    assert error <= tol * scale, f"relative error {(error / scale).item():.2e} exceeds {tol:.0e}"


def sinusoid(t: Tensor) -> Tensor:
    """The timestep table to the last bit of the reference's, to put in the place of the model's in float64 runs.

    exp, cos and sin of float32 numbers differ by one unit in the last place from machine to machine; at t = 999
    that is up to 6e-5 in the table, far from the 1e-10 that all arithmetic after it must hold. So rows that are
    stored are looked up; for other times the reference's rounding of frequency 12 is restored.
    """
    tensors, _ = load("diffusion_math")
    frequency = torch.exp((-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()).float()
    frequency[12] = torch.nextafter(frequency[12], torch.tensor(1.0))
    angle = t.float()[:, None] * frequency
    table = torch.cat([angle.cos(), angle.sin()], dim=1)
    for row, time in zip(table, t.float(), strict=True):
        for stored in tensors["t_embed"][tensors["in.t_embed_t"] == time]:
            row.copy_(stored)
    return table


def record(model: nn.Module) -> dict[str, Tensor]:
    """What every part hands on, under the names of the golden data, filled by the next forward."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _args, out: seen.update({name: out}))

    keep("t_emb", model.t_embedder)
    keep("y_emb", model.y_embedder)
    keep("final", model.final_layer)
    for i, block in enumerate(model.blocks):
        keep(f"block.{i}", block)
    model.blocks[0].register_forward_pre_hook(lambda _module, args: seen.update(tokens=args[0], c=args[1]))
    return seen
