"""Every heuristic: numbers worked out by hand, planted truth, budgets, and the published block influence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

import golden_data
import tinyfusion_core as tiny
from golden_data import assert_close_rel, weights
from small_run import RECIPE
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Backbone, Stream
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.selection.calibration import Calibrated, Calibration
from tinyfusion_core.selection.criteria import BKSDM, Criterion, FirstN, LastN, Uniform
from tinyfusion_core.selection.sensitivity import Greedy, LeaveOneOut, Random, Taylor
from tinyfusion_core.selection.similarity import BlockInfluence, InputOutputMSE, LinearCKA, SpanSimilarity, cosine
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_dit.model import DiT as Network
from toys import Chain, DoubleNet, Match, Net, Planted, planted_data

pytestmark = pytest.mark.numerics

POSITIONS = [Uniform, FirstN, LastN, BKSDM]
SCORES = [BlockInfluence, InputOutputMSE, LeaveOneOut, Taylor]
DATA = [*SCORES, Greedy, SpanSimilarity]
ALL = [*POSITIONS, Random, *DATA]
WORKING = (1, 3, 4, 7)
TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0)


def planted(loss: LossAdapter | None = None, scales: tuple[float, ...] = (0, 1, 0, 1, 1, 0, 0, 1)) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=Planted(scales=scales), loss=loss or Match(), train=data, held_out=data)


# Networks small enough to work out by hand


@dataclass(frozen=True)
class Given(Backbone):
    """Stands for a network that a test has built."""

    paths: tuple[str, ...] = ("blocks.*",)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def build(self) -> nn.Module:
        raise NotImplementedError

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        return {}

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        raise NotImplementedError

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return self.paths

    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        pass

    def example(self, num_rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(num_rows, *shape) for name, shape in self.shapes.items()}

    @classmethod
    def tiny(cls) -> Given:
        return cls()


class TwoStreams(Given):
    streams: ClassVar[Sequence[Stream]] = (Stream("hidden", 1), Stream("encoder", 0))


@dataclass(frozen=True)
class Plain(LossAdapter):
    """Feeds the data as they are; the loss is half the squared distance to `target`, summed over features."""

    target: float = 0.0

    def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return dict(batch)

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs)

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (prediction - self.target).square().flatten(1).sum(1)

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


class Linear(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Product(nn.Module):
    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Linear, matrices))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def given(model: nn.Module, data: dict[str, Tensor], backbone: type[Given] = Given, **options: Any) -> tiny.Task:
    shapes = {name: tuple(t.shape[1:]) for name, t in data.items()}
    columns = Tensors(data)
    return tiny.Task(
        backbone=backbone(shapes=shapes, **options), loss=Plain(), train=columns, held_out=columns, model=model
    )


def turn(degrees: float, factor: float = 1.0) -> Tensor:
    a = math.radians(degrees)
    return factor * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def scalars(*factors: float, x: Sequence[float] = (1.0,), target: float = 0.0) -> tiny.Task:
    task = given(Product([torch.tensor([[float(f)]]) for f in factors]), {"x": torch.tensor(x)[:, None]})
    return replace(task, loss=Plain(target))


def scores(decision: tiny.Decision) -> list[float]:
    return decision.provenance["scores"]


def test_block_influence_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [-1.0, 1.0]]])
    task = given(Product([turn(60), turn(0, 3.0), turn(90), turn(180)]), {"x": x})
    decision = BlockInfluence(keep=2)(task, TRAINER)
    assert scores(decision) == pytest.approx([0.5, 0.0, 1.0, 2.0], abs=1e-6)
    assert decision.kept == (2, 3)
    assert decision.provenance["evaluations"] == 2


def test_input_output_mse_by_hand() -> None:
    # Tokens of length 1 and 3, mean square 5; turning by 60 degrees moves a token by its length.
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    task = given(Product([turn(60), turn(0, 3.0), turn(180)]), {"x": x})
    decision = InputOutputMSE(keep=1)(task, TRAINER)
    # Per feature: 5 / 2, then 5 * 2² / 2, then with lengths tripled 45 * 2² / 2.
    assert scores(decision) == pytest.approx([2.5, 10.0, 90.0], rel=1e-5)
    assert decision.kept == (2,)


def test_leave_one_out_by_hand() -> None:
    # y = 2 * 1 * 4 * x = 8 x, loss (8 x - 1)² / 2 with x = 1, -1: full (49 + 81) / 4.
    decision = LeaveOneOut(keep=2)(scalars(2, 1, 4, x=(1.0, -1.0), target=1), TRAINER)
    without = [((y - 1) ** 2 + (-y - 1) ** 2) / 4 for y in (4, 8, 2)]
    assert scores(decision) == pytest.approx([w - 32.5 for w in without])
    assert decision.kept == (0, 1)
    assert decision.provenance["evaluations"] == 2 * (1 + 3)


def test_greedy_sees_what_belongs_together() -> None:
    task = scalars(4, 0.25, 8, 0.125, target=1)
    # One at a time 4, then 8 seem to cost least; but once 4 has gone, 0.25 must follow.
    assert LeaveOneOut(keep=2)(task, TRAINER).kept == (1, 3)
    decision = Greedy(keep=2)(task, TRAINER)
    assert decision.kept == (2, 3)
    assert decision.provenance["removed"] == [0, 1]
    assert decision.provenance["losses"] == [0.5 * 0.75**2, 0.0]
    assert decision.provenance["evaluations"] == 4 + 3


def test_taylor_by_hand() -> None:
    # y = product of (1 + m (f - 1)) times x; dL/dm = (y - 9) x (f - 1) times the other factors; y = 6 x.
    decision = Taylor(keep=1)(scalars(2, 1, 3, x=(1.0, -1.0), target=9), TRAINER)
    mean = (abs(6 - 9) + abs(-6 - 9)) / 2  # the slopes have both signs
    assert scores(decision) == pytest.approx([mean * 1 * 3, 0.0, mean * 2 * 2])
    assert decision.kept == (2,)
    assert decision.provenance["evaluations"] == 2


def test_span_similarity_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [2.0, -1.0]]])
    task = given(Product([turn(10), turn(40), turn(-40), turn(60)]), {"x": x})
    decision = SpanSimilarity(keep=2)(task, TRAINER)
    found = {(s["first"], s["last"]): s["similarity"] for s in decision.provenance["spans"]}
    expected = {(0, 1): 50, (1, 2): 0, (2, 3): 20}
    assert found == pytest.approx({span: math.cos(math.radians(a)) for span, a in expected.items()}, abs=1e-6)
    assert decision.kept == (0, 3)
    assert SpanSimilarity(keep=2, protect=[1])(task, TRAINER).kept == (0, 1)


def test_cka_sees_the_set_of_tokens_and_the_cosine_each_of_them() -> None:
    # A quarter turn moves every token and no distance between them; squashing one feature does the contrary.
    x = torch.tensor([[[5.0, 1.0], [5.0, -1.0], [5.5, 1.0], [5.5, -1.0]]])
    squash = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    task = given(Product([turn(90), turn(-90), squash]), {"x": x})
    assert SpanSimilarity(keep=2, protect=[1])(task, TRAINER).kept == (0, 1)
    assert SpanSimilarity(keep=2, protect=[1], measure="cka")(task, TRAINER).kept == (1, 2)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_streamed_cka_is_that_of_all_tokens_at_once(offset: float) -> None:
    x = torch.randn(40, 3, 5)
    x, y = x + offset, torch.tanh(x @ torch.randn(5, 5)) + 0.3 * x - 2 * offset
    measure = LinearCKA()
    for some in torch.randperm(40).split(7):
        measure.add(x[some], y[some])
    # The kernel form: products of samples instead of features.
    kernels = [(t - t.mean(0)) @ (t - t.mean(0)).T for t in (x.flatten(0, 1).double(), y.flatten(0, 1).double())]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert measure.value() == pytest.approx(float(expected), rel=1e-4)
    assert 0.1 < expected < 0.99


def test_streams_are_averaged_by_name() -> None:
    class Pair(nn.Module):
        """Turns the image by 90 degrees and the text not at all; returns the text first."""

        def forward(self, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * encoder, hidden @ turn(90).T

    model = DoubleNet(width=2, depth=2)
    model.blocks, model.head = nn.ModuleList([Pair(), Pair()]), nn.Linear(1, 1)
    data = {"hidden": torch.randn(3, 4, 2), "encoder": torch.randn(3, 2, 2)}
    task = given(model, data, TwoStreams)
    assert scores(BlockInfluence(keep=1)(task, TRAINER)) == pytest.approx([0.5, 0.5], abs=1e-6)
    # Over both blocks the image has turned by 180 degrees.
    spans = Calibration(task, TRAINER, 3, 2).compare([(0, 1)], cosine)
    assert spans == pytest.approx([(1 - 1) / 2], abs=1e-6)
    assert LeaveOneOut(keep=1)(task, TRAINER).kept in ((0,), (1,))


def test_a_block_that_works_in_place_is_still_compared_with_its_input() -> None:
    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.neg_()

    model = Product([])
    model.blocks = nn.ModuleList([Flip(), nn.Identity()])
    assert scores(BlockInfluence(keep=1)(given(model, {"x": torch.randn(4, 2)}), TRAINER)) == pytest.approx([2, 0])


# Positions


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


# Random


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


# All of them


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


def test_statistics_are_taken_in_full_precision() -> None:
    # In bf16 the cosine of a token that is turned by half a degree is 1.
    task = given(Product([turn(0.5), turn(0.3)]), {"x": torch.randn(4, 2) + 2})
    model = task.teacher.to(torch.bfloat16)
    task = given(model, {"x": (torch.randn(64, 2) + 2).bfloat16()})
    assert all(-1e-4 < s < 1e-3 for s in scores(BlockInfluence(keep=1)(task, TRAINER)))
    assert len(set(scores(BlockInfluence(keep=1)(task, TRAINER)))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_run_outside_of_autocast(dtype: torch.dtype) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    class Spy(LinearCKA):
        def add(self, x: Tensor, y: Tensor) -> None:
            seen.add((torch.is_autocast_enabled("cpu"), y.dtype))
            super().add(x, y)

    task = given(Product([turn(10).to(dtype)]), {"x": torch.randn(8, 2, dtype=dtype)})
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what the trainer's precision does
        Calibration(task, TRAINER, 8, 4).compare([(0, 0)], Spy)
    assert seen == {(False, dtype)}


# What cannot be


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
        (lambda: Uniform(), "Uniform: give keep or pattern, one of the two"),
        (lambda: Taylor(keep=4, pattern=(2, 4)), "Taylor: give keep or pattern, one of the two"),
        (lambda: Greedy(keep=4, samples=0), r"Greedy\.samples is 0; expected at least 1"),
        (lambda: Greedy(keep=4, batch_size=0), r"Greedy\.batch_size is 0; expected at least 1"),
        (lambda: Random(keep=4, draws=0), r"Random\.draws is 0; expected at least 1"),
        (lambda: Greedy(pattern=124), r"YAML reads an unquoted 2:4 in base 60; write \[2, 4\]"),
        (lambda: Greedy(keep=9)(planted(), TRAINER), r"Greedy\.keep is 9; expected 1 to 8 blocks"),
        (lambda: Uniform(pattern=(0, 8))(planted(), TRAINER), r"Uniform\.pattern: keeps no block at all"),
        (lambda: Greedy(keep=2, protect=[1, 3, 4])(planted(), TRAINER), "keeps 2 of its 8 blocks, but 3 are protected"),
        (
            lambda: SpanSimilarity(pattern=(1, 4), protect=[5])(planted(), TRAINER),
            r"group 2 \(blocks 4 to 7\) has no 3 blocks in a row .*\(protected: \[5\]\)",
        ),
        (lambda: SpanSimilarity(keep=1).preview(["a.0", "a.1", "b.0", "b.1"]), "no 3 blocks in a row inside one block"),
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


# The published block influence


class Fed(GaussianDiffusion):
    """The inputs of the golden data, as they are."""

    def prepare_clean(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return {"x_t": batch["x"], "t": batch["t"], "y": batch["y"], "drop": torch.zeros(len(batch["x"]), dtype=bool)}


@pytest.mark.parametrize(
    ("prefix", "dtype", "tolerance"), [("", torch.float32, 5e-6), ("f64.", torch.float64, 1e-10)], ids=["f32", "f64"]
)
def test_published_block_influence(prefix: str, dtype: torch.dtype, tolerance: float, monkeypatch) -> None:
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
    tensors, config = golden_data.load("bi_dit_small")
    model = Network(**config["model"])
    model.load_state_dict(weights(golden_data.load(config["weights_from"])[0]))
    model.to(dtype)
    batches = [{"x": tensors["in.x"][b].to(dtype), "t": tensors["in.t"][b], "y": tensors["in.y"][b]} for b in range(3)]

    def task(some: Sequence[dict[str, Tensor]]) -> tiny.Task:
        return replace(given(model, {k: torch.cat([batch[k] for batch in some]) for k in some[0]}), loss=Fed())

    def similarities(some: Sequence[dict[str, Tensor]]) -> Tensor:
        values = Calibration(task(some), TRAINER, 12, 4).compare([(i, i) for i in range(4)], cosine, clean=True)
        return torch.tensor(values, dtype=torch.float64)

    per_batch = torch.stack([similarities([batch]) for batch in batches])
    assert_close_rel(per_batch, tensors[f"{prefix}bi.cos_per_batch"], tolerance)
    assert_close_rel(similarities(batches), tensors[f"{prefix}bi.scores"], tolerance)
    for num_removed in (1, 2):
        decision = BlockInfluence(keep=4 - num_removed, reference=True)(task(batches), TRAINER)
        assert scores(decision) == pytest.approx([1 - s for s in tensors["bi.scores"].tolist()], rel=1e-4)
        assert list(decision.kept) == tensors[f"bi.kept.{num_removed}"].tolist()
        assert sorted(decision.removed) == sorted(tensors[f"bi.removed.{num_removed}"].tolist())


def test_the_published_script_never_removes_the_last_block() -> None:
    model = Chain(8, (1, 1, 0))
    task = replace(given(model, {"x": torch.randn(8, 8)}), loss=CleanPlain())
    assert BlockInfluence(keep=2)(task, TRAINER).kept == (0, 1)
    assert 2 in BlockInfluence(keep=2, reference=True)(task, TRAINER).kept
    assert BlockInfluence(keep=2, reference=True).preview(task.blocks).kept == (0, 2)


class CleanPlain(Plain):
    def prepare_clean(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return dict(batch)


def test_diffusion_without_noise() -> None:
    batch = {"x": torch.randn(500, 1, 2, 2), "y": torch.arange(500) % 10}
    loss = GaussianDiffusion(label_drop=0.5)
    inputs = loss.prepare_clean(batch, tiny.Rng(0, "calibration", strata=500))
    assert torch.equal(inputs["x_t"], batch["x"]) and torch.equal(inputs["y"], batch["y"])
    assert torch.equal(inputs["t"].unique(), torch.arange(250))
    assert not inputs["drop"].any()
    batch["x_std"] = torch.full_like(batch["x"], 3.0)
    drawn = loss.prepare_clean(batch, tiny.Rng(0, "calibration"))["x_t"] - batch["x"]
    assert drawn.std() == pytest.approx(3.0, rel=0.1)
