"""The diffusion transformer of Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748).

Shapes: B batch, C input channels, S image side, P patch side, G = S / P, T = G * G tokens, D width. Parameter
names and shapes are those of the released checkpoints.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, nearest

_ACTIVATIONS: dict[str, Any] = {"gelu_tanh": partial(nn.GELU, approximate="tanh"), "silu": nn.SiLU}
_NUM_FREQUENCIES = 128


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    It never drops labels: whoever prepares the batch replaces them by `null_class`.

    Args:
        input_size: side of the (square) input, S.
        patch_size: side of a patch, P.
        in_channels: input channels, C.
        hidden_size: width, D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP, in units of D.
        class_dropout_prob: if positive, the label table has one more row, for "no label".
        num_classes: number of labels.
        learn_sigma: whether the output has C more channels, for the variance.
        mlp_act: activation of the MLPs, "gelu_tanh" (as published) or "silu".

    Attributes:
        config: all of the above.
        blocks: the prunable blocks, called as `block(x_BTD, c_BD)`.

    Raises:
        UserError: sizes that do not divide, or an unknown activation.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mlp_act: str = "gelu_tanh",
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        _check(input_size, patch_size, hidden_size, num_heads, mlp_act)
        self.config: dict[str, Any] = config
        self.num_classes, self.in_channels, self.patch_size = num_classes, in_channels, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        # A parameter, not a buffer, and not trained: the released checkpoints hold it.
        self.pos_embed = nn.Parameter(
            position_table(hidden_size, input_size // patch_size).float()[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, mlp_act) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels)
        self._initialise()

    @property
    def null_class(self) -> int:
        """The index that stands for "no label".

        Raises:
            UserError: the network was built without it.
        """
        if not self.config["class_dropout_prob"]:
            raise UserError(
                "the network has no class for dropped labels (class_dropout_prob is 0): "
                "set loss.label_drop to 0 and loss.cfg_scale to 1"
            )
        return self.num_classes

    @override
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise and, with `learn_sigma`, the variance parameter v.

        Args:
            x: (B, C, S, S) noised input.
            t: (B,) time steps, integer or float.
            y: (B,) int64 labels.

        Returns:
            (B, C or 2C, S, S): noise first, then v.
        """
        x_BTD = self.x_embedder(x) + self.pos_embed
        c_BD = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        return self._to_image(self.final_layer(x_BTD, c_BD))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598) over a doubled batch: labelled half, then unlabelled half.

        Only the first half of `x` is read. The first `guided_channels` output channels of both halves become `u +
        cfg_scale * (c - u)`, c being the labelled prediction and u the other; the remaining channels are not changed.
        The published samples guide 3 of the 4 latent channels, hence the default.

        Args:
            x: (2B, C, S, S) noised input.
            t: (2B,) time steps.
            y: (2B,) labels, the second half `null_class`.
            cfg_scale: guidance scale; 1 changes nothing.
            guided_channels: number of channels guided, at most C.

        Returns:
            (2B, C or 2C, S, S)
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided, rest = out.tensor_split([min(guided_channels, self.in_channels)], dim=1)
        c, u = guided.chunk(2)
        guided = u + cfg_scale * (c - u)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def _to_image(self, x_BTF: Tensor) -> Tensor:
        p, grid = self.patch_size, math.isqrt(x_BTF.shape[1])
        # A token holds its patch as (row, column, channel).
        image = x_BTF.reshape(len(x_BTF), grid, grid, p, p, self.out_channels)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(len(x_BTF), self.out_channels, grid * p, grid * p)

    def _initialise(self) -> None:
        """Xavier linear layers; normal embeddings; zero gates and output: every block starts as the identity."""
        for name, p in self.named_parameters():
            if name == "pos_embed":
                continue
            if p.ndim == 1 or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(p)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.detach().flatten(1))  # a patch embedding is a linear map too


class Block(nn.Module):
    """Attention and MLP on the residual stream, each scaled, shifted and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, mlp_act: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=_ACTIVATIONS[mlp_act])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    @override
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map a stream (B, T, D) with conditioning (B, D) to a stream (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


class FinalLayer(nn.Module):
    """Conditioned LayerNorm, then a linear map from tokens to patches."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    @override
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map a stream (B, T, D) with conditioning (B, D) to (B, T, out_features)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time step through an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    @override
    def forward(self, t: Tensor) -> Tensor:
        """Embed time steps: (B,) -> (B, D)."""
        out: Tensor = self.mlp(sinusoid(t).to(next(self.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    """A table of label embeddings."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, dim)

    @override
    def forward(self, y: Tensor) -> Tensor:
        """Look up labels: (B,) -> (B, D)."""
        out: Tensor = self.embedding_table(y)
        return out


def sinusoid(t: Tensor) -> Tensor:
    """Encode times: (B,) -> (B, 256) float32, cosines then sines of 128 frequencies from 1 down to nearly 1/10000."""
    k = torch.arange(_NUM_FREQUENCIES, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * k / _NUM_FREQUENCIES)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_table(dim: int, grid: int) -> Tensor:
    """Return (grid * grid, dim) float64 sines and cosines: the first half encodes the column, the second the row."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([column, row], dim=1)


def _check(input_size: int, patch_size: int, hidden_size: int, num_heads: int, mlp_act: str) -> None:
    if input_size % patch_size:
        raise UserError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
    if hidden_size % num_heads:
        raise UserError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
    if hidden_size % 4:
        raise UserError(f"hidden_size {hidden_size} is not divisible by 4, which the position table needs")
    if mlp_act not in _ACTIVATIONS:
        raise UserError(f"mlp_act '{mlp_act}' is unknown{nearest(mlp_act, _ACTIVATIONS)}")
