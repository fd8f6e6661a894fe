"""Every heuristic: planted truth, budgets, positions, and what cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import tinyfusion_core as tiny
from criteria_tasks import TRAINER, given, planted, scores
from small_run import RECIPE
from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.demands import Spending
from tinyfusion_core.selection.criteria.base import Criterion
from tinyfusion_core.selection.criteria.calibration import Calibrated, Calibration
from tinyfusion_core.selection.criteria.positions import BKSDM, FirstN, LastN, Uniform
from tinyfusion_core.selection.criteria.sensitivity import Greedy, LeaveOneOut, Random, Taylor
from tinyfusion_core.selection.criteria.similarity import BlockInfluence, InputOutputMSE, SpanSimilarity
from toys import Match, Net

pytestmark = pytest.mark.numerics

POSITIONS = [Uniform, FirstN, LastN, BKSDM]


SCORES = [BlockInfluence, InputOutputMSE, LeaveOneOut, Taylor]


DATA = [*SCORES, Greedy, SpanSimilarity]


ALL = [*POSITIONS, Random, *DATA]


WORKING = (1, 3, 4, 7)


@pytest.mark.parametrize(
    ("criterion", "num", "keep", "kept"),
    [
        (Uniform, 8, 4, (1, 3, 5, 7)),
        (Uniform, 7, 3, (1, 3, 6)),
        (FirstN, 8, 3, (0, 1, 2)),
        (LastN, 8, 3, (5, 6, 7)),
        (BKSDM, 8, 4, (0, 2, 5, 7)),
        (BKSDM, 28, 14, (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27)),  # the published oracle
        (BKSDM, 8, 1, (0,)),
    ],
)
def test_positions(criterion: type[Criterion], num: int, keep: int, kept: tuple[int, ...]) -> None:
    blocks = [f"blocks.{i}" for i in range(num)]
    assert criterion(keep=keep).preview(blocks).kept == kept


def test_positions_in_groups_and_around_protected_blocks() -> None:
    blocks = [f"blocks.{i}" for i in range(8)]
    assert LastN(pattern=(1, 4)).preview(blocks).kept == (3, 7)
    assert Uniform(pattern=[(1, 2), (3, 6)]).preview(blocks).kept == (1, 3, 5, 7)
    assert FirstN(keep=3, protect=[6]).preview(blocks).kept == (0, 1, 6)
    assert LastN(keep={"a": 1, "b": 2}).preview(["a.0", "a.1", "b.0", "b.1", "b.2"]).kept == (1, 3, 4)


def test_random_masks_are_a_function_of_both_seeds() -> None:
    kept = {seed: Random(keep=4, seed=seed)(planted(), TRAINER).kept for seed in range(8)}
    assert len(set(kept.values())) > 4
    assert kept[3] == Random(keep=4, seed=3)(planted(), TRAINER).kept
    others = [Random(keep=4, seed=s)(planted(), replace(TRAINER, seed=1)).kept for s in range(8)]
    assert others != list(kept.values())


def test_of_several_draws_the_lowest_calibration_loss_is_taken() -> None:
    decision = Random(keep=4, draws=12)(planted(), TRAINER)
    losses = decision.provenance["losses"]
    assert len(losses) == 12
    assert decision.provenance["evaluations"] == 12 * 64
    kept = torch.zeros(1, 8)
    kept[0, list(decision.kept)] = 1
    assert Calibration(planted(), TRAINER, 256, 64).losses(kept) == pytest.approx([min(losses)], rel=1e-5)
    assert Random(keep=4, draws=500)(planted(), TRAINER).kept == WORKING  # all 70 masks
    assert Random(keep=4, protect=[0, 1, 3, 4], draws=5)(planted(), TRAINER).kept == (0, 1, 3, 4)


class Shifted(Match):
    """The full chain is not perfect: where the loss has its minimum its slopes say nothing."""

    def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        inputs = super().prepare(batch, rng)
        return {**inputs, "target": inputs["target"] + 0.1 * rng.normal("shift", inputs["target"])}


@pytest.mark.parametrize("criterion", [*SCORES, Greedy])
@pytest.mark.parametrize("budget", [{"keep": 4}, {"pattern": (2, 4)}, {"keep": {"blocks": 4}}])
def test_finds_the_planted_blocks(criterion: type[Criterion], budget: dict[str, Any]) -> None:
    assert criterion(**budget)(planted(Shifted()), TRAINER).kept == WORKING


@pytest.mark.parametrize("measure", ["cosine", "cka"])
def test_finds_the_planted_span(measure: Any) -> None:
    task = planted(scales=(1, 1, 1, 0, 0, 0, 1, 0))
    assert SpanSimilarity(keep=5, measure=measure)(task, TRAINER).kept == (0, 1, 2, 6, 7)
    assert SpanSimilarity(pattern=[(3, 4), (2, 4)], measure=measure)(task, TRAINER).kept == (0, 1, 2, 6, 7)


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        ({"keep": 3, "protect": [0, 6]}, [(range(8), 3)]),
        ({"pattern": (1, 2)}, [(range(i, i + 2), 1) for i in (0, 2, 4, 6)]),
        ({"pattern": [(3, 5), (1, 3)], "protect": [2]}, [(range(5), 3), (range(5, 8), 1)]),
    ],
)
def test_obeys_the_budget(criterion: type[Criterion], budget: dict[str, Any], groups: list[Any], tmp_path) -> None:
    how = criterion(**budget)
    task = planted()
    decision = how(task, TRAINER)
    for made in (decision, how.preview(task.blocks)):
        assert [len(set(made.kept) & set(members)) for members, _ in groups] == [num for _, num in groups]
        assert set(budget.get("protect", ())) <= set(made.kept)
        assert made.method == criterion.__name__
        assert made.choices == (tuple(tuple(g) for g, _ in groups) if "pattern" in budget else ())
        assert made.confidence is None
    decision.save(tmp_path / "decision.json")
    assert tiny.Decision.load(tmp_path / "decision.json").kept == decision.kept
    assert decision.provenance["evaluations"] % 64 == 0
    assert (decision.provenance["evaluations"] > 0) == (criterion in DATA)


@pytest.mark.parametrize("criterion", ALL)
def test_two_block_lists(criterion: type[Criterion]) -> None:
    task = given(Net(depths=(4, 2)), {"x": torch.randn(6, 3, 8), "c": torch.randn(6, 8)}, paths=("first.*", "second.*"))
    assert len(criterion(keep=4)(task, TRAINER).kept) == 4
    by_list = criterion(keep={"first": 3, "second": 1})(task, TRAINER).kept
    assert (len(by_list), sum(i < 4 for i in by_list)) == (4, 3)
    assert criterion(keep={"first": 0, "second": 1})(task, TRAINER).kept[0] in (4, 5)
    by_group = criterion(pattern={"first": (1, 2), "second": (2, 2)})(task, TRAINER).kept
    assert [len({i // 2 for i in by_group}), by_group[-2:]] == [3, (4, 5)]


@pytest.mark.parametrize("criterion", DATA)
def test_batches_change_nothing_and_two_calls_agree(criterion: type[Calibrated]) -> None:
    whole, again, parts = (criterion(keep=4, samples=48, batch_size=n)(planted(), TRAINER) for n in (64, 64, 5))
    assert whole == again
    assert whole.kept == parts.kept

    def numbers(found: Any) -> list[float]:
        return torch.utils._pytree.tree_leaves(found)

    for key in {"scores", "losses", "spans"} & set(whole.provenance):
        assert numbers(parts.provenance[key]) == pytest.approx(numbers(whole.provenance[key]), rel=1e-4, abs=1e-6)
    assert parts.provenance["evaluations"] == whole.provenance["evaluations"]


def test_every_criterion_sees_the_same_inputs_spread_over_the_data_and_the_time_steps() -> None:
    seen: list[Tensor] = []

    class Recorded(Match):
        def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
            inputs = super().prepare(batch, rng)
            if rng.stage == "calibration":
                t = rng.integers("time", 48, len(inputs["x"]))
                seen.append(torch.cat([inputs["x"], batch["x"], t[:, None]], dim=1))
            return inputs

    runs = []
    for criterion, batch_size in [(BlockInfluence, 64), (Taylor, 7), (LeaveOneOut, 20)]:
        seen.clear()
        criterion(keep=4, samples=48, batch_size=batch_size)(planted(Recorded()), TRAINER)
        runs.append(torch.cat(seen))
    assert runs[0].shape == (48, 17)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert sorted(runs[0][:, -1].tolist()) == list(range(48))
    assert len(runs[0][:, 8:16].unique(dim=0)) == 48  # no sample twice


class Stop(Exception):
    pass


class Failing(Match):
    """Fails in the second batch."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        if len(inputs["x"]) == 14:
            raise Stop
        return super().predict(model, inputs)


