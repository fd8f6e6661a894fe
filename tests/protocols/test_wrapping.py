"""Networks of strangers: blocks named one by one, outputs that are no stream, data as torch has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset, default_collate

import tinyfusion_core as tiny
from tinyfusion_core.evaluation.metrics import Size

pytestmark = pytest.mark.numerics


class Residual(nn.Module):
    """A block of a convolutional network."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(self.conv(x))


class Stages(nn.Module):
    """Two stages, each a first layer that changes the shape and blocks that do not, as in ResNet and ConvNeXt."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 2, 2), *(Residual(4, groups) for _ in range(3)))
        self.stage = nn.Sequential(nn.Conv2d(4, 8, 2, 2), *(Residual(8, groups) for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


NAMED = ["stem.1", "stem.2", "stem.3", "stage.1", "stage.3"]


def images() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {"x": torch.randn(24, 1, 8, 8, generator=draws), "y": torch.randint(3, (24,), generator=draws)}


def classify(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def staged(groups: int = 1) -> tiny.Task:
    torch.manual_seed(0)
    return tiny.wrap(Stages(groups), blocks=NAMED, loss_fn=classify, data=images())


TRAINER = tiny.Trainer(precision="fp32", batch_size=8)


def test_blocks_named_one_by_one_are_searched_pruned_and_recovered() -> None:
    task = staged()
    search = tiny.Search(keep=3, steps=4)
    decision = tiny.Finals(search=search, masks=2, others=[tiny.Greedy(keep=3)], steps=2, samples=8)(task, TRAINER)
    assert len(decision.kept) == 3
    student = tiny.prune(task, decision)
    names = [path for path, module in student.named_modules() if isinstance(module, Residual)]
    assert len(names) == 4  # stage.2 is no block, so it stays
    tiny.Recover(steps=2)(task, student, decision, TRAINER)
    assert task.backbone.block_paths(task.teacher) == NAMED


def test_the_blocks_of_a_student_are_those_that_remain() -> None:
    task = staged()
    student = tiny.prune(task, tiny.Keep(blocks=[0, 2, 4])(task, TRAINER))
    remaining = ["stem.1", "stem.2", "stage.2"]
    for network in (student, copy.deepcopy(student)):
        assert task.backbone.block_paths(network) == remaining
        assert torch.equal(network.stem[2].conv.weight, task.teacher.stem[3].conv.weight)
        assert torch.equal(network.stage[2].conv.weight, task.teacher.stage[3].conv.weight)


def test_lora_adapts_convolutions_and_says_when_it_finds_nothing() -> None:
    task = staged()
    with tiny.LoRA(rank=2).applied(task.teacher, task.blocks) as weights:
        assert len(weights) == 2 * len(NAMED)
    grouped = staged(groups=2)
    with pytest.raises(tiny.UserError, match=r"finds no linear layer and no ungrouped convolution .* use update: Full"):
        tiny.Search(keep=3, steps=2)(grouped, TRAINER)
    assert len(tiny.Search(keep=3, steps=2, update=tiny.Full())(grouped, TRAINER).kept) == 3


class Talkative(nn.Module):
    """A block that also returns something for people, and one loss for all samples."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, state: Any) -> Any:
        x = state["x"] if isinstance(state, dict) else state
        change = torch.tanh(self.linear(x))
        return self.form(x + change, change.softmax(-1), change.square().mean())


class Network(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any], take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layers, self.take = nn.ModuleList(Talkative(form) for _ in range(4)), take

    def forward(self, x: Any) -> Tensor:
        for layer in self.layers:
            x = self.take(layer(x))
        return x["x"] if isinstance(x, dict) else x


def square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean(-1)


def talkative(form: Any, take: Any, loss_fn: Any = square, **options: Any) -> tiny.Task:
    torch.manual_seed(0)
    data = {"x": torch.randn(16, 4, generator=torch.Generator().manual_seed(1))}
    return tiny.wrap(Network(form, take), blocks="layers.*", loss_fn=loss_fn, data=data, **options)


def test_outputs_that_nobody_needs_are_left_out() -> None:
    form, take = (lambda x, attention, loss: (x, attention, loss)), (lambda out: out[0])
    with pytest.raises(tiny.UserError, match=r"returns a tensor at 1 that is no declared stream; .* 'unneeded'"):
        tiny.Search(keep=2, steps=2)(talkative(form, take), TRAINER)
    task = talkative(form, take, unneeded=(1, 2))
    plain = talkative(lambda x, attention, loss: x, lambda out: out)
    for selector in (tiny.Search(keep=2, steps=4), tiny.Search(pattern=[2, 4], steps=4), tiny.Greedy(keep=2)):
        assert selector(task, TRAINER).kept == selector(plain, TRAINER).kept


