"""DiT (arXiv:2212.09748) as a backbone: checkpoints, sizes, prunable blocks."""

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

_OFFICIAL = "https://dl.fbaipublicfiles.com/DiT/models/"
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@dataclass(frozen=True, kw_only=True)
class DiT(CheckpointBackbone):
    """The diffusion transformer of Peebles and Xie (arXiv:2212.09748).

    A size that is left out is that of the checkpoint folder, else of `variant`, else the published default. A given
    size overrides the variant (a pruned XL/2: `variant: XL/2`, `depth: 14`) and must agree with the folder.

    Args:
        variant: a published size, "S/2" to "XL/8": width and patch size.
        input_size: side of the latent: an eighth of the image's.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        hidden_size: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs, relative to the width.
        class_dropout_prob: if positive, the label table has one more row, for dropped labels.
        num_classes: number of labels.
        learn_sigma: whether the network also predicts a variance.
        mlp_act: activation of the MLPs, "gelu_tanh" or "silu".
    """

    #: Table 1 of the paper; "XL/2" is size XL with patches of 2.
    variants = {
        f"{size}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
        for size, (width, depth, heads) in _SIZES.items()
        for patch in (2, 4, 8)
    }
    needed = ("hidden_size", "depth", "num_heads", "patch_size")
    shipped = Path(__file__).parent / "checkpoints"
    computed = ("pos_embed",)
    labels = ("num_classes", "y_embedder.embedding_table.weight")

    input_size: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    class_dropout_prob: float | None = None
    num_classes: int | None = None
    learn_sigma: bool | None = None
    mlp_act: str | None = None

    @classmethod
    @override
    def network(cls) -> type[nn.Module]:
        need("timm", "tinyfusion[dit]", "backbone: DiT")
        from .model import DiT as Network

        return Network

    @override
    def official(self) -> str | None:
        side = "512x512" if self.input_size == 64 else "256x256"
        return f"the official weights (of XL/2 alone: {_OFFICIAL}DiT-XL-2-{side}.pt)"

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["blocks.*"]

    @override
    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        return {"attention": Branch("attn"), "mlp": Branch("mlp")}

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        settings(model)["depth"] = len(kept["blocks"])

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return clean latents `x`, (batch, channels, side, side), and labels `y`, (batch,)."""
        config = self.config()
        side = config["input_size"]
        return {
            "x": torch.zeros(num_rows, config["in_channels"], side, side),
            "y": torch.arange(num_rows) % config["num_classes"],
        }

    @override
    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        if library != "diffusers":
            super().export(model, library, folder)
        from .convert import to_diffusers

        to_diffusers(model, settings(model)).save_pretrained(folder)

    @classmethod
    @override
    def tiny(cls) -> Self:
        return cls.random(
            input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=10
        )
