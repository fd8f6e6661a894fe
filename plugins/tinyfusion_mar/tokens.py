"""Latents as sequences of tokens. Separate from the network, so that importing it stays fast."""

from __future__ import annotations

from torch import Tensor, nn


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Gather rows of x (B, L, D) at positions (B, V) -> (B, V, D). Works on the meta device, where masks do not."""
    return x.gather(1, index(positions, x))


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut latents (B, C, H, W) into tokens (B, L, C * p * p) in raster order, each (channel, row, column)."""
    return nn.functional.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, like: Tensor, patch_size: int) -> Tensor:
    """Invert `patchify`: tokens (B, L, C * p * p) -> latents of the same shape as `like`, (B, C, H, W)."""
    return nn.functional.fold(tokens.transpose(1, 2), like.shape[2:], patch_size, stride=patch_size)


def index(positions: Tensor, like: Tensor) -> Tensor:
    """Expand positions (B, V) to indices (B, V, D) for `gather` and `scatter` on tensors (B, L, D)."""
    return positions[..., None].expand(-1, -1, like.shape[-1])
