"""What it costs to start every command that computes nothing: processor seconds and peak memory.

    python benchmarks/startup.py [--times 3] [--beside CHECKOUT] [--only validate]

Processor seconds hardly depend on what else the machine does, seconds do. With `--beside`, another checkout takes turns
with this one, and the ratios are of medians within this one run. One thread; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
COMMANDS = (
    "--help",
    "watch tests/before_rooms/compare --once",
    "plugins",
    "keys search",
    "validate recipes/quickstart.yaml",
    "validate recipes/dit_xl_d14.yaml",
)


def cost(checkout: Path, command: str) -> tuple[float, float]:
    """Run a command of a checkout; returns its processor seconds and peak memory in MB."""
    paths = {"PYTHONPATH": os.pathsep.join((str(checkout), str(checkout / "plugins"))), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tinyfusion_core", *command.split()]
    environment, nothing = {**os.environ, **paths}, subprocess.DEVNULL
    child = subprocess.Popen(words, cwd=checkout, env=environment, stdout=nothing, stderr=nothing)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = 0  # it has been waited for
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"tinyfusion {command} in {checkout} ended with exit code {code}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="runs of every command (default: 3)")
    parser.add_argument("--beside", type=Path, help="another checkout to compare with")
    parser.add_argument("--only", default="", help="commands that have this in them")
    options = parser.parse_args()
    checkouts = [HERE, *([options.beside.resolve()] if options.beside else [])]
    print(
        "| command | processor seconds | peak memory, MB |"
        + (" seconds of the other | ratio |" if options.beside else "")
    )
    print("|---|---|---|" + ("---|---|" if options.beside else ""))
    for command in (command for command in COMMANDS if options.only in command):
        found = defaultdict(list)
        for _ in range(options.times):
            for checkout in checkouts:
                found[checkout].append(cost(checkout, command))
        seconds, memory = zip(*(map(statistics.median, zip(*found[c], strict=True)) for c in checkouts), strict=True)
        row = [f"`{command}`", f"{seconds[0]:.1f}", f"{memory[0]:,.0f}"]
        if options.beside:
            row += [f"{seconds[1]:.1f}", f"{seconds[0] / seconds[1]:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
