"""The network of Li et al., "Autoregressive Image Generation without Vector Quantization" (MAR, arXiv:2406.11838).

Shapes: B batch, C token width, L tokens of an image in raster order, V visible and M masked ones (V + M = L), b buffer
slots, D_e encoder and D_d decoder width, W width of the head. Parameter names and shapes are those of the released
checkpoints.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError
from tinyfusion_dit.model import FinalLayer, TimestepEmbedder
from tinyfusion_mar.tokens import index, take

_norm: Any = partial(nn.LayerNorm, eps=1e-6)  # as all published sizes have it


class MAR(nn.Module):
    """A masked autoregressive transformer: an encoder of the visible tokens, a decoder of all tokens, a diffusion head.

    It has no dropout, unlike in the published training: everything random about a step is drawn before the network
    runs.

    Args:
        img_size: side of the image in pixels.
        vae_stride: pixels per position of the latent, along each side.
        patch_size: side of a token, in positions of the latent.
        in_channels: channels of the latent.
        encoder_width: D_e.
        encoder_depth: number of encoder blocks.
        encoder_heads: attention heads of an encoder block.
        decoder_width: D_d.
        decoder_depth: number of decoder blocks.
        decoder_heads: attention heads of a decoder block.
        mlp_ratio: hidden width of a block's MLP, relative to the block's.
        num_classes: number of labels.
        buffer_size: slots in front of the tokens that hold the label, b.
        head_width: W.
        head_depth: number of residual blocks of the diffusion head.

    Attributes:
        config: all of the above.
        encoder_blocks: prunable, called as `block(x)` with x (B, b + V, D_e).
        decoder_blocks: prunable, called as `block(x)` with x (B, b + L, D_d).

    Raises:
        UserError: sizes that do not divide, or no buffer.
    """

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        in_channels: int = 16,
        encoder_width: int = 1024,
        encoder_depth: int = 16,
        encoder_heads: int = 16,
        decoder_width: int = 1024,
        decoder_depth: int = 16,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        buffer_size: int = 64,
        head_width: int = 1280,
        head_depth: int = 8,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        _check(config)
        self.config: dict[str, Any] = config
        self.patch_size, self.buffer_size = patch_size, buffer_size
        num_tokens = (img_size // vae_stride // patch_size) ** 2
        token_width = in_channels * patch_size**2
        self.fake_latent = nn.Parameter(torch.empty(1, encoder_width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + num_tokens, encoder_width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + num_tokens, decoder_width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, num_tokens, decoder_width))
        self.class_emb = nn.Embedding(num_classes, encoder_width)
        self.z_proj = nn.Linear(token_width, encoder_width)
        self.z_proj_ln = _norm(encoder_width)
        self.encoder_blocks = _blocks(encoder_width, encoder_depth, encoder_heads, mlp_ratio)
        self.encoder_norm = _norm(encoder_width)
        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.decoder_blocks = _blocks(decoder_width, decoder_depth, decoder_heads, mlp_ratio)
        self.decoder_norm = _norm(decoder_width)
        self.diffloss = nn.ModuleDict({"net": DiffusionHead(token_width, decoder_width, head_width, head_depth)})
        self._initialise()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image, L."""
        return self.diffusion_pos_embed_learned.shape[1]

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, tokens: Tensor, visible: Tensor, masked: Tensor, y: Tensor, drop: Tensor
    ) -> Tensor:
        """Predict the noise of masked tokens, given the visible ones.

        Args:
            x_t: (B, R, M, C) noised tokens, R noisings of each.
            t: (B, R, M) their time steps.
            tokens: (B, L, C) clean tokens.
            visible: (B, V) positions that the encoder sees, ascending.
            masked: (B, M) the other positions.
            y: (B,) int64 labels.
            drop: (B,) bool, whether to replace the label by the learned "no label".

        Returns:
            (B, R, M, 2C): noise first, then the variance parameter v.
        """
        z_BMD = take(self.condition(tokens, visible, y, drop), masked)
        return self.denoise(x_t, t, z_BMD[:, None])

    def condition(self, tokens: Tensor, visible: Tensor, y: Tensor, drop: Tensor) -> Tensor:
        """Return the head's conditions for all tokens, (B, L, D_d); arguments as in `forward`."""
        return self.decode(self.encode(tokens, visible, y, drop), visible)

    def encode(self, tokens: Tensor, visible: Tensor, y: Tensor, drop: Tensor) -> Tensor:
        """Encode the buffer, which holds the label, and the visible tokens: (B, b + V, D_e). See `forward`."""
        label = torch.where(drop[:, None], self.fake_latent, self.class_emb(y))
        seen = self.z_proj(take(tokens, visible))
        x = torch.cat([label[:, None].expand(-1, self.buffer_size, -1).to(seen.dtype), seen], dim=1)
        buffer, positions = self._split(self.encoder_pos_embed_learned)
        x = x + torch.cat([buffer.expand(len(x), -1, -1), take(positions.expand(len(x), -1, -1), visible)], dim=1)
        x = self.z_proj_ln(x)
        for block in self.encoder_blocks:
            x = block(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def decode(self, x: Tensor, visible: Tensor) -> Tensor:
        """Decode (B, b + V, D_e) to (B, L, D_d); a learned token stands for every token that is not visible."""
        buffer, seen = self._split(self.decoder_embed(x))
        empty = self.mask_token.to(seen.dtype).expand(len(x), self.num_tokens, -1)
        x = torch.cat([buffer, empty.scatter(1, index(visible, seen), seen)], dim=1)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        out: Tensor = self._split(self.decoder_norm(x))[1] + self.diffusion_pos_embed_learned
        return out

    def denoise(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Run the head: x_t (..., C), t (...), conditions z (..., D_d) that broadcast -> (..., 2C)."""
        out: Tensor = self.diffloss["net"](x_t, t, z)
        return out

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Buffer and tokens."""
        return x[:, : self.buffer_size], x[:, self.buffer_size :]

    def _initialise(self) -> None:
        """Xavier linear layers; normal tokens, positions and embeddings; a head that starts at zero."""
        for name, p in self.named_parameters():
            if "norm" in name or "_ln." in name:
                continue  # ones and zeros
            if "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("_learned", "mask_token", "fake_latent")) or "_emb" in name:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p)


class DiffusionHead(nn.Module):
    """An MLP that denoises one token, given its condition."""

    def __init__(self, token_width: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(token_width, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_width)

    @override
    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predict noise and variance: x (..., C), t (...), z (..., D_d) that broadcasts -> (..., 2C)."""
        y = self.time_embed(t.flatten()).view(*t.shape, -1) + self.cond_embed(z)
        h = self.input_proj(x)
        for block in self.res_blocks:
            h = block(h, y)
        rows: Tensor = self.final_layer(h.flatten(0, -2)[:, None], y.flatten(0, -2))
        return rows.view(*x.shape[:-1], -1)


class ResidualBlock(nn.Module):
    """An MLP on the residual stream, scaled, shifted and gated by the condition (adaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    @override
    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Map a stream (..., W) with condition (..., W) to a stream (..., W)."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        out: Tensor = h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)
        return out


def _blocks(width: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    block = partial(Block, width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=_norm)
    return nn.ModuleList(block() for _ in range(depth))


def _check(config: dict[str, Any]) -> None:
    """Raise UserError if sizes do not fit together."""
    img_size, stride, patch = config["img_size"], config["vae_stride"], config["patch_size"]
    if img_size % stride:
        raise UserError(f"img_size {img_size} is not divisible by vae_stride {stride}")
    if img_size // stride % patch:
        raise UserError(f"a latent of side {img_size // stride} is not divisible by patch_size {patch}")
    for part in ("encoder", "decoder"):
        width, heads = config[f"{part}_width"], config[f"{part}_heads"]
        if width % heads:
            raise UserError(f"{part}_width {width} is not divisible by {part}_heads {heads}")
    if config["buffer_size"] < 1:
        raise UserError("buffer_size is 0; the label needs at least one slot")
