"""MAR (arXiv:2406.11838) as a backbone: two stacks of prunable blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import need
from tinyfusion_core.protocols.blocks.branches import Branch
from tinyfusion_core.protocols.checkpoint_backbone import CheckpointBackbone, settings

_SIZES = {"base": (768, 12, 12, 1024, 6), "large": (1024, 16, 16, 1280, 8), "huge": (1280, 20, 16, 1536, 12)}
_OFFICIAL = {
    "base": "https://www.dropbox.com/scl/fi/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
    "large": "https://www.dropbox.com/scl/fi/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
    "huge": "https://www.dropbox.com/scl/fi/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",
}


@dataclass(frozen=True, kw_only=True)
class MAR(CheckpointBackbone):
    """The masked autoregressive transformer of Li et al. (arXiv:2406.11838), with prunable encoder and decoder blocks.

    A size that is left out is that of the checkpoint folder, else of `variant`, else that of "large". A given size
    overrides the variant (`variant: large`, `encoder_depth: 8`) and must agree with the folder.

    Args:
        variant: a published size: "base", "large" or "huge".
        img_size: side of the image in pixels.
        vae_stride: pixels per position of the latent, along each side.
        patch_size: side of a token, in positions of the latent; the loss has the same option.
        in_channels: channels of the latent.
        encoder_width: width of the encoder.
        encoder_depth: number of encoder blocks.
        encoder_heads: attention heads of an encoder block.
        decoder_width: width of the decoder.
        decoder_depth: number of decoder blocks.
        decoder_heads: attention heads of a decoder block.
        mlp_ratio: hidden width of the MLPs, relative to the width.
        num_classes: number of labels.
        buffer_size: slots in front of the tokens that hold the label.
        head_width: width of the diffusion head.
        head_depth: number of residual blocks of the diffusion head.
    """

    variants = {
        name: {
            **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in stack.items()},
            "head_width": head_width,
            "head_depth": head_depth,
        }
        for name, (width, depth, heads, head_width, head_depth) in _SIZES.items()
        for stack in [{"width": width, "depth": depth, "heads": heads}]
    }
    needed = tuple(variants["base"])
    shipped = Path(__file__).parent / "checkpoints"
    containers = ("model_ema", "model")
    labels = ("num_classes", "class_emb.weight")

    img_size: int | None = None
    vae_stride: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    encoder_width: int | None = None
    encoder_depth: int | None = None
    encoder_heads: int | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    mlp_ratio: float | None = None
    num_classes: int | None = None
    buffer_size: int | None = None
    head_width: int | None = None
    head_depth: int | None = None

    @classmethod
    @override
    def network(cls) -> type[nn.Module]:
        need("timm", "tinyfusion[mar]", "backbone: MAR")
        from . import model

        return model.MAR

    @override
    def official(self) -> str | None:
        links = {name: link for name, link in _OFFICIAL.items() if self.variant in (name, None)} or _OFFICIAL
        return f"the official weights ({', '.join(f'of {name}: {link}' for name, link in links.items())})"

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["encoder_blocks.*", "decoder_blocks.*"]

    @override
    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        return {"attention": Branch("attn"), "mlp": Branch("mlp")}

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        for part in ("encoder", "decoder"):
            settings(model)[f"{part}_depth"] = len(kept[f"{part}_blocks"])

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return clean latents `x`, (batch, channels, side, side), and labels `y`, (batch,)."""
        config = self.config()
        side = config["img_size"] // config["vae_stride"]
        return {
            "x": torch.zeros(num_rows, config["in_channels"], side, side),
            "y": torch.arange(num_rows) % config["num_classes"],
        }

    @classmethod
    @override
    def tiny(cls) -> Self:
        return cls.random(
            img_size=8, vae_stride=2, in_channels=3, encoder_width=16, encoder_depth=4, encoder_heads=2,
            decoder_width=24, decoder_depth=3, decoder_heads=2, mlp_ratio=2.0, num_classes=10, buffer_size=3,
            head_width=16, head_depth=2,
        )  # fmt: skip
