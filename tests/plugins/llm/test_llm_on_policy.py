"""Language models learn from their own texts: divergences by their formulas, and losses on what was written alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import llm_toys
import tinyfusion_core as tiny
from llm_toys import TOKENS
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.resuming.fingerprint import stage_keys
from tinyfusion_core.training.teacher_cache.samples import settings_made_of
from tinyfusion_llm import NextToken
from tinyfusion_llm.hidden import IGNORED, Hidden

pytestmark = pytest.mark.numerics

KEPT = (0, 1, 4, 5)
TRAINER = tiny.Trainer(batch_size=3, precision="fp32", seed=0)
DIVERGENCES: tuple[Any, ...] = ("forward", "reverse", 0.1, 0.5)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tiny.Task:
    return llm_toys.task_of(llm_toys.folder(tmp_path_factory.mktemp("model"), "llama"))


def plain(logits: Tensor) -> Hidden:
    """A prediction whose head changes nothing."""
    return Hidden(logits, lambda states: states)


def by_hand(divergence: Any, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A divergence of teacher p and student q, and its gradient to the student's logits."""
    if divergence == "forward":
        return (p * (p / q).log()).sum(-1), q - p
    if divergence == "reverse":
        kl = (q * (q / p).log()).sum(-1)
        return kl, q * ((q / p).log() - kl[..., None])
    m = divergence * p + (1 - divergence) * q
    kl = (q * (q / m).log()).sum(-1)
    value = divergence * (p * (p / m).log()).sum(-1) + (1 - divergence) * kl
    return value, (1 - divergence) * q * ((q / m).log() - kl[..., None])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_their_gradients_are_those_of_the_formula(divergence: Any, temperature: float) -> None:
    rng = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 5, 7, generator=rng, dtype=torch.float64).float() for _ in range(2))
    ours.requires_grad_()
    targets = torch.tensor([[1, 2, IGNORED, 3, 4], [IGNORED, IGNORED, 0, 5, IGNORED]])
    loss = NextToken(divergence=divergence, temperature=temperature, chunk=4)
    found = loss.distance(plain(ours), plain(theirs), {"targets": targets})
    found.sum().backward()
    p, q = ((x.detach().double() / temperature).softmax(-1) for x in (theirs, ours))
    value, gradient = by_hand(divergence, p, q)
    counted = (targets != IGNORED).double()
    share = counted / counted.sum(1, keepdim=True)
    assert torch.allclose(found.double(), temperature**2 * (value * share).sum(1), rtol=1e-5)
    assert ours.grad is not None
    assert torch.allclose(ours.grad.double(), temperature * gradient * share[..., None], atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_most_probable_tokens_bound_every_divergence_from_below(divergence: Any) -> None:
    ours, theirs = (torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    inputs = {"targets": torch.zeros(3, 4, dtype=torch.long)}
    some, more, whole = (
        NextToken(divergence=divergence, top_k=k).distance(plain(ours), plain(theirs), inputs) for k in (3, 19, None)
    )
    assert (some < whole).all()
    assert torch.allclose(more, whole, rtol=1e-4)  # the rest is one token


def test_a_small_share_of_the_teacher_is_the_forward_divergence() -> None:
    ours, theirs = (torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert torch.allclose(
        NextToken(divergence=1e-7)._diverging(p, q) / 1e-7, NextToken()._diverging(p, q), rtol=1e-4
    )  # as GKD says of its limit
    assert torch.allclose(
        NextToken(divergence=1 - 1e-7)._diverging(p, q) / 1e-7,
        NextToken(divergence="reverse")._diverging(p, q),
        rtol=1e-4,
    )


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 2.0, "backward"])
def test_what_is_no_divergence_is_refused(bad: Any) -> None:
    with pytest.raises(tiny.UserError, match="divergence"):
        NextToken(divergence=bad)


def test_caches_of_before_are_those_of_the_forward_divergence() -> None:
    cache = tiny.TeacherCache(folder="x")
    before = {"class": "NextToken", "chunk": "1024", "temperature": "1.0", "top_k": "64"}
    assert settings_made_of(cache, NextToken(top_k=64))["objective"] == before
    assert settings_made_of(cache, NextToken(top_k=64, divergence=0.5))["objective"] == {**before, "divergence": "0.5"}


def test_only_what_the_student_writes_counts(work: tiny.Task) -> None:
    student = tiny.prune(work, llm_toys.decide(work, KEPT)).eval()
    labels = TOKENS.clone()
    labels[1, :6] = IGNORED  # a prompt of the data; the others have none
    batch, loss, rng = {"tokens": TOKENS, "labels": labels}, NextToken(prompt_tokens=4), tiny.Rng(0, "recover")
    made, plain_made = (how(student, batch, "tokens", rng) for how in (loss.own_samples, loss.generated))
    assert torch.equal(made["tokens"], plain_made["tokens"])
    for row, kept in enumerate((4, 6, 4)):
        assert (made["labels"][row, :kept] == IGNORED).all()
        assert torch.equal(made["labels"][row, kept:], plain_made["labels"][row, kept:])
    assert torch.equal(batch["labels"], labels)
    # Another beginning with the same continuation changes no distance but by what is read.
    inputs = loss.prepare(made, rng)
    with torch.no_grad():
        ours, theirs = (loss.predict(network, inputs) for network in (student, work.teacher))
        apart = loss.distance(ours, theirs, inputs)
        ours.states[0, :3] += 1.0  # what foretells the beginning
        assert torch.equal(loss.distance(ours, theirs, inputs), apart)
        ours.states[0, 3] += 1.0  # what foretells the first of its own
        assert not torch.equal(loss.distance(ours, theirs, inputs)[0], apart[0])


def test_texts_are_written_with_a_cache(work: tiny.Task) -> None:
    student, widths = tiny.prune(work, llm_toys.decide(work, KEPT)).eval(), []
    hook = student.model.layers[0].register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    NextToken(prompt_tokens=4).own_samples(student, {"tokens": TOKENS, "labels": TOKENS}, "tokens", tiny.Rng(0, "a"))
    hook.remove()
    assert widths[0] == 4
    assert set(widths[1:]) == {1}
    assert len(widths) <= 8  # one for each token, at most


def recovered(work: tiny.Task, trainer: tiny.Trainer = TRAINER, **how: Any) -> dict[str, Tensor]:
    own = replace(work, loss=NextToken(prompt_tokens=4, divergence="reverse", top_k=20))
    decision = llm_toys.decide(own, KEPT)
    kd = tiny.OutputKD(on_policy=1.0)
    recover = tiny.Recover(**{"steps": 3, "lr": 1e-3, "kd": kd, "ema": 0.0, **how})
    student: nn.Module = recover(own, tiny.prune(own, decision), decision, trainer)
    return student.state_dict()


def test_recomputed_blocks_and_low_rank_updates_go_with_it(work: tiny.Task) -> None:
    whole = recovered(work)
    again = recovered(work, replace(TRAINER, activation_checkpointing=True))
    assert all(torch.allclose(value, whole[name], atol=1e-5) for name, value in again.items())
    low = recovered(work, update=tiny.LoRA(rank=2))
    assert low.keys() == whole.keys()
    assert any(not torch.equal(value, whole[name]) for name, value in low.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = Path(llm_toys.recipe_of(llm_toys.folder(tmp_path / "model", "llama"), tmp_path))
    content = yaml.safe_load(path.read_text())
    content["recover"] = {"steps": 2, "kd": {"class_path": "OutputKD", "init_args": {"on_policy": 0.5}}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_plan_says_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path), "--memory", "24GB"]) == 0
    out = capsys.readouterr().out
    assert "OutputKD on samples of its own in 50% of the steps" in out
    assert "recover: memory" in out


def test_options_of_sampling_decide_the_recovery(path: Path) -> None:
    def keys(*flags: str) -> dict[str, str]:
        return stage_keys(tiny.load_recipe(path, flags))

    def changed(*flags: str) -> set[str]:
        plain, other = keys(*flags[2:]), keys(*flags)
        return {stage for stage, key in plain.items() if other[stage] != key}

    hotter = ("--loss.sampling_temperature", "0.7")
    assert changed(*hotter) == {"recover", "evaluate"}
    assert changed(*hotter, "--recover.kd", "OutputKD") == {"evaluate"}
