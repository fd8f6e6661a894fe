"""The network of SiT (arXiv:2401.08740).

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers".
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from tinyfusion_dit.model import DiT


class SiT(DiT):
    """DiT's network with the same parameters, in continuous time.

    Time runs from 0 (noise) to 1 (data) and is fed to the sinusoids unchanged. With `learn_sigma`, as in the released
    checkpoint, the last layer has twice the channels, and the second half of them is discarded.
    """

    @override
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity, the noise or the score, whichever the network was trained for.

        Args:
            x: (B, C, S, S) point of the path.
            t: (B,) times in [0, 1].
            y: (B,) int64 labels.

        Returns:
            (B, C, S, S)
        """
        return super().forward(x, t, y)[:, : self.in_channels]
