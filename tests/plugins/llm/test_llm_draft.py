"""A student as the draft of its teacher: what is written stays the same, as the page on language models shows."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_toys import TOKENS, decide, folder, task_of, tokenizer
from pages import examples
from places import ROOT

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my-model`, and a student of it where a run leaves it."""
    task = task_of(tokenizer(folder(tmp_path / "my-model", "llama")))
    student = tiny.prune(task, decide(task, (0, 1, 2, 3, 5)))
    tiny.save_pretrained(student, task, decide(task, (0, 1, 2, 3, 5)), tmp_path / "runs" / "my-model" / "student")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_example_writes_what_the_teacher_does(models: Path) -> None:
    (example,) = examples("docs/language-models.md")
    names: dict[str, Any] = {}
    exec(example, names)
    plain = names["teacher"].generate(**names["prompt"], do_sample=False, max_new_tokens=64)
    assert plain.shape[1] > names["prompt"].input_ids.shape[1]
    assert torch.equal(names["written"], plain)


def test_what_is_accepted_is_counted(models: Path) -> None:
    spec = spec_from_file_location("speculative", ROOT / "benchmarks" / "speculative.py")
    assert spec is not None and spec.loader is not None
    benchmark = module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    teacher, other = (AutoModelForCausalLM.from_pretrained("my-model").eval() for _ in range(2))
    student = AutoModelForCausalLM.from_pretrained("runs/my-model/student").eval()
    plain = benchmark.alone(teacher, TOKENS[:1], 25)
    itself, worse = (benchmark.speculate(teacher, draft, TOKENS[:1], 4, 25) for draft in (other, student))
    assert torch.equal(plain, itself.tokens) and torch.equal(plain, worse.tokens)
    assert (itself.accepted, itself.drafted) == (20, 20)  # five calls of the teacher, each with one token of its own
    assert 0 <= worse.accepted < worse.drafted