@pytest.mark.parametrize("criterion", [*DATA, Random])
@pytest.mark.parametrize("fail", [False, True])
def test_the_network_comes_back_as_it_was(criterion: type[Criterion], fail: bool) -> None:
    task = planted(Failing() if fail else None)
    model = task.teacher
    model.blocks[2].requires_grad_(False)
    model.blocks[3].train()

    def state() -> list[Any]:
        return [
            {name: v.clone() for name, v in model.state_dict().items()},
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [m.training for m in model.modules()],
            [set(m.__dict__) for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    weights_before, *before = state()
    options = {"draws": 2} if criterion is Random else {}
    how = criterion(keep=4, batch_size=50, **options)
    if fail:
        with pytest.raises(Stop):
            how(task, TRAINER)
    else:
        how(task, TRAINER)
    weights_after, *after = state()
    assert after == before
    assert all(torch.equal(v, weights_after[name]) for name, v in weights_before.items())


def test_the_whole_data_set_when_it_is_smaller() -> None:
    assert BlockInfluence(keep=4, samples=10_000)(planted(), TRAINER).provenance["evaluations"] == 64
    assert BlockInfluence(keep=4, samples=10)(planted(), TRAINER).provenance["evaluations"] == 10


class Exploding(Match):
    """Not a number as soon as block 1 is missing; `always`: even when it is there."""

    always: bool = False

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        losses = super().loss(prediction, inputs)
        full = losses.max() < 0.3
        return losses if full and not self.always else losses * float("nan")


class AlwaysExploding(Exploding):
    always = True


def test_blocks_without_which_the_loss_explodes_are_kept(tmp_path) -> None:
    decision = LeaveOneOut(keep=4)(planted(Exploding()), TRAINER)
    assert decision.kept == WORKING
    decision.save(tmp_path / "decision.json")
    assert scores(tiny.Decision.load(tmp_path / "decision.json"))[1] is None
    assert Greedy(keep=4)(planted(Exploding()), TRAINER).kept == WORKING


@pytest.mark.parametrize("criterion", [LeaveOneOut, Greedy, Taylor])
def test_a_loss_that_is_never_finite_is_an_error(criterion: type[Criterion]) -> None:
    with pytest.raises(UserError, match=f"{criterion.__name__}: what the calibration samples give is not finite"):
        criterion(keep=4)(planted(AlwaysExploding()), TRAINER)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(), "Uniform: give keep or pattern or budget, one of the three"),
        (lambda: Taylor(keep=4, pattern=(2, 4)), "Taylor: give keep or pattern or budget, one of the three"),
        (lambda: Greedy(keep=4, samples=0), r"Greedy\.samples is 0; expected at least 1"),
        (lambda: Greedy(keep=4, batch_size=0), r"Greedy\.batch_size is 0; expected at least 1"),
        (lambda: Random(keep=4, draws=0), r"Random\.draws is 0; expected at least 1"),
        (lambda: Greedy(pattern=124), r"124 is no pattern\. Give \[keep, of\]"),
        (lambda: Greedy(keep=9)(planted(), TRAINER), r"Greedy\.keep is 9; expected 1 to 8 blocks"),
        (lambda: Uniform(pattern=(0, 8))(planted(), TRAINER), r"Uniform\.pattern: keeps no block at all"),
        (lambda: Greedy(keep=2, protect=[1, 3, 4])(planted(), TRAINER), "keeps 2 of its 8 blocks, but 3 are protected"),
        (
            lambda: SpanSimilarity(pattern=(1, 4), protect=[5])(planted(), TRAINER),
            r"group 2 \(blocks 4 to 7\) has no 3 blocks in a row .*\(protected: \[5\]\)",
        ),
        (lambda: SpanSimilarity(keep=1).preview(["a.0", "a.1", "b.0", "b.1"]), "no 3 blocks in a row inside one block"),
        (lambda: SpanSimilarity(keep=2).preview(["a.0", "b.0", "a.1", "b.1"]), "no 2 blocks in a row inside one block"),
        (lambda: BlockInfluence(keep=4, reference=True)(planted(), TRAINER), "Match has no inputs without noise"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("criterion", ALL)
def test_recipes_name_them(criterion: type[Criterion], tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    options = {"pattern": [2, 4], "protect": [1]}
    path.write_text(yaml.safe_dump({**RECIPE, "search": {"class_path": criterion.__name__, "init_args": options}}))
    made = tiny.load_recipe(path).search
    assert type(made) is criterion
    assert (made.pattern, list(made.protect)) == ((2, 4), [1])


@pytest.mark.parametrize("criterion", [c for c in ALL if c is not SpanSimilarity])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 4, "constraints": Rules(max_run=2, together=[[3, 4]], remove=[6])},
        {"pattern": (2, 4), "constraints": Rules(max_run=2)},
        {"constraints": Rules(costs=[1, 2, 1, 2, 1, 2, 1, 2], budget=6, protect=[5])},
    ],
)
def test_every_criterion_obeys_constraints(criterion: type[Criterion], options: dict[str, Any]) -> None:
    how, task = criterion(**options), planted()
    allowed = how.compiled(task.blocks)
    assert allowed.accepts(how.preview(task.blocks).kept)
    assert allowed.accepts(how(task, TRAINER).kept)


