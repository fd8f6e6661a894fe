"""What dropped samples contribute to the gradient of their mask, and which mask and weights are in force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.selection.learning.gated_loss import value_weights
from toys import Chain

BATCH, SCALES = 6, (1.0, 0.5, 0.8, 0.0)
BLOCKS = [f"blocks.{i}" for i in range(len(SCALES))]


def gates_of(model: Chain) -> Gates:
    return Gates(model, BLOCKS, lambda path, leaf: 0)


def masks() -> Tensor:
    mask = (torch.rand(BATCH, len(BLOCKS)) < 0.5).float()
    mask[:, 2] = 0  # nobody keeps it: one dropped sample is run with the graph
    return mask


@pytest.mark.numerics
@pytest.mark.usefixtures("float64")
def test_weights_are_factors_on_the_gradient_of_dropped_samples_alone() -> None:
    model, x, mask = Chain(8, SCALES), torch.randn(BATCH, 8), masks().double()
    weights = torch.rand(BATCH, len(BLOCKS)) + 0.5
    weights[::2, 0], weights[1, 2] = 0, 0  # not run at all

    def gradient(*given: Tensor) -> Tensor:
        leaf = mask.clone().requires_grad_()
        gates.set(leaf, *given)
        (found,) = torch.autograd.grad(model(x).square().sum(), leaf)
        return found

    with gates_of(model) as gates:
        plain = gradient()
        expected = plain * torch.where(mask == 1, 1, weights)
        assert (plain[:, :3] != 0).all()
        assert torch.allclose(gradient(weights), expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(gradient(), plain), "weights go with the mask that they were given with"


def test_a_mask_that_is_known_in_main_memory_is_not_read_from_the_device() -> None:
    """Of a tensor on the meta device nothing can be read."""
    mask, weights = masks(), torch.ones(BATCH, len(BLOCKS))
    with gates_of(Chain(8, SCALES)) as gates:
        gates.set(mask.to("meta"), weights, mask)
        assert gates._weights is not None
        assert {gates._weights.device.type, *(rows.device.type for rows in gates._rows[0])} == {"meta"}
        assert [len(kept) for kept, _, _ in gates._rows] == mask.sum(0).tolist()
        with pytest.raises(NotImplementedError, match="meta"):
            gates.set(mask.to("meta"), weights)


def test_the_mask_goes_when_the_context_closes() -> None:
    model, x = Chain(8, SCALES), torch.randn(BATCH, 8)
    plain = model(x)
    with gates_of(model) as gates:
        gates.mask = torch.zeros(BATCH, len(BLOCKS))
        assert torch.equal(model(x), x)
    assert gates.mask is None
    with gates:
        assert torch.equal(model(x), plain)


def test_a_share_of_the_values_is_weighted_to_a_mean_of_one() -> None:
    mask, share = torch.zeros(200, 50, requires_grad=True), 0.25
    weights = value_weights(mask, share, Rng(0, "search"))
    assert set(weights.unique().tolist()) == {0.0, 4.0}
    # Five standard deviations of the mean of 10,000 weights.
    assert abs(weights.mean() - 1) < 5 * (1 / share - 1) ** 0.5 / 100
    assert value_weights(mask, 1.0, Rng(0, "search")) is None
    assert value_weights(mask.detach(), share, Rng(0, "search")) is None
