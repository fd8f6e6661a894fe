"""One update: passes over parts of a batch add up to the whole, and a step that is not finite leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.training.objective import Objective, Optimization
from tinyfusion_core.training.steps.update import Rows, Update
from toys import Match, Planted, planted_data


class Regression(Objective):
    """The squared output for noisy inputs; remembers what the global generator gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drawn = nn.Linear(8, 4, dtype=torch.float64), list[float]()

    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        self.drawn.append(float(torch.rand(())))
        losses = self.linear(inputs["x"]).square().sum(1)
        return losses.mean(), losses.detach()


def noisy(batch: Batch, rng: Rng) -> dict[str, Tensor]:
    return {"x": batch["x"] + rng.normal("noise", batch["x"])}


def update_of(micro: int | None, clip: float = 1e9) -> Update:
    torch.manual_seed(0)
    objective, trainer = Regression(), tiny.Trainer(batch_size=12, micro_batch_size=micro, precision="fp32")
    # By default a clip that changes nothing: it would hide a wrong factor on the gradient, as AdamW does.
    how = Optimization(groups=[{"params": list(objective.parameters()), "lr": 1e-2}], steps=5, clip=clip)
    return Update(trainer, "recover", objective, noisy, how, Rows.of(trainer), None)


@pytest.mark.numerics
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(micro: int) -> None:
    batch = {"x": torch.randn(12, 8, dtype=torch.float64)}
    whole, parts = update_of(None), update_of(micro)
    (mean, norm), (mean_of_parts, norm_of_parts) = (update.accumulate(2, batch) for update in (whole, parts))
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    assert norm_of_parts.item() == pytest.approx(norm.item(), rel=1e-6)
    assert mean_of_parts.item() == pytest.approx(mean.item(), rel=1e-6)
    assert len(parts.objective.drawn) == 12 // micro


def test_the_gradient_is_clipped_and_its_norm_is_that_of_before() -> None:
    batch = {"x": torch.randn(12, 8, dtype=torch.float64)}
    plain, clipped = update_of(3), update_of(3, clip=0.25)
    norms = [update.accumulate(0, batch)[1].item() for update in (plain, clipped)]
    assert norms[0] == norms[1] > 1
    for a, b in zip(plain.parameters, clipped.parameters, strict=True):
        assert torch.allclose(b.grad, a.grad * 0.25 / norms[0], rtol=1e-5)


def test_the_global_generator_follows_from_step_and_row() -> None:
    update, batch = update_of(3), {"x": torch.randn(12, 8, dtype=torch.float64)}
    for step in (0, 1, 0):
        update.accumulate(step, batch)
    first, second, again = (update.objective.drawn[i : i + 4] for i in (0, 4, 8))
    assert first == again
    assert len({*first, *second}) == 8


def recovered(steps: int, **how) -> list[Tensor]:
    """The weights after a recovery whose third step is not finite."""
    model = Planted().build()
    remove_blocks(Planted(), model, [f"blocks.{i}" for i in (2, 5, 6, 7)])
    work = tiny.Task(backbone=Planted(), loss=Match(explode_at=(2,)), train=planted_data(), held_out=planted_data(16))
    trainer = tiny.Trainer(batch_size=16, precision="fp32")
    made = tiny.Recover(steps=steps, lr=1e-2, schedule="constant", **how)(work, model, None, trainer)
    return [p.detach() for p in made.parameters()]


@pytest.mark.numerics
def test_a_step_that_is_not_finite_does_not_move_the_average() -> None:
    first, second, last = (recovered(steps, ema=0) for steps in (1, 2, 4))
    for a, b, d, average in zip(first, second, last, recovered(4, ema=0.4), strict=True):
        # The average begins with the first weights; the third step is none.
        assert torch.allclose(average, 0.4 * (0.4 * a + 0.6 * b) + 0.6 * d, atol=1e-6)


@pytest.mark.numerics
def test_weight_decay_shrinks_what_no_gradient_moves() -> None:
    """The first block of the chain does nothing, so that its gradient is zero."""
    before = Planted().build().blocks[0].linear.weight
    assert torch.equal(recovered(1, ema=0)[0], before)
    assert torch.allclose(recovered(1, ema=0, weight_decay=0.5)[0], before * (1 - 1e-2 * 0.5), rtol=1e-6, atol=0)
