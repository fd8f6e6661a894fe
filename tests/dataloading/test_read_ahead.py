"""Shards are read before they are asked for, each once, and a read that fails is tried again."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tinyfusion_core.dataloading.shards
from tinyfusion_core.dataloading.loader import load_batches
from tinyfusion_core.dataloading.order import order_of
from tinyfusion_core.dataloading.read_ahead import ReadAhead
from tinyfusion_core.dataloading.set_apart import without
from tinyfusion_core.dataloading.shards import Shard, ShardedSamples, write_shard
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.data import Prefetched, Samples

BATCH, MIX, ROWS = 6, 3, 8


@pytest.fixture
def samples(tmp_path: Path) -> ShardedSamples:
    """Twelve shards of eight rows, each with its number."""
    shards = [write_shard(tmp_path, f"{i}.st", {"x": torch.arange(ROWS * i, ROWS * (i + 1))}) for i in range(12)]
    return ShardedSamples(str(tmp_path), shards, 0, 12 * ROWS, mix=MIX)


class Reads:
    """What is read, and by which thread; a name in `fail_at` fails where it is read for that time."""

    def __init__(self, plain: Callable[[str, Shard], dict[str, torch.Tensor]]) -> None:
        self.plain, self.made = plain, list[tuple[str, bool]]()
        self.fail_at: dict[str, int] = {}

    def __call__(self, url: str, shard: Shard) -> dict[str, torch.Tensor]:
        self.made.append((shard.name, threading.current_thread() is threading.main_thread()))
        if sum(name == shard.name for name, _ in self.made) <= self.fail_at.get(shard.name, 0):
            raise UserError("cut short")
        return self.plain(url, shard)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found = Reads(tinyfusion_core.dataloading.shards.read_shard)
    monkeypatch.setattr("tinyfusion_core.dataloading.shards.read_shard", found)
    return found


def rows(samples: Samples, workers: int = 0) -> tuple[list[list[int]], list[str]]:
    """The rows of each batch of a pass, in training order, and what was wrong."""
    steps = order_of(samples, 0, "train", BATCH).steps(0, len(samples) // BATCH, 0, BATCH)
    loaded = list(load_batches(samples, steps, workers))
    assert all(one.batch is not None for one in loaded)
    return [one.batch["x"].tolist() for one in loaded if one.batch], [p for one in loaded for p in one.problems]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_is_what_it_is_without(workers: int, samples: ShardedSamples) -> None:
    expected = [*order_of(samples, 0, "train", BATCH).steps(0, 16, 0, BATCH)]
    assert rows(samples, workers) == (expected, [])
    samples.prefetch([0, 30, 60])  # here, and the other process has none of it
    assert rows(samples, workers) == (expected, [])


def test_shards_are_read_once_and_not_by_the_one_that_trains(samples: ShardedSamples, reads: Reads) -> None:
    assert isinstance(samples, Prefetched) and isinstance(without(samples, [3]), Prefetched)
    rows(samples)
    assert sorted({name for name, _ in reads.made}) == sorted(shard.name for shard in samples.shards)
    assert len(reads.made) <= 12 + MIX  # a shard at the border of two readers may be read for each
    assert not any(by_the_main_thread for _, by_the_main_thread in reads.made)


def test_what_fails_once_is_read_again_and_what_fails_always_is_told(samples: ShardedSamples, reads: Reads) -> None:
    whole, _ = rows(samples)
    samples.__getitems__([0])  # and no other shard is kept
    reads.made.clear()
    reads.fail_at = {"5.st": 2, "7.st": 1}  # ahead and when it is needed; ahead alone
    assert rows(samples) == (whole, [])
    assert len(reads.made) <= 12 + 2 * MIX + 3
    reads.fail_at = {"5.st": 1000}
    found, problems = rows(samples)
    assert len(problems) == ROWS and all("cut short" in problem for problem in problems)
    assert not any(index // ROWS == 5 for batch in found for index in batch)


def test_no_more_than_so_many_are_on_their_way() -> None:
    going, now, most, gate = threading.Lock(), 0, 0, threading.Event()

    def read(piece: int) -> int:
        nonlocal now, most
        with going:
            now, most = now + 1, max(most, now + 1)
        gate.wait(10)
        with going:
            now -= 1
        return -piece

    ahead = ReadAhead(read, 2)
    for piece in (1, 2, 3, 2, 1):
        ahead.begin(piece)
    assert [*ahead._coming] == [1, 2] and [*ahead._wanted] == [3]
    gate.set()
    for coming in ahead._coming.values():  # one that is taken while it is read makes room for another
        coming.result()
    assert [ahead.take(piece) for piece in (2, 1, 3, 4)] == [-2, -1, -3, -4]
    assert most <= 2 and not ahead._coming and not ahead._wanted


def test_a_copy_begins_with_none(samples: ShardedSamples) -> None:
    samples.prefetch([0, 30, 60])
    assert len(samples._ahead._coming) == 3
    copy = pickle.loads(pickle.dumps(samples))
    assert not copy._ahead._coming and rows(copy) == rows(samples)
