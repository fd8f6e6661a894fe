"""What tests of the diffusion process share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_dit.model import DiT as Network
from tinyfusion_dit.process import (
    Process,
    even_steps,
    linear_betas,
    strided_steps,
)

FORWARD, GRADIENT, SAMPLE = 5e-6, 2e-5, 2e-5  # float32 rounding, relative to the largest entry
# Float64, through the network: some time steps have no stored sinusoids, and theirs differ by a unit of float32.
EXACT = 1e-8


BASE = Process.respaced(linear_betas(1000), range(1000))


def load_dit(config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> Network:
    model = Network(**config)
    model.load_state_dict(state)
    return model.to(dtype).eval()


def kept_steps(spec: str) -> list[int]:
    if spec.startswith("ddim"):
        return strided_steps(1000, int(spec.removeprefix("ddim")))
    return even_steps(1000, *map(int, spec.split(",")))
