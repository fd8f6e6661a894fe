"""SiT (arXiv 2401.08740) as a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tinyfusion_dit.backbone import DiT

_OFFICIAL = (
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?"
    "rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
)


@dataclass(frozen=True, kw_only=True)
class SiT(DiT):
    """The interpolant transformer of arXiv 2401.08740: DiT's sizes and state dict, time from 0 (noise) to 1 (data).

    A size left out is that of the checkpoint folder, else of `variant`, else the published default. One that
    is given overrides the variant (a pruned XL/2: `variant: XL/2`, `depth: 14`) and must agree with the folder.

    Args:
        variant: a published size, "S/2" to "XL/8": width and patch size.
        checkpoint: a folder with config.json and model.safetensors, the name of one that comes with this
            package, or a .pt, .pth or .safetensors file (EMA weights are preferred to the raw ones).
        input_size: side of the latent: an eighth of the image's.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        hidden_size: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs, relative to the width.
        class_dropout_prob: when positive, the label table has one more row, for dropped labels.
        num_classes: number of labels.
        learn_sigma: whether the last layer has channels for a variance, which are discarded; the released one has.
        mlp_act: activation of the MLPs, "gelu_tanh" or "silu".
        licence: licence of the checkpoint, for the model card.
    """

    shipped = Path(__file__).parent / "checkpoints"

    @classmethod
    def network(cls) -> type[nn.Module]:
        from .model import SiT as Network

        return Network

    def official(self) -> str | None:
        return f"the official weights (of XL/2 at 256x256 alone: {_OFFICIAL})"
