"""What caches do to the quality and the speed of sampling, of the teacher and of students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from typing_extensions import override

from ..errors import require
from ..parsing.records import read_as
from ..protocols.task import Task
from ..reporting.page import Figures, Picture
from ..runtime.distributed import on_main_process
from ..runtime.files import write_json
from ..runtime.run_folder import RunFolder
from ..training.trainer import Trainer
from . import DISTANCE
from .caching import Profile, Reusing, check_repeats, computed_share, profiled
from .frechet import Frechet
from .generation import sample_rows, training_conditions
from .latency import medians_in_turn, where_timed
from .metrics import Measurement, Models

EXHIBIT = "cached_sampling.json"
"""File in the run folder with the errors of blocks, and quality and speed at each threshold."""


class _Point(TypedDict):
    """What one network gives at one threshold; 0 is no cache. Computed calls in percent."""

    network: str
    threshold: float
    distance: float | None
    speed_up: float
    computed: float


class _Errors(TypedDict):
    """Relative differences of the blocks' changes to the call before, (num_blocks, calls); None if there is none."""

    blocks: list[str]
    errors: list[list[float | None]]


class _Found(TypedDict):
    points: list[_Point]
    profiles: dict[str, _Errors]


@dataclass(frozen=True)
class CachedSampling(Frechet):
    """Fréchet distance and speed of sampling if blocks reuse their earlier changes (SmoothCache, arXiv:2411.10510).

    A schedule says which calls of blocks are computed; it follows from a threshold and some calibration samples of the
    same network, which all processes know. Networks right after pruning are left out.

    Args:
        thresholds: relative differences that are accepted; without a cache is always measured too.
        longest: how many calls in a row a change is reused at most.
        calibration: samples that decide the schedules; as many are timed at once.
        rounds: timed samplings of each network and threshold, which take turns.
    """

    thresholds: Sequence[float] = (0.1, 0.2, 0.3)
    longest: int = 3
    calibration: int = 16
    rounds: int = 5
    exhibits = (EXHIBIT,)
    column = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.thresholds) > 0, f"{self._key}.thresholds", self.thresholds, "at least one")
        for threshold in self.thresholds:
            require(threshold >= 0, f"{self._key}.thresholds", threshold, "0 or more each")
        for name in ("longest", "calibration", "rounds"):
            require(getattr(self, name) >= 1, f"{self._key}.{name}", getattr(self, name), "at least 1")

    @override
    def check_task(self, task: Task) -> None:
        super().check_task(task)
        check_repeats(task)

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return self._rows(self._measured(task, models, trainer)["points"], task, models, trainer)

    @override
    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        found = self._measured(task, models, trainer)
        on_main_process(lambda: write_json(folder / EXHIBIT, found))
        return self._rows(found["points"], task, models, trainer)

    def _measured(self, task: Task, models: Models, trainer: Trainer) -> _Found:
        first = next(iter(models))
        networks = {name: model for name, model in models.items() if name == first or not name.endswith("pruned")}
        profiles = {
            name: profiled(task, model, trainer, self.calibration, self.longest) for name, model in networks.items()
        }
        reference, points = self.real(task), list[_Point]()
        schedules = {
            threshold: {networks[name]: profile.schedule(threshold) for name, profile in profiles.items()}
            for threshold in sorted({0.0, *self.thresholds})
        }
        cached = {
            threshold: replace(task, loss=Reusing(task.loss, task.backbone, schedule)) if threshold else task
            for threshold, schedule in schedules.items()
        }
        seconds = on_main_process(lambda: self._seconds(cached, networks, trainer))
        for threshold, each in cached.items():
            distances = self.against(reference, each, networks, trainer)[0].values
            points += [
                {
                    "network": name,
                    "threshold": threshold,
                    "distance": distances[name],
                    "speed_up": seconds[0.0, first] / seconds[threshold, name],
                    "computed": 100 * computed_share(schedules[threshold][model]),
                }
                for name, model in networks.items()
            ]
        return {
            "points": points,
            "profiles": {name: _to_the_call_before(profile) for name, profile in profiles.items()},
        }

    def _seconds(
        self, cached: Mapping[float, Task], networks: Mapping[str, nn.Module], trainer: Trainer
    ) -> dict[tuple[float, str], float]:
        """Median seconds of sampling, by threshold and network."""
        rows = range(self.calibration)
        work = {
            (threshold, name): partial(sample_rows, task, model, trainer, rows, training_conditions(task, rows))
            for threshold, task in cached.items()
            for name, model in networks.items()
        }
        return medians_in_turn(work, 1, self.rounds, trainer, "sampling with caches")

    def _rows(self, points: Sequence[_Point], task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        first = next(iter(models))
        how = f"schedules from {self.calibration} samples, a change reused at most {self.longest} times in a row"
        timed = f"speed-up over {first} without a cache, median of {self.rounds} samplings in turn"
        timed = f"{timed}, batch {self.calibration}, {where_timed(trainer)}"
        kinds = {
            "distance": Measurement(DISTANCE, better="lower", note=f"{self._how(task)}; {how}"),
            "speed_up": Measurement("sampling speed-up", unit="x", better="higher", note=timed),
            "computed": Measurement("computed calls of blocks", unit="%", better="lower", note=how),
        }
        rows = []
        for threshold in sorted({point["threshold"] for point in points}):
            found = {point["network"]: point for point in points if point["threshold"] == threshold}
            cache = f"cache {threshold:g}" if threshold else "no cache"
            for key, kind in kinds.items():
                values = {name: found[name][key] if name in found else None for name in models}  # type: ignore[literal-required]
                rows.append(replace(kind, name=f"{kind.name}, {cache}", values=values))
        return rows

    @override
    def show(self, folder: RunFolder) -> list[Figures]:
        from ..reporting.figures import draw_errors, draw_trade

        if not (folder / EXHIBIT).exists():
            return []
        found = read_as(folder / EXHIBIT, _Found, "restore it, or run with --restart-from evaluate")
        trade, pictures = folder / "figures" / "cached_sampling.svg", list[Picture]()
        draw_trade(found["points"], trade)
        for name, profile in found["profiles"].items():
            path = folder / "figures" / f"cache_errors_{name.replace(' ', '_')}.svg"
            draw_errors(name, profile["blocks"], profile["errors"], path)
            pictures.append(Picture(path))
        caption = (
            "Speed and Fréchet distance with and without caches. Beside it, how much the change that each block makes "
            "differs from that of the call before, on calibration samples; blank where the two cannot be compared."
        )
        return [Figures("Sampling with caches", caption, [Picture(trade), *pictures])]


def _to_the_call_before(profile: Profile) -> _Errors:
    errors = profile.errors[:, :, 0]
    known = torch.isfinite(errors)
    rows = [
        [value if there else None for value, there in zip(*both, strict=True)]
        for both in zip(errors.tolist(), known.tolist(), strict=True)
    ]
    return {"blocks": list(profile.blocks), "errors": rows}
