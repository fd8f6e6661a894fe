"""Somebody's own script goes on as if nothing had been pruned in the middle of it."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

import tinyfusion_core as tiny
from forks import script, start, wait
from places import TESTS


@pytest.mark.parametrize(
    ("program", "processes"),
    [
        ("accelerate_script.py", 1),
        pytest.param("accelerate_script.py", 2, marks=pytest.mark.slow),
        pytest.param(
            "lightning_script.py",
            1,
            marks=pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed"),
        ),
    ],
)
def test_a_script_goes_on_as_it_was(tmp_path: Path, program: str, processes: int) -> None:
    def weights(*words: str) -> dict[str, torch.Tensor]:
        file, log = tmp_path / f"{len(words)}.pt", tmp_path / "log.txt"
        work = partial(script, TESTS / program, file, *words)
        assert wait(start(work, log, processes)) == [0] * processes, log.read_text()[-3000:]
        found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return found

    plain, between = weights(), weights("prune")
    assert all(torch.equal(value, between[name]) for name, value in plain.items())
    assert plain.keys() == between.keys()


def test_sharding_by_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = tiny.Trainer(precision="fp32").accelerator
    for state in (PartialState, AcceleratorState):  # as a launcher sets it on GPUs
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(tiny.UserError, match="^accelerate is set to FSDP in this process, .* sharding: fsdp"):
        _ = tiny.Trainer(precision="fp32").accelerator
