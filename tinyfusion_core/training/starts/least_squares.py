"""Linear least squares under gates, summed up over samples."""

from __future__ import annotations

import torch
from torch import Tensor

TOGETHER = 2**27
"""How many numbers the matrices hold that are solved at a time."""


class LeastSquares:
    """Finds the map D that brings gate * (D features) nearest to a target.

    Each output channel c is a problem of its own, in which a token counts with the square of the channel's gate. With
    features F_s, target t_s and gate g_s of sample s, the normal equations are
    (sum_s g_sc^2 F_s^T F_s) d_c = sum_s g_sc F_s^T t_sc. Samples of the same gates share a matrix, so that without
    gates there is one for all channels. All is in double precision.
    """

    def __init__(self) -> None:
        self._grams: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._right: Tensor | None = None

    def add(self, features: Tensor, target: Tensor, gate: Tensor) -> None:
        """Add a sample.

        Args:
            features: (rows, inputs), a row for each token.
            target: (rows, channels).
            gate: (channels,).
        """
        features, target, gate = features.double(), target.double(), gate.double()
        gram, right = features.T @ features, features.T @ (gate * target)
        if self._gates and torch.equal(self._gates[-1], gate):
            self._grams[-1] += gram
        else:
            self._grams.append(gram)
            self._gates.append(gate)
        self._right = right if self._right is None else self._right + right

    def solve(self, ridge: float) -> Tensor:
        """Return the map, (channels, inputs).

        Args:
            ridge: weight of the map's squares, as a fraction of the mean square of the features.
        """
        assert self._right is not None
        right, weights = self._right.T, torch.stack(self._gates).square()  # (channels, inputs), (samples, channels)
        if len(self._grams) == 1:  # the channels differ by a factor
            weight = weights[0].clamp(min=torch.finfo(torch.float64).tiny)
            solved: Tensor = torch.linalg.solve(_ridged(self._grams[0], ridge), right.T).T
            return solved / weight[:, None]
        grams, found = torch.stack(self._grams).flatten(1), torch.empty_like(right)
        num_inputs = right.shape[1]
        num_channels = max(1, TOGETHER // num_inputs**2)
        for first in range(0, len(right), num_channels):
            some = slice(first, first + num_channels)
            matrices = (weights[:, some].T @ grams).view(-1, num_inputs, num_inputs)
            found[some] = torch.linalg.solve(_ridged(matrices, ridge), right[some])
        return found


def _ridged(matrices: Tensor, ridge: float) -> Tensor:
    """Matrices, (..., inputs, inputs), with a fraction of their mean diagonal added to it; of nothing, the identity."""
    size = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(size > 0, ridge * size, 1.0)
    return matrices + added[..., None, None] * torch.eye(matrices.shape[-1], dtype=matrices.dtype).to(matrices.device)
