"""Several data sets as one: shares, what is seen of each, and where a sample comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading import mixture
from tinyfusion_core.dataloading.order import order_of


@dataclass(frozen=True, kw_only=True)
class Numbers(tiny.DataSource):
    """Samples first, first + 1, ...; one in ten is held out."""

    first: int = 0
    num: int = 10
    name: str = "x"

    def train(self) -> tiny.Tensors:
        return tiny.Tensors({self.name: torch.arange(self.first, self.first + self.num)})

    def held_out(self) -> tiny.Tensors:
        return tiny.Tensors({self.name: -torch.arange(self.first, self.first + max(1, self.num // 10))})


class Told(tiny.Tensors):
    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        return [(int(self.columns[name].max()), "its end")]

    def where(self, name: str, index: int) -> str:
        return f"row {index}"


def values(samples: tiny.Tensors) -> list[int]:
    return samples.__getitems__(list(range(len(samples))))["x"].tolist()


def mixed(weights: dict[str, float] | None = None) -> tiny.Mixture:
    return tiny.Mixture(parts={"few": Numbers(num=4), "many": Numbers(first=100, num=20)}, weights=weights)


def test_without_weights_every_sample_is_there_once() -> None:
    assert values(mixed().train()) == [*range(4), *range(100, 120)]
    assert values(mixed({"few": 1, "many": 9}).held_out()) == [0, -100, -101]


@pytest.mark.parametrize(("few", "many", "times"), [(1, 1, 5), (3, 1, 15), (1, 100, 1)])
def test_shares_hold_and_nothing_is_left_out(few: float, many: float, times: int) -> None:
    found = Counter(values(mixed({"few": few, "many": many}).train()))
    assert {*found} == {*range(4), *range(100, 120)}
    small = sum(count for value, count in found.items() if value < 100)
    assert small / found.total() == pytest.approx(few / (few + many), abs=0.01)
    assert {found[value] for value in range(4)} == {times}


def test_an_epoch_of_many_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "MOST", 12)
    parts = {"a": Numbers(num=20), "b": Numbers(first=100, num=4)}
    found = values(tiny.Mixture(parts=parts, weights={"a": 1, "b": 3}).train())
    assert len(found) == 24
    assert Counter(value for value in found if value >= 100) == {100: 5, 101: 5, 102: 4, 103: 4}
    some = [value for value in found if value < 100]
    assert len({*some}) == 6
    assert some != values(tiny.Mixture(parts=parts, weights={"a": 1, "b": 3}, seed=1).train())[:6]


def test_rows_come_in_the_order_asked_for() -> None:
    samples = mixed().train()
    indices = [23, 0, 5, 3, 4]
    assert samples.__getitems__(indices)["x"].tolist() == [119, 0, 101, 3, 100]
    order = order_of(samples, 0, "search", 8)
    assert sorted(i for step in order.steps(0, 3, 0, 8) for i in step) == list(range(24))


def test_a_part_of_no_weight_is_only_held_out() -> None:
    judged = mixed({"few": 0, "many": 2})
    assert values(judged.train()) == [*range(100, 120)]
    assert values(judged.held_out()) == [0, -100, -101]


def test_it_says_where_a_sample_comes_from() -> None:
    told = Told({"x": torch.arange(3)})
    samples = mixture.Mixed({"a": told, "b": tiny.Tensors({"x": torch.arange(2)})}, [6, 2], 0)
    assert isinstance(samples, tiny.Traceable)
    assert samples.extremes("x") == [(2, "its end")]
    assert samples.where("x", 4) == "a: row 1"
    assert samples.where("x", 7) == "b"


def test_what_does_not_mix_is_refused() -> None:
    with pytest.raises(tiny.UserError, match="^weights: many is not in both"):
        mixed({"few": 1})
    with pytest.raises(tiny.UserError, match="^weights.few is -1; expected 0 or more"):
        mixed({"few": -1, "many": 1})
    with pytest.raises(tiny.UserError, match="^weights is .*; expected at least one above 0"):
        mixed({"few": 0, "many": 0})
    with pytest.raises(tiny.UserError, match="^parts is {}; expected at least one"):
        tiny.Mixture(parts={})
    other = tiny.Mixture(parts={"a": Numbers(), "b": Numbers(name="z")}).train()
    with pytest.raises(tiny.UserError, match=r"samples of 'a' hold x \(\) int64, those of 'b' z \(\) int64"):
        other.__getitems__([0, 12])

    class Nothing(Numbers):
        def train(self) -> tiny.Tensors:
            made = super().train()
            object.__setattr__(made, "columns", {"x": torch.empty(0)})
            return made

    with pytest.raises(tiny.UserError, match="^parts.b: holds no training sample"):
        tiny.Mixture(parts={"a": Numbers(), "b": Nothing()}).train()


@pytest.mark.slow
def test_a_recipe_mixes(tmp_path: Path) -> None:
    both = {"parts": {"digits": "Digits", "again": "Digits"}, "weights": {"digits": 3, "again": 1}}
    recipe = {**RECIPE, "data": {"class_path": "Mixture", "init_args": both}, "recover": {"steps": 2}, "evaluate": []}
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    made = tiny.load_recipe(tmp_path / "run" / "recipe.yaml")
    assert len(made.data.train()) == 4 * 1500
    assert len(made.data.held_out()) == 2 * len(made.data.parts["again"].held_out())
    assert made.data.conditions == "y"
    assert made.data.feature_space() is not None
