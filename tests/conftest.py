"""Every test is offline and seeded; warnings are errors (see pyproject.toml).

Tests and the processes that they start use one thread, or as many as `TINYFUSION_TEST_THREADS` says.
"""

from __future__ import annotations

import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = os.environ.setdefault("TINYFUSION_TEST_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import yaml

# Fixtures import what is heavy: the process that only hands out tests has no use for it, and all others wait for it.
pytest_plugins = ["pytester"]
collect_ignore = ["third_party"]  # packages of their own, tested where they are installed

# That a machine is slow or busy is no fault of what is tested.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["TINYFUSION_TEST_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def _thawed_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


FROZEN = {"modules": 0}
"""How many modules were imported when what is alive was last left out of collections."""


@pytest.fixture(autouse=True)
def _quick_collections() -> None:
    """Every training ends with a garbage collection, which looks at all that was ever imported: half a second."""
    if (imported := len(sys.modules)) > FROZEN["modules"] + 20:
        FROZEN["modules"] = imported
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _quick_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """To make room for labels is a tenth of a run of seconds: it is made where figures are looked at."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with pytest.MonkeyPatch.context() as patch:
        if not {"reporting", "comparison", "test_before_rooms.py"} & {*request.path.parts}:
            patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """What the test makes is in double precision, so that rounding decides nothing where numbers cancel."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from small_run import RECIPE

    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that only prunes."""
    from small_run import RECIPE, run

    folder = tmp_path_factory.mktemp("finished")
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    content = {**RECIPE, "search": search, "recover": None, "evaluate": []}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert run(folder / "recipe.yaml", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder in diffusers' layout: 4 channels, half the side; scale 0.5, shift 0.25."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("autoencoder") / "tiny-vae"
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**kinds, **sizes, scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder
