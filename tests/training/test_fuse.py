"""The start that folds dropped blocks into those beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interrupted
import tinyfusion_core as tiny
from diffusers_tasks import make
from forks import start, wait
from llm_toys import folder
from llm_toys import task_of as language_task
from marks import slow_but
from mixed_blocks import fused, mixed
from small_run import digits_task
from starting import TRAINER, loss_of, started
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.training.starts.fuse import Grafts, folds_of
from toys import DoubleNet, LinearNet, Match, StopAt, learning_back

pytestmark = pytest.mark.numerics
SMALL = tiny.Fuse(rank=2, steps=4)
NONE = tiny.Fuse(steps=1, lr=1e-30)
"""Its coefficients are as good as zero."""


def changed(task: tiny.Task, kept: list[int], student: nn.Module) -> set[str]:
    plain = tiny.prune(task, tiny.Keep(kept)(task, TRAINER)).state_dict()
    return {name for name, t in student.state_dict().items() if not torch.equal(t, plain[name])}


def decision_of(lists: dict[str, int], kept: tuple[int, ...]) -> tiny.Decision:
    blocks = tuple(f"{name}.{i}" for name, depth in lists.items() for i in range(depth))
    return tiny.Decision(blocks=blocks, kept=kept, method="Keep")


@pytest.mark.parametrize(
    ("lists", "kept", "folds"),
    [
        ({"a": 8}, (0, 1, 3, 6), {1: [2], 2: [4, 5], 3: [7]}),
        ({"a": 6}, (2, 3, 4), {0: [0, 1], 2: [5]}),
        ({"a": 4}, (1,), {0: [0, 2, 3]}),
        ({"a": 3, "b": 4}, (0, 1, 4, 6), {1: [2], 2: [3, 5]}),
        ({"a": 2, "b": 2}, (2, 3), {}),  # nothing of the first list is left
        ({"a": 3}, (0, 1, 2), {}),
    ],
)
def test_a_block_goes_into_the_one_before_it(
    lists: dict[str, int], kept: tuple[int, ...], folds: dict[int, list[int]]
) -> None:
    assert folds_of(decision_of(lists, kept)) == folds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_the_sum_by_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, (first, second) = nn.Conv1d(4, 3, 2).to(dtype), torch.randn(2, 3, 4, 2, dtype=dtype)
    grafts = Grafts(block, {"weight": [first, second]}, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(t, block.weight) and t.dtype == dtype for t in grafts.weights().values())
    with torch.no_grad():
        for p in grafts.left:
            p.normal_()
    expected = block.weight
    for a, b, other in zip(grafts.left, grafts.right, (first, second), strict=True):
        expected = expected + torch.einsum("or,rik->oik", a, b.view(2, 4, 2)) * other
    torch.testing.assert_close(grafts.weights()["weight"], expected.to(dtype))


@pytest.mark.parametrize("kept", [[0, 1, 3, 6], [4, 5], [7]])
def test_without_coefficients_it_is_the_pruned_network_bit_for_bit(kept: list[int]) -> None:
    task = digits_task()
    assert not changed(task, kept, started(task, kept, NONE))


class Unbiased(LinearNet):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            nn.init.zeros_(layer.linear.bias)


@pytest.mark.parametrize("kept", slow_but([[0, 2], [1, 3], [1, 2]], [0, 2]))
def test_what_linear_blocks_did_is_done_by_those_beside_them(kept: list[int]) -> None:
    torch.manual_seed(0)
    task = learning_back(Unbiased().eval())
    deleted = tiny.prune(task, tiny.Keep(kept)(task, TRAINER))
    found = started(task, kept, tiny.Fuse(steps=400))
    assert loss_of(task, deleted) > 1e-2
    assert loss_of(task, found) < 1e-3 * loss_of(task, deleted)


@pytest.mark.slow
def test_the_quickstarts_student_begins_far_nearer_to_its_teacher() -> None:
    task, kept = digits_task(), [0, 1, 3, 6]
    before = {name: t.clone() for name, t in task.teacher.state_dict().items()}
    found = started(task, kept, tiny.Fuse(steps=20))
    assert loss_of(task, found) < 0.6 * loss_of(task, tiny.prune(task, tiny.Keep(kept)(task, TRAINER)))
    assert all(torch.equal(t, before[name]) for name, t in task.teacher.state_dict().items())
    names = changed(task, kept, found)
    assert {name.split(".")[1] for name in names} == {"1", "2", "3"}  # beside gaps
    assert all(name.startswith("blocks.") and found.get_parameter(name).ndim == 2 for name in names)


STREAMED = ("SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")


@pytest.mark.parametrize("family", slow_but(STREAMED, STREAMED[-1]))
def test_lists_and_streams_of_diffusers(family: str) -> None:
    task, _ = make(family)
    SMALL.check(task)
    kept = [0, len(task.blocks) - 1]
    student = started(task, kept, SMALL, tiny.Trainer(batch_size=9, precision="fp32", progress=False))
    assert changed(task, kept, student)


@pytest.mark.slow
def test_two_streams_count_alike() -> None:
    torch.manual_seed(0)
    net = DoubleNet(depth=4).eval()
    hidden, text = torch.randn(64, 3, 8), torch.randn(64, 2, 8)
    with torch.no_grad():
        y = net(hidden, text)

    def loss(model: nn.Module, batch: tiny.Batch) -> Tensor:
        return (model(batch["hidden"], batch["text"]) - batch["y"]).square().mean((1, 2))

    streams = (tiny.Stream("hidden", 1), tiny.Stream("encoder", 0))
    task = tiny.wrap(
        net, blocks="blocks.*", loss_fn=loss, data={"hidden": hidden, "text": text, "y": y}, streams=streams
    )
    deleted = tiny.prune(task, tiny.Keep([0, 2])(task, TRAINER))
    found = started(task, [0, 2], tiny.Fuse(steps=200))
    assert loss_of(task, found) < 0.3 * loss_of(task, deleted)
    assert {name.split(".")[2] for name in changed(task, [0, 2], found)} == {"image", "text"}


@pytest.mark.slow
def test_language_models_in_bf16(tmp_path: Path) -> None:
    task = language_task(folder(tmp_path / "model", "llama"))
    task.teacher.bfloat16()
    kept = [0, 1, 4, 5]
    assert not changed(task, kept, started(task, kept, NONE))
    found = started(task, kept, tiny.Fuse(steps=30))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert changed(task, kept, found)


def test_what_does_not_match_is_left_alone() -> None:
    task = mixed(4, 4, 6, 7)
    assert changed(task, [0, 2], started(task, [0, 2], SMALL)) == {"layers.0.up.weight", "layers.0.down.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(tmp_path: Path, sharding: str) -> None:
    log = tmp_path / "log.txt"
    done = wait(start(partial(fused, tmp_path / "found.pt", sharding), log, processes=2), 200)
    assert done == [0, 0], log.read_text()[-4000:]
    alone = started(mixed(4, 4, 4, 4), [0, 2], SMALL).state_dict()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, t in alone.items():
        torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-6)


def test_a_recovery_from_there_resumes_bit_for_bit(tmp_path: Path) -> None:
    how, trainer, run = tiny.Recover(steps=20, lr=1e-2, start=SMALL), interrupted.TRAINER, tiny.RunFolder(tmp_path)

    def recovered(loss: tiny.LossAdapter, run: tiny.RunFolder | None) -> dict[str, Tensor]:
        task = interrupted.task(loss)
        decision = tiny.Keep([1, 3, 4])(task, trainer)
        return how(task, tiny.prune(task, decision), decision, trainer, run).state_dict()

    with pytest.raises(Interrupted, match="stopped at step 12 of 20 of recover"):
        recovered(StopAt(), run)
    interrupted.assert_equal(recovered(Match(), run), recovered(Match(), None))


def test_blocks_of_different_shapes_are_refused() -> None:
    with pytest.raises(tiny.UserError, match=r"start: Fuse finds no two blocks side by side"):
        SMALL.check(mixed(4, 5, 6, 7))


def test_branches_are_refused() -> None:
    task = digits_task()
    backbone = type(task.backbone)(checkpoint="digits", units=["attention", "mlp"])
    units = tiny.Task(backbone=backbone, loss=task.loss, train=task.train, held_out=task.held_out)
    with pytest.raises(tiny.UserError, match=r"start: Fuse folds whole blocks, and units takes them apart"):
        SMALL.check(units)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"steps": 0}, {"lr": 0.0}])
def test_settings_outside_of_their_range(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(tiny.UserError, match=rf"start\.{name} is 0"):
        tiny.Fuse(**settings)