def test_streams_in_mappings() -> None:
    task = talkative(
        lambda x, attention, loss: {"x": x, "attention": attention},
        lambda out: out,
        lambda model, batch: square(model, {"x": {"x": batch["x"]}}),
        streams=(tiny.Stream("state.x", output="x"),),
        unneeded=("attention",),
    )
    plain = talkative(lambda x, attention, loss: x, lambda out: out)
    for selector in (tiny.Search(keep=2, steps=4), tiny.Search(pattern=[2, 4], steps=4), tiny.Greedy(keep=2)):
        decision = selector(task, TRAINER)
        assert decision.kept == selector(plain, TRAINER).kept
        assert len(tiny.prune(task, decision).layers) == 2


class Pairs(Dataset):
    def __init__(self, named: bool) -> None:
        self.data, self.named = images(), named

    def __len__(self) -> int:
        return len(self.data["x"])

    def __getitem__(self, i: int) -> Any:
        item = {name: column[i] for name, column in self.data.items()}
        return item if self.named else (item["x"], int(item["y"]))


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def by_number(model: nn.Module, batch: Any) -> Tensor:
    return classify(model, {"x": batch["0"], "y": batch["1"]})


@pytest.mark.parametrize(
    ("data", "loss_fn"),
    [
        (lambda: {name: column.numpy() for name, column in images().items()}, classify),
        (lambda: Pairs(named=True), classify),
        (lambda: Pairs(named=False), by_number),
        (lambda: TensorDataset(*images().values()), by_number),
        (lambda: DataLoader(TensorDataset(*images().values()), batch_size=5, shuffle=True), by_number),
        (
            lambda: DataLoader(Pairs(named=True), collate_fn=lambda i: default_collate(i)),
            classify,
        ),
    ],
    ids=["arrays", "mappings", "pairs", "tensors", "loader", "own collate_fn"],
)
def test_data_as_torch_has_it(data: Any, loss_fn: Any) -> None:
    expected = tiny.Search(keep=3, steps=3)(staged(), TRAINER)
    torch.manual_seed(0)
    task = tiny.wrap(Stages(), blocks=NAMED, loss_fn=loss_fn, data=data())
    decision = tiny.Search(keep=3, steps=3)(task, TRAINER)
    assert decision.marginals == expected.marginals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Endless(), "data: a stream of samples has no order to go back to"),
        (lambda: {"x": torch.zeros(3, 2), "y": np.zeros(4)}, "data: 'x' has 3 rows, 'y' has 4 rows; give every tensor"),
        (lambda: {}, "data: there is no tensor"),
        (lambda: {"x": torch.zeros(0, 2)}, "data: 'x' has 0 rows"),
        (lambda: {"x": torch.tensor(1.0)}, "data: 'x' has 0 rows"),
        (lambda: [1, 2, 3], "data is a list; expected tensors or arrays by name"),
        (lambda: {"x": "text"}, "data: 'x' is a str"),
        (
            lambda: DataLoader(Pairs(named=True), collate_fn=lambda items: [str(items)]),
            "data: '0' of a sample is a str",
        ),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(9, 2)), sampler=SubsetRandomSampler([0, 1, 2])),
            "data: the loader has a SubsetRandomSampler, .* give a torch.utils.data.Subset",
        ),
    ],
)
def test_data_that_cannot_be_read(data: Any, message: str) -> None:
    with pytest.raises(tiny.UserError, match=f"^{message}"):
        tiny.wrap(Stages(), blocks=NAMED, loss_fn=classify, data=data())


def test_the_operations_of_a_wrapped_network_are_counted() -> None:
    task = staged()
    student = tiny.prune(task, tiny.Keep([0, 2, 4])(task, TRAINER))
    models = {"teacher": task.teacher, "student": student}
    flops = next(m for m in tiny.evaluate(task, models, [], TRAINER) if m.name == "FLOPs")
    # Two for a multiply-add. Convolutions: 4x4 places of 4 channels, then 2x2 of 8; and the head.
    block, late = 2 * 16 * 4 * 4 * 9, 2 * 4 * 8 * 8 * 9
    outside = 2 * 16 * 4 * 4 + 2 * 4 * 8 * 16 + 2 * 8 * 3
    assert flops.values == {"teacher": 3 * block + 3 * late + outside, "student": 2 * block + 2 * late + outside}
    half = tiny.Greedy(budget={"flops": "0.9x"}, samples=8)(task, TRAINER)
    assert len(half.kept) < 5

    def counts_itself(model: nn.Module, batch: Any) -> Tensor:
        raise TypeError("not under a mode")

    other = tiny.wrap(Stages(), blocks=NAMED, loss_fn=counts_itself, data=images())
    (flops,) = [m for m in Size()(other, {"teacher": other.teacher}, TRAINER) if m.name == "FLOPs"]
    assert (flops.values, flops.note) == ({"teacher": None}, "cannot be counted: not under a mode")
