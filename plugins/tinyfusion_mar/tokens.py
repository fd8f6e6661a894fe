"""Latents as rows of tokens, and some tokens of a row. Apart from the network, so that importing it stays fast."""

from __future__ import annotations

from torch import Tensor, nn


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Of x (B, L, D) the rows at the positions (B, V) -> (B, V, D). Works on the meta device, where masks do not."""
    return x.gather(1, index(positions, x))


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) latents -> (B, L, C * p * p) tokens in raster order, each (channel, row, column)."""
    return nn.functional.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, like: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`, in the shape of `like`."""
    return nn.functional.fold(tokens.transpose(1, 2), like.shape[2:], patch_size, stride=patch_size)


def index(positions: Tensor, like: Tensor) -> Tensor:
    """Positions (B, V) as `gather` and `scatter` take them for tensors (B, L, D): (B, V, D)."""
    return positions[..., None].expand(-1, -1, like.shape[-1])
