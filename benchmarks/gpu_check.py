"""Does it all work on this machine, and how fast? A few minutes; prints a table in Markdown to paste.

    python benchmarks/gpu_check.py [--tiny]

Every row runs a real short piece in a process of its own: a recipe that trains a DiT on the digits, searches and
recovers, or a measurement of its memory. What fails is a row with its error, what the machine lacks a row that
says so. Without a GPU, or with --tiny, sizes are those of a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.planning.activations import saved_by
from tinyfusion_core.pipeline.planning.amounts import gigabytes
from tinyfusion_core.pipeline.planning.memory import Setup, training_needs
from tinyfusion_core.protocols.blocks.paths import list_lengths
from tinyfusion_core.pruning.decision import versions
from tinyfusion_core.selection.search import Search

SIZES = {
    "full": {"hidden_size": 768, "depth": 12, "num_heads": 12, "batch": 256, "steps": 30},
    "tiny": {"hidden_size": 32, "depth": 4, "num_heads": 2, "batch": 8, "steps": 4},
}


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: as shown.
        flags: settings of the recipe, on top of the common ones; with `measure` its name alone.
        processes: how many devices it needs.
        measure: a measurement in the place of a recipe.
    """

    name: str
    flags: tuple[str, ...] = ()
    processes: int = 1
    measure: str = ""


CHECKS = (
    Check("fp32", ("--trainer.precision=fp32",)),
    Check("bf16", ("--trainer.precision=bf16",)),
    Check("bf16, blocks compiled", ("--trainer.precision=bf16", "--trainer.compile=true")),
    Check("fp32, 2 devices, DDP", ("--trainer.precision=fp32",), 2),
    Check("fp32, 2 devices, FSDP2", ("--trainer.precision=fp32", "--trainer.sharding=fsdp"), 2),
    Check("bf16, 2 devices, FSDP2", ("--trainer.precision=bf16", "--trainer.sharding=fsdp"), 2),
    Check("search step, dense gating", measure="dense"),
    Check("search step, sparse gating", measure="sparse"),
    Check("memory plan of a training step", measure="plan"),
)


def recipe(size: dict[str, int]) -> dict[str, Any]:
    """The common recipe: 64 tokens a sample."""
    network = {name: size[name] for name in ("hidden_size", "depth", "num_heads")}
    return {
        "backbone": {"class_path": "DiT", "init_args": {**network, "input_size": 8, "patch_size": 1, "in_channels": 1,
                                                        "num_classes": 10, "learn_sigma": False}},
        "loss": {"class_path": "GaussianDiffusion", "init_args": {"learn_sigma": False, "guided_channels": None}},
        "data": "Digits",
        "trainer": {"batch_size": size["batch"], "log_every": 1},
        "train": {"steps": size["steps"]},
        "search": {"pattern": [1, 2], "steps": size["steps"]},
        "recover": {"steps": size["steps"], "kd": "MaskedKD"},
        "evaluate": [],
    }  # fmt: skip


def run(check: Check, size: str, timeout: float, gpus: int) -> str:
    """Run one row in a process of its own. Returns what it found, or what went wrong."""
    if gpus and gpus < check.processes:
        return f"not run: needs {check.processes} GPUs"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(SIZES[size])))
        module = ["-m", "tinyfusion_core", "run", str(folder / "recipe.yaml"), "--run-dir", str(folder / "run")]
        if check.measure:
            command = [sys.executable, __file__, "--measure", check.measure, "--size", size]
        elif check.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={check.processes}"]
            command = [sys.executable, *launcher, *module, *check.flags]
        else:
            command = [sys.executable, *module, *check.flags]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if not gpus:  # else torchrun's processes would not find each other
            env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {timeout:.0f} s"
        if done.returncode:
            return f"FAILED: {_reason(done.stderr)}"
        if check.measure:
            return str(json.loads(done.stdout.splitlines()[-1])["found"])
        return describe(folder / "run", check.processes)


