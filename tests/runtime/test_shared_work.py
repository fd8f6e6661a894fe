"""Processes share evaluation, criteria and sampling: the numbers are those of one process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import shared_work
import tinyfusion_core as tiny
from forks import command, start, wait
from small_run import RECIPE
from tinyfusion_images.samples import write_samples


def close(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name, value in one.items():
            close(value, two[name])
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            close(a, b)
    else:
        assert one == (pytest.approx(two, rel=1e-4, abs=1e-6) if isinstance(two, float) else two)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert wait(start(partial(shared_work.main, tmp_path, finished), log, processes=2)) == [0, 0], log.read_text()
    two = json.loads((tmp_path / "found.json").read_text())
    assert two.pop("failure") == ["it failed on process 0"] * 2
    assert "the other processes waiting" in two.pop("latency")
    one = json.loads(json.dumps(shared_work.figures()))
    assert len(one) > 30
    close(one, two)
    assert "is it the right checkpoint" in one["untrained"]
    assert two["mar"] == one["mar"]  # batches are not cut, so that what is drawn for one stays the same
    # Samples: the same in one process, as files and as an archive, whatever the batch.
    write_samples(tiny.RunFolder(finished), 11, 5, tmp_path / "alone", batch_size=11)
    with np.load(tmp_path / "set.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (11, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0]
    for i, image in enumerate(images):
        shared = np.asarray(Image.open(tmp_path / "pictures" / f"{i:06d}.png"))
        single = np.asarray(Image.open(tmp_path / "alone" / f"{i:06d}.png"))
        assert np.array_equal(image, np.repeat(shared[..., None], 3, 2))
        assert np.abs(shared.astype(int) - single).max() <= 1
    assert images.std() > 20
    assert not (tmp_path / "set.npz.parts").exists()


@pytest.mark.slow
def test_two_processes_compare_as_one_does(tmp_path: Path) -> None:
    content = {**RECIPE, "compare": {"seeds": 1, "random": 2}, "search": {"pattern": [2, 4], "steps": 4}}
    content["recover"] = {"steps": 4}
    content["evaluate"] = [
        *RECIPE["evaluate"],
        {"class_path": "Frechet", "init_args": {"num_samples": 20, "batch_size": 6}},
    ]
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(content))
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        log = tmp_path / f"{name}.txt"
        work = command("compare", recipe, "--run-dir", tmp_path / name)
        assert set(wait(start(work, log, processes), 500)) == {0}, log.read_text()[-3000:]
        findings = json.loads((tmp_path / name / "findings.json").read_text())
        for trial in [*findings["trials"], *findings["masks"]]:
            trial.pop("seconds", None)
            trial.pop("recovery_seconds", None)
        found.append(findings)
    close(
        {k: v for k, v in found[0].items() if k != "versions"}, {k: v for k, v in found[1].items() if k != "versions"}
    )
