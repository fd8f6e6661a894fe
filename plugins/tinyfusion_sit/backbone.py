"""SiT (arXiv:2401.08740) as a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from typing_extensions import override

from tinyfusion_core.errors import need
from tinyfusion_core.protocols.checkpoint_backbone import CheckpointBackbone
from tinyfusion_dit.backbone import DiT

_OFFICIAL = (
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?"
    "rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
)


@dataclass(frozen=True, kw_only=True)
class SiT(DiT):
    """The interpolant transformer (arXiv:2401.08740): DiT's sizes and state dict, time from 0 (noise) to 1 (data).

    Args:
        learn_sigma: whether the last layer has channels for a variance, which are discarded; the released one has.
    """

    shipped = Path(__file__).parent / "checkpoints"

    @classmethod
    @override
    def network(cls) -> type[nn.Module]:
        need("timm", "tinyfusion[sit]", "backbone: SiT")
        from .model import SiT as Network

        return Network

    @override
    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        # diffusers' DiT has the same layers, but takes time steps from 0 to 999 and gives out noise.
        CheckpointBackbone.export(self, model, library, folder)

    @override
    def official(self) -> str | None:
        return f"the official weights (of XL/2 at 256x256 alone: {_OFFICIAL})"
