"""A teacher that was trained on other data than the task's is refused, or doubted, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE, digits_task
from tinyfusion_core.cli import main
from tinyfusion_core.protocols.data import Tensors

pytestmark = pytest.mark.numerics

TRAINER = tiny.Trainer(precision="fp32")


def with_labels(change: Callable[[torch.Tensor], torch.Tensor]) -> tiny.Task:
    task = digits_task()
    columns = task.held_out.__getitems__(list(range(len(task.held_out))))
    return replace(task, held_out=Tensors({**columns, "y": change(columns["y"])}))


def test_the_right_labels_pass_in_silence() -> None:
    tiny.check_teacher(digits_task(), TRAINER)


@pytest.mark.parametrize("shift", [1, 3, 7])
def test_permuted_labels_are_refused(shift: int) -> None:
    with pytest.raises(tiny.UserError, match=r"with their labels, and 0\.\d+ with those of others: are the classes"):
        tiny.check_teacher(with_labels(lambda y: (y + shift) % 10), TRAINER)


@pytest.mark.parametrize(("more", "outcome"), [(2.0, "passes"), (1.05, "doubted"), (0.9, "refused")])
def test_how_sure_it_is_that_labels_matter(more: float, outcome: str) -> None:
    own = torch.arange(96)

    def loss_fn(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """1 with a sample's own label; with another as much more for the even ones as less for the odd ones, or not."""
        change = torch.where(batch["own"] % 2 == 0, more, -1.0)
        return torch.where(batch["y"] == batch["own"], 1.0, 1.0 + change)

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    task = tiny.wrap(model, blocks=["0", "1"], loss_fn=loss_fn, data={"own": own, "y": own})
    if outcome == "refused":
        with pytest.raises(
            tiny.UserError, match="on 96 held-out samples is 1 with their labels, and 0.95 with those of"
        ):
            tiny.check_teacher(task, TRAINER)
    elif outcome == "doubted":
        with pytest.warns(UserWarning, match="are the classes of the data in the order of the checkpoint"):
            tiny.check_teacher(task, TRAINER)
    else:
        tiny.check_teacher(task, TRAINER)


def test_one_label_for_all_says_nothing() -> None:
    tiny.check_teacher(with_labels(torch.zeros_like), TRAINER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "refused"),
    [
        (0.18215, True),
        pytest.param(1.0, False, marks=pytest.mark.slow),
        pytest.param(5.49, True, marks=pytest.mark.slow),
    ],
)
def test_latents_have_the_spread_that_their_scale_gives_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, refused: bool
) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    draws = np.random.default_rng(0)
    np.save(folder / "features.npy", (factor * draws.standard_normal((40, 1, 8, 8))).astype(np.float32))
    np.save(folder / "labels.npy", draws.integers(10, size=40))
    (folder / "metadata.json").write_text('{"format_version": 1}')
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "Latents", "init_args": {"folder": str(folder), "num_held_out": 8}}
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": data}))
    assert main(["validate", str(recipe)]) == (2 if refused else 0)
    assert ("were the latents scaled twice, or not at all?" in capsys.readouterr().err) == refused
