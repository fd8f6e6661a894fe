"""`import tinyfusion_core as tiny`: every name of every release before is there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_images.fidelity import Fidelity
from tinyfusion_images.samples import write_samples

ALWAYS = [
    "API_VERSION",
    "Audit",
    "BKSDM",
    "AttentionKD",
    "AttentionMapKD",
    "Backbone",
    "Batch",
    "BlockInfluence",
    "Branch",
    "BlockSampler",
    "CachedSampling",
    "Calibrated",
    "Calibration",
    "Callback",
    "CheckpointBackbone",
    "CoTrained",
    "Compare",
    "Criterion",
    "DataSource",
    "Decision",
    "Draw",
    "ExactK",
    "FeatureKD",
    "Figures",
    "Finals",
    "FirstN",
    "Frechet",
    "Frozen",
    "Full",
    "Fuse",
    "Gates",
    "GenerateData",
    "Generated",
    "Greedy",
    "GroupedSampler",
    "GumbelTopK",
    "HeldOutLoss",
    "Inherit",
    "InputOutputMSE",
    "Interrupted",
    "Keep",
    "LastN",
    "Latency",
    "LeaveOneOut",
    "LastBlocks",
    "LoRA",
    "LossAdapter",
    "MaskedKD",
    "Matching",
    "Measurement",
    "Mixture",
    "Metric",
    "Moment",
    "Nested",
    "OutputKD",
    "Picture",
    "Proposals",
    "Race",
    "Random",
    "Recover",
    "Refit",
    "RelationalKD",
    "Retention",
    "Rng",
    "Rules",
    "RunFolder",
    "Samples",
    "ScoreFunction",
    "Search",
    "Selector",
    "SpanSimilarity",
    "Spending",
    "Start",
    "Stream",
    "Task",
    "Taylor",
    "Tensors",
    "Trainer",
    "Uniform",
    "UserError",
    "WeightUpdate",
    "budgets_of",
    "check_teacher",
    "derive_taps",
    "evaluate",
    "export_run",
    "hookimpl",
    "load_plugin",
    "load_pretrained",
    "load_recipe",
    "prune",
    "push_to_hub",
    "run_recipe",
    "save_pretrained",
    "wrap",
    "write_comparison",
]


def test_every_name_is_there_and_listed() -> None:
    assert set(ALWAYS) <= set(tiny.__all__)
    assert all(getattr(tiny, name) is not None for name in tiny.__all__)
    assert not re.findall(r"\b(\w+) as (?!\1\b)", (ROOT / "tinyfusion_core" / "__init__.pyi").read_text())


@pytest.mark.parametrize(("name", "now"), [("Fidelity", Fidelity), ("write_samples", write_samples)])
def test_names_that_have_moved_stay_for_a_release(name: str, now: object) -> None:
    with pytest.warns(DeprecationWarning, match=rf"tinyfusion_core\.{name} is now tinyfusion_images\.\w+\.{name}"):
        assert getattr(tiny, name) is now


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, tinyfusion_core; print(sorted({'torch', 'numpy', 'pluggy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