def test_a_span_obeys_constraints_or_says_why_it_cannot() -> None:
    how = SpanSimilarity(keep=5, constraints=Rules(together=[[0, 1]]))
    assert set(how(planted(), TRAINER).kept) & {0, 1} in (set(), {0, 1})
    with pytest.raises(UserError, match="removes a run of every group or list by itself"):
        SpanSimilarity(pattern=(2, 4), constraints=Rules(max_run=2)).preview(planted().blocks)


def test_a_search_takes_constraints() -> None:
    blocks = planted().blocks
    by_number = tiny.Search(keep=4, protect=[0], constraints=Rules(max_run=2))
    sampler = by_number.make_sampler({"blocks": 8})
    assert sampler.allows([0, 3, 5, 6]) and not sampler.allows([1, 3, 5, 6]) and not sampler.allows([0, 4, 5, 6])
    grouped = tiny.Search(pattern=(2, 4), protect=[0], constraints=Rules(remove=[7])).make_sampler({"blocks": 8})
    assert grouped.num_masks == 3 * 3
    assert grouped.allows([0, 3, 4, 5]) and not grouped.allows([1, 3, 4, 5]) and not grouped.allows([0, 1, 6, 7])
    costs = tiny.Search(constraints=Rules(costs=[1] * 8, budget=3))
    assert len(costs.preview(blocks).kept) == 3 and costs.keeps(blocks) == Spending((1,) * 8, 3)
    for wrong, message in (
        ({"pattern": (2, 4), "constraints": Rules(max_run=2)}, r"^constraints\.max_run: .*use keep"),
        ({"keep": 4, "constraints": Rules(keep=4)}, r"^constraints\.keep: say it as keep"),
        ({"keep": 4, "constraints": Rules(costs=[1] * 8, budget=3)}, "one of the four"),
        ({"keep": 4, "constraints": Rules(budget=3)}, "costs and budget go together"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.Search(**wrong)
    with pytest.raises(UserError, match=r"^constraints: no mask of 8 blocks obeys"):
        tiny.Search(keep=2, constraints=Rules(max_run=1)).preview(blocks)
    with pytest.raises(UserError, match=r"group 2 \(blocks 4 to 7\) cannot keep 2 of 4"):
        tiny.Search(pattern=(2, 4), protect=[4, 5, 6]).preview(blocks)
