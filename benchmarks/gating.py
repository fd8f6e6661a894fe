"""Dense formula against the sparse gated forward: time and peak memory of one search step.

    python benchmarks/gating.py [--quick]

12 DiT blocks of width 384, 256 tokens, batch 32, groups 1:2, one CPU thread, fp32. Every variant runs in a
process of its own, so that its peak memory is its own; variants take turns, and the ratios are of medians
over rounds within this one run. Both give the same gradients (tests/test_gating.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tinyfusion_core import Frozen, Full, Gates, GroupedSampler, LoRA, Rng
from tinyfusion_core.protocols.blocks.batch import named_batch_dims
from tinyfusion_dit.model import DiT

DEPTH, WIDTH, HEADS, TOKENS, BATCH = 12, 384, 6, 256, 32
UPDATES = {"full": Full(), "lora": LoRA(rank=8), "frozen": Frozen()}


@contextmanager
def dense(blocks: list[nn.Module], mask: Tensor) -> Iterator[None]:
    """The formula as published: every block computed for every sample, x * (1 - m) + f(x) * m."""
    hooks = []
    for j, block in enumerate(blocks):

        def merge(module: nn.Module, args: tuple[Any, ...], output: Tensor, j: int = j) -> Tensor:
            m = mask[:, j, None, None]
            return output * m + args[0] * (1 - m)

        hooks.append(block.register_forward_hook(merge))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(formula: str, update: str, batch: int, steps: int) -> dict[str, float]:
    """Run some search steps of one variant in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = int(TOKENS**0.5) * 2
    model = DiT(input_size=side, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, learn_sigma=False)
    for p in model.parameters():  # adaLN-zero would make the blocks identities
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    paths = [f"blocks.{i}" for i in range(DEPTH)]
    sampler = GroupedSampler({"blocks": DEPTH}, (1, 2))
    x, t, y = torch.randn(batch, 4, side, side), torch.randint(1000, (batch,)), torch.randint(1000, (batch,))
    times = []
    with UPDATES[update].applied(model, paths) as parameters:
        optimizer = torch.optim.AdamW([*sampler.parameters(), *parameters], lr=1e-4)
        for step in range(steps + 1):
            start = time.perf_counter()
            mask = sampler.sample(batch, Rng(0, "bench", step)).mask
            if formula == "dense":
                with dense(list(model.blocks), mask):
                    model(x, t, y).square().mean().backward()
            else:
                with Gates(model, paths, named_batch_dims({"x": 0, "c": 0})) as gates:
                    gates.mask = mask
                    model(x, t, y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:  # the first one warms up
                times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 8 and one round, to see that it runs")
    parser.add_argument("--measure", nargs=4, metavar=("FORMULA", "UPDATE", "BATCH", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        formula, update, batch, steps = options.measure
        print(json.dumps(measure(formula, update, int(batch), int(steps))))
        return
    batch, rounds = (8, 1) if options.quick else (BATCH, 3)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for update in UPDATES:
            for formula in ("dense", "sparse"):
                command = [sys.executable, __file__, "--measure", formula, update, str(batch), "1"]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault((update, formula), []).append(json.loads(out))
    table = Table("weight update", "dense s", "sparse s", "faster", "dense GiB", "sparse GiB", "memory", "without base")
    base = _base_memory()
    for update in UPDATES:
        (d, s), (dm, sm) = (
            [statistics.median(r[key] for r in found[update, formula]) for formula in ("dense", "sparse")]
            for key in ("seconds", "gib")
        )
        cells = f"{d:.2f}", f"{s:.2f}", f"{d / s:.2f}x", f"{dm:.2f}", f"{sm:.2f}", f"{sm / dm:.2f}x"
        table.add_row(update, *cells, f"{(sm - base) / (dm - base):.2f}x")
    console = Console()
    console.print(table)
    console.print(f"peak resident memory; the process alone, imports done, holds {base:.2f} GiB")
    console.print(f"batch {batch}, 1 thread, fp32, torch {torch.__version__}, {_processor()}")


def _base_memory() -> float:
    """GiB that a process holds before it has made a model."""
    code = "import resource, benchmark_imports; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    code = code.replace("benchmark_imports", "peft, tinyfusion_dit.model, tinyfusion_core.search")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