def describe(folder: Path, processes: int) -> str:
    """Speed and last loss of every stage, from the run's own files."""
    hardware = json.loads((folder / "run.json").read_text())["hardware"]
    if hardware["processes"] != processes:
        return f"FAILED: ran on {hardware['processes']} processes instead of {processes}"
    parts = []
    for stage in ("train", "search", "recover"):
        lines = tiny.RunFolder(folder).metrics(stage)
        later = lines[len(lines) // 2 :]  # the first steps warm up
        seconds = later[-1]["seconds"] - later[0]["seconds"]
        loss = lines[-1]["loss"]
        if loss is None or not math.isfinite(loss) or lines[-1]["skipped"]:
            return f"FAILED: {stage} ends with loss {loss}, {lines[-1]['skipped']} steps skipped"
        pace = f"{(later[-1]['step'] - later[0]['step']) / seconds:.3g}" if seconds > 0 else "over 100"
        parts.append(f"{stage} {pace} steps/s, loss {loss:.3f}")
    return "; ".join(parts)


def measure(what: str, size: dict[str, int]) -> str:
    """Peak memory and time of a step, in this process."""
    trainer = tiny.Trainer(batch_size=size["batch"], precision="bf16" if torch.accelerator.is_available() else "fp32")
    device = trainer.accelerator.device
    made = recipe(size)
    from tinyfusion_dit import DiT, GaussianDiffusion

    backbone, loss = DiT(**made["backbone"]["init_args"]), GaussianDiffusion(learn_sigma=False, guided_channels=None)
    torch.manual_seed(0)
    model = backbone.construct(backbone.config()).to(device).train()
    blocks = backbone.block_paths(model)
    task = tiny.Task.without_data(backbone, loss, model)
    prepared = loss.prepare(backbone.example(size["batch"]), tiny.Rng(0, "check"))
    inputs = {name: t.to(device) for name, t in prepared.items()}
    mask = None
    if what != "plan":
        sampler = Search(pattern=(1, 2)).make_sampler(list_lengths(blocks)).to(device)
        mask = sampler.sample(size["batch"], tiny.Rng(0, "check", 0)).mask
        mask = (torch.ones_like(mask) if what == "dense" else mask.detach()).requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters())
    batch_dim = task.batch_dim(model)
    times = []

    def forward() -> torch.Tensor:
        with trainer.accelerator.autocast():
            return loss.losses(model, inputs).mean()

    for _ in range(4):
        _synchronize(device)
        start = time.perf_counter()
        with tiny.Gates(model, blocks, batch_dim, backbone.streams) as gates:
            gates.mask = mask
            forward().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    speed = f"{min(times):.3g} s a step of {size['batch']}"
    if device.type == "cpu":
        import resource

        peak, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident, interpreter included"
    else:
        peak, kind = torch.accelerator.max_memory_allocated(device), "allocated"
    found = f"{speed}, peak {gigabytes(peak)} {kind}"
    if what != "plan":
        return found
    with torch.device("meta"):
        planned = backbone.construct(backbone.config())
    setup = Setup(batch_size=size["batch"], precision=trainer.precision)
    needs = training_needs(backbone, loss, planned, tiny.Recover(ema=0), setup)
    real = saved_by(forward, model, blocks, "fp32").whole  # the trainer's own autocast is on
    counted = needs.activations.whole if needs.activations else 0
    return (
        f"{found}; planned {gigabytes(needs.total(False))}, activations {gigabytes(counted)} (real {gigabytes(real)})"
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reason(stderr: str) -> str:
    """The last line that says what went wrong, fit for a cell."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("error:")] or lines or ["no message"]
    return telling[0].replace("|", "/")[:200]


def _hardware() -> str:
    if not torch.accelerator.is_available():
        return f"no GPU, {os.cpu_count()} CPU cores"
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(kind)
    return f"{count} x {name}"


def table(checks: Sequence[Check], size: str, timeout: float) -> str:
    """Run the rows and give the table."""
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    lines = [f"| on {_hardware()}, {size} sizes | found | seconds |", "|---|---|---|"]
    for check in checks:
        start = time.monotonic()
        found = run(check, size, timeout, gpus)
        lines.append(f"| {check.name} | {found} | {time.monotonic() - start:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"`python benchmarks/gpu_check.py`, {made}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a row has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the sizes of a CPU, to see that it runs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each row (default: 240)")
    parser.add_argument("--measure", choices=["dense", "sparse", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=list(SIZES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps({"found": measure(options.measure, SIZES[options.size])}))
        return 0
    size = "tiny" if options.tiny or not torch.accelerator.is_available() else "full"
    made = table([check for check in CHECKS if options.only in check.name], size, options.timeout)
    print(made)
    return int("FAILED" in made)


if __name__ == "__main__":
    sys.exit(main())
