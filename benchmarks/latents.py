"""How fast latents are read in training order, from each layout, and in how much memory.

    python benchmarks/latents.py [--quick]

The layouts are one .npy file for each image (as the reference code has it), two large mapped arrays, and shards.
Latents are (4, 32, 32), batches 128, one process, one thread. Each reading runs in a process of its own, and the
layouts take turns; ratios are of medians over rounds within this one run. "Cold" reads files that the operating system
was told to forget, "warm" the same ones once more. Memory is what the process had grown by after any batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tinyfusion_core.dataloading.order import order_of
from tinyfusion_core.dataloading.shards import FORMAT_VERSION, METADATA, write_shard
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_dit import LatentFolders, Latents

LAYOUTS = {
    "files": "one .npy for each image",
    "arrays": "mapped arrays",
    "shards": "shards, float32",
    "half": "shards, float16",
}
SHAPE, SHARD, BATCH, HELD_OUT = (4, 32, 32), 512, 128, 128


def write(layout: str, folder: Path, num: int) -> None:
    """Random latents in one layout."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    metadata = {"format_version": FORMAT_VERSION, "kind": "sample"}
    if layout == "files":
        for name in ("features", "labels"):
            (folder / name).mkdir()
        for i in range(num):
            np.save(folder / "features" / f"{i}.npy", random.standard_normal(SHAPE, dtype=np.float32))
            np.save(folder / "labels" / f"{i}.npy", np.array([i % 1000]))
    elif layout == "arrays":
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (num, *SHAPE))
        for i in range(0, num, SHARD):
            features[i : i + SHARD] = random.standard_normal(features[i : i + SHARD].shape, dtype=np.float32)
        np.save(folder / "labels.npy", np.arange(num) % 1000)
        (folder / METADATA).write_text(json.dumps(metadata))
    else:
        dtype, shards = torch.float16 if layout == "half" else torch.float32, []
        for i in range(0, num, SHARD):
            x = torch.from_numpy(random.standard_normal((SHARD, *SHAPE), dtype=np.float32)).to(dtype)
            shards.append(write_shard(folder, f"{i:07d}.safetensors", {"x": x, "y": torch.arange(i, i + SHARD) % 1000}))
        (folder / METADATA).write_text(json.dumps({**metadata, "shards": [asdict(shard) for shard in shards]}))


def forget(folder: Path) -> None:
    """Ask the operating system to drop the files from its cache."""
    os.sync()
    for path in folder.rglob("*.*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(layout: str, folder: Path, num_samples: int) -> dict[str, float]:
    """Read in this process."""
    torch.set_num_threads(1)
    source: DataSource = Latents(folder=str(folder), num_held_out=HELD_OUT)
    if layout == "files":
        names = {name: str(folder / name) for name in ("features", "labels")}
        source = LatentFolders(**names, num_held_out=HELD_OUT)
    found = {}
    before = peak = resident()
    for state in ("cold", "warm"):
        if state == "cold":
            forget(folder)
        samples = source.train()
        order = order_of(samples, 0, "benchmark", BATCH)
        start = time.perf_counter()
        for indices in order.steps(0, num_samples // BATCH, 0, BATCH):
            samples.__getitems__(indices)
            peak = max(peak, resident())
        found[state] = num_samples / (time.perf_counter() - start)
    found["MiB"] = peak - before
    return found


def in_a_process(layout: str, folder: Path, num_samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", layout, str(folder), str(num_samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the data, one round")
    parser.add_argument("--folder", type=Path, help="where to write the data (default: the temporary folder)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        layout, folder, num_samples = options.measure
        print(json.dumps(measure(layout, Path(folder), int(num_samples))))
        return
    scale = 16 if options.quick else 1
    small, large, rounds = 8192 // scale, 32768 // scale, 1 if options.quick else 3
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for layout in LAYOUTS:
            for num in (small, large):
                write(layout, Path(temporary) / layout / str(num), num)
        runs = [
            {layout: in_a_process(layout, Path(temporary) / layout / str(large), large // 2) for layout in LAYOUTS}
            for _ in range(rounds)
        ]
        less = {layout: in_a_process(layout, Path(temporary) / layout / str(small), small // 2) for layout in LAYOUTS}

    table = Table(
        "layout", "cold, samples/s", "ratio", "warm, samples/s", "ratio", f"MiB, {small:,}", f"MiB, {large:,}"
    )
    median = {
        layout: {key: statistics.median(run[layout][key] for run in runs) for key in ("cold", "warm", "MiB")}
        for layout in LAYOUTS
    }
    for layout, text in LAYOUTS.items():
        cells = []
        for state in ("cold", "warm"):
            cells += [f"{median[layout][state]:,.0f}", f"{median[layout][state] / median['files'][state]:.2f}x"]
        table.add_row(text, *cells, f"{less[layout]['MiB']:.0f}", f"{median[layout]['MiB']:.0f}")
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(f"{platform.machine()}, torch {torch.__version__}, {rounds} rounds of {large // 2:,} samples")


if __name__ == "__main__":
    main()
