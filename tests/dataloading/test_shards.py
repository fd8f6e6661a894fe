"""Sharded samples: the order in which shards are read, what is read, from where, and files that are not right."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfusion_core.dataloading.order import ShardedOrder, order_of
from tinyfusion_core.dataloading.shards import METADATA, Shard, ShardedSamples, write_shard
from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.protocols.data import Sharded, Tensors
from tinyfusion_dit import Latents

SIZES = (5, 3, 5, 0, 7)


def rows(first: int, count: int) -> dict[str, torch.Tensor]:
    """Rows that tell which they are."""
    numbers = torch.arange(first, first + count)
    return {"x": numbers.view(-1, 1, 1, 1).expand(-1, 2, 1, 3).half() / 2, "y": numbers}


def write(folder: Path, sizes: tuple[int, ...] = (5, 3, 5, 7), **metadata: object) -> list[Shard]:
    """Shards of as many rows, and their metadata."""
    starts = itertools.accumulate((0, *sizes))
    shards = [write_shard(folder, f"{i}.safetensors", rows(*r)) for i, r in enumerate(zip(starts, sizes, strict=False))]
    entries = [{"name": s.name, "count": s.count, "sha256": s.sha256} for s in shards]
    (folder / METADATA).write_text(json.dumps({"format_version": 1, "kind": "sample", **metadata, "shards": entries}))
    return shards


def everything(samples: ShardedSamples) -> dict[str, torch.Tensor]:
    return samples.__getitems__(list(range(len(samples))))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum),
    batch_size=st.integers(1, 12),
    mix=st.integers(1, 9),
)
def test_every_pass_sees_every_sample_once(sizes: list[int], batch_size: int, mix: int) -> None:
    order, num = ShardedOrder(3, "train", sizes, batch_size, mix), sum(sizes)
    for epoch in range(3):
        assert sorted(order[epoch * num + i] for i in range(num)) == list(range(num))


def test_passes_and_seeds_differ_and_the_position_is_all_that_a_resume_needs() -> None:
    def sequence(seed: int, first: int = 0) -> list[int]:
        order = ShardedOrder(seed, "train", SIZES, 6, 3)
        return [order[i] for i in range(first, 60)]

    whole = sequence(0)
    assert whole == sequence(0)
    assert whole[:20] != whole[20:40]
    assert whole != sequence(1)
    for first in (1, 19, 33):
        assert sequence(0, first) == whole[first:]


def test_two_processes_see_the_sequence_of_one_and_read_shards_of_their_own() -> None:
    sizes, batch_size = [64] * 16, 32
    wholes = [ShardedOrder(0, "train", sizes, batch_size, 4) for _ in range(3)]
    one, *two = (list(o.steps(0, 32, f, n)) for o, f, n in zip(wholes, (0, 0, 16), (32, 16, 16), strict=True))
    assert [a + b for a, b in zip(*two, strict=True)] == one
    touched = [{i // 64 for i in itertools.chain.from_iterable(steps)} for steps in two]
    # A pass of 16 shards: each process reads 8, but for a shard at the border that both may read.
    assert all(len(shards) <= 9 for shards in touched)
    assert len(touched[0] & touched[1]) <= 2
    # A batch is drawn from the 4 shards of the readers, and at most their next ones.
    counts = [len({i // 64 for i in step}) for step in one]
    assert min(counts) == 4
    assert max(counts) <= 8


def test_neighbours_in_a_batch_are_spread_over_a_shard() -> None:
    order = ShardedOrder(0, "train", [1000], 8, 1)
    found = [order[i] for i in range(1000)]
    steps = torch.tensor(found).diff().abs().float().mean()
    assert 300 < steps < 370  # of a random permutation: a third


def test_data_in_shards_are_read_by_shards_and_others_are_not(tmp_path: Path) -> None:
    shards = write(tmp_path)
    samples = ShardedSamples(str(tmp_path), shards, 2, 19, mix=2)
    assert isinstance(samples, Sharded)
    assert samples.sizes == [3, 3, 5, 6]
    assert isinstance(order_of(samples, 0, "train", 4), ShardedOrder)
    assert not isinstance(order_of(Tensors({"x": torch.zeros(4)}), 0, "train", 4), ShardedOrder)


@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_the_same_rows_from_anywhere(where: str, tmp_path: Path) -> None:
    shards = write(tmp_path)
    url = str(tmp_path) if where == "path" else f"{where}://{tmp_path}"
    if where == "memory":
        fsspec.filesystem("memory").put(f"{tmp_path}/", str(tmp_path), recursive=True)
        for shard in shards:
            (tmp_path / shard.name).unlink()
    train, held_out = (getattr(Latents(folder=url, num_held_out=6), side)() for side in ("train", "held_out"))
    assert everything(held_out)["y"].tolist() == list(range(6))
    found = everything(train)
    assert found["y"].tolist() == list(range(6, 20))
    assert found["x"].dtype == torch.float32
    assert torch.equal(found["x"][:, 0, 0, 0], found["y"] / 2)
    some = [13, 0, 4, 4, 9]
    assert all(torch.equal(value, found[name][some]) for name, value in train.__getitems__(some).items())
    for index in (-1, 14):
        with pytest.raises(IndexError, match="there are 14"):
            train.__getitems__([0, index])


def test_copies_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    write(tmp_path, (6, 4), flips=True)
    data = Latents(folder=str(tmp_path), num_held_out=2)
    assert everything(data.held_out())["y"].tolist() == [0, 1, 2, 3]
    assert len(data.train()) == 6
    with pytest.raises(UserError, match="expected 1 to 4"):
        Latents(folder=str(tmp_path), num_held_out=5).train()


def test_memory_holds_the_shards_of_a_batch_and_no_more(tmp_path: Path) -> None:
    sizes = (4,) * 40
    samples = ShardedSamples(str(tmp_path), write(tmp_path, sizes), 0, 160, mix=3)
    order = order_of(samples, 0, "train", 6)
    reads: list[int] = []
    for indices in order.steps(0, 50, 0, 6):
        before = set(samples._loaded)
        samples.__getitems__(indices)
        reads.append(len(set(samples._loaded) - before))
        assert len(samples._loaded) <= 6
    assert sum(reads) <= 50 * 6 / 4 + 2 * 3 * 2  # each shard once a pass, but for those at a border
    everything(samples)
    assert len(samples._loaded) <= 6


def test_a_shard_that_is_cut_short_replaced_or_gone_is_named(tmp_path: Path) -> None:
    samples = ShardedSamples(str(tmp_path), write(tmp_path), 0, 20, mix=1)
    path = tmp_path / "2.safetensors"
    intact = path.read_bytes()
    for content in (intact[:-1], b"", intact[:-1] + b"?"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"2\.safetensors: cut short, damaged or replaced"):
            samples.__getitems__([9])
        assert samples.__getitems__([0])["y"].tolist() == [0]
    path.unlink()
    with pytest.raises(MissingFileError, match=r"2\.safetensors: no such file"):
        samples.__getitems__([9])
    path.write_bytes(intact)
    assert samples.__getitems__([9])["y"].tolist() == [9]


def test_a_listing_that_is_not_right(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = json.loads((tmp_path / METADATA).read_text())
    for shards, message in (
        ([], "lists no shards; let the command that makes them finish"),
        (
            [{"name": "0.safetensors"}],
            r"'shards\[0\].count' is missing; expected an integer; run",
        ),
        ([{**metadata["shards"][0], "count": 4}], "'x' does not have the 4 rows"),
    ):
        (tmp_path / METADATA).write_text(json.dumps({**metadata, "shards": shards}))
        with pytest.raises(UserError, match=message):
            everything(Latents(folder=str(tmp_path), num_held_out=1).train())
    with pytest.raises(UserError, match=r"nosuch://x/metadata\.json: cannot be read \(ValueError: Protocol not known"):
        Latents(folder="nosuch://x").train()
    with pytest.raises(MissingFileError, match=r"tinyfusion encode IMAGES --out .*none --vae AUTOENCODER"):
        Latents(folder=str(tmp_path / "none")).train()
    with pytest.raises(UserError, match=r"^mix is 0"):
        Latents(folder=str(tmp_path), mix=0)
