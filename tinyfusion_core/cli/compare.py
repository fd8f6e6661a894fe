"""`tinyfusion compare`, `audit`, `costs` and `budgets`."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ..protocols.command import FOR_PROGRAMS, Command, a_count, a_path

if TYPE_CHECKING:
    from ..runtime.workers.base import Workers

WORKERS = "NUMBER on this machine, a Ray cluster (auto, ray://HOST:PORT), or slurm:NUMBER,KEY=VALUE,... (of submitit)"


def some_workers(text: str) -> Workers:
    """Return the workers that were typed; as `type=` of an argument."""
    from ..parsing.yaml12 import load_yaml
    from ..runtime.workers.ray_tasks import RayWorkers
    from ..runtime.workers.slurm_jobs import SlurmWorkers

    kind, _, rest = text.partition(":")
    if kind == "slurm":
        number, *settings = rest.split(",")
        pairs = [setting.split("=", 1) for setting in settings]
        if not all(len(pair) == 2 and pair[0] for pair in pairs):
            raise ArgumentTypeError(f"'{text}': after slurm:NUMBER come KEY=VALUE, separated by commas")
        return SlurmWorkers(_some(number), {key: load_yaml(value) for key, value in pairs})
    if text == "auto" or ":" in text:
        return RayWorkers(address=text)
    return RayWorkers(_some(text))


def _some(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:6]) <= 100_000:
        raise ArgumentTypeError(f"'{text}' is no number of workers; give {WORKERS}")
    return int(text)


class Compare(Command):
    """Compare criteria, with random subsets as reference."""

    name: ClassVar[Literal["compare", "audit"]] = "compare"
    help = "prune with every criterion, recover all alike, and set them beside random subsets"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden, and the folder of the results."""
        parser.add_argument("recipe", type=a_path)
        parser.add_argument("--run-dir", type=a_path, help=f"default: runs/NAME_OF_THE_RECIPE-{self.name}")
        parser.add_argument("--workers", type=some_workers, metavar="HOW", help=f"let others compute it: {WORKERS}")
        parser.add_argument("--json", action="store_true", help=FOR_PROGRAMS)

    def __call__(self, options: Namespace) -> int:
        """Compute what is missing, print the tables and the path of the report."""
        from ..comparison.statistics import guides
        from ..comparison.tables import unrounded
        from ..pipeline.compare import compare_recipe
        from ..pipeline.recipe import load_recipe
        from .printing import print_json, print_tables

        run_dir = options.run_dir or Path("runs") / f"{options.recipe.stem}-{self.name}"
        command = shlex.join(["tinyfusion", self.name, str(options.recipe), *options.overrides])
        recipe = load_recipe(options.recipe, options.overrides)
        results, report = compare_recipe(recipe, self.name, run_dir, command, options.workers)
        if not recipe.trainer.accelerator.is_main_process:
            return 0
        if options.json:
            scores = {name: asdict(rho) for name, rho in guides(results).items()} if results.masks else {}
            print_json({"report": str(report), "candidates": unrounded(results), "scores": scores})
        else:
            print_tables(results)
            print(f"report: {report}")
        return 0


class Audit(Compare):
    """Measure how well cheap scores predict the loss after recovery."""

    name = "audit"
    help = "recover many random subsets and see how well cheap scores foretell the recovered loss"


class Costs(Command):
    """Measure the cost of every block."""

    name = "costs"
    help = "measure what every block costs, for a budget in parameters, FLOPs or time"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden."""
        parser.add_argument("recipe", type=a_path)
        parser.add_argument("--batch-size", type=a_count, default=1, help="samples of a timed pass; default 1")
        parser.add_argument("--json", action="store_true", help=FOR_PROGRAMS)

    def __call__(self, options: Namespace) -> int:
        """Print parameters, FLOPs and milliseconds of every block, and rules to copy into a recipe."""
        from rich.table import Table

        from ..pipeline.recipe import load_recipe
        from ..protocols.backbone import constructed
        from ..protocols.blocks.paths import word_for
        from ..protocols.task import Task
        from ..selection.budget import measure, parse_budget
        from .printing import print_json, print_table

        recipe = load_recipe(options.recipe, options.overrides)
        backbone = recipe.backbone
        # Neither weights nor data change what a block costs.
        task = Task.without_data(backbone, recipe.loss, constructed(backbone, backbone.config()))
        batch_size = {} if options.batch_size == 1 else {"batch_size": options.batch_size}
        halves = [parse_budget(said, "costs") for said in (
            {"parameters": "0.5x"}, {"flops": "0.5x"}, {"latency_ms": "0.5x", **batch_size}
        )]  # fmt: skip
        costs = measure(halves, task, recipe.trainer)
        columns = [(*costs[half.name].blocks, costs[half.name].outside) for half in halves]
        rows = list(zip([*task.blocks, f"outside of the {word_for(task.blocks)}"], *columns, strict=True))
        if options.json:
            names = ("block", "parameters", "flops", "latency_ms")
            parts = [dict(zip(names, (path, *counts, ns / 1e6), strict=True)) for path, *counts, ns in rows]
            print_json({"batch_size": options.batch_size, "blocks": parts[:-1], "outside": parts[-1]})
            return 0
        table = Table("block", "parameters", "FLOPs", "ms")
        for path, parameters, flops, ns in rows:
            table.add_row(path, f"{parameters:,}", f"{flops:,}", f"{ns / 1e6:.3f}")
        print_table(table)
        for half in halves:
            print(f"search: {{budget: {half}}}  # {half.describe(costs[half.name])}")
        return 0


class Budgets(Command):
    """Prune to several budgets from one search."""

    name = "budgets"
    help = "prune a run's teacher to several budgets by what its search has learned"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A run folder, the numbers of blocks, and how long to recover."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument(
            "--keep", type=a_count, nargs="+", default=(), metavar="K", help="blocks (default: all numbers)"
        )
        parser.add_argument(
            "--recover-steps", type=a_count, default=0, metavar="N", help="recover each student (default: 0)"
        )
        parser.add_argument("--workers", type=some_workers, metavar="HOW", help=f"let others compute it: {WORKERS}")
        parser.add_argument("--json", action="store_true", help=FOR_PROGRAMS)

    def __call__(self, options: Namespace) -> int:
        """Print one row for each budget; they are also in `budgets.json`."""
        from rich.table import Table

        from ..pipeline.budgets import budgets_of
        from ..runtime.distributed import rank_and_world_size
        from ..runtime.run_folder import existing_run
        from .printing import print_json, print_table

        rows = budgets_of(existing_run(options.run_dir), options.keep, options.recover_steps, options.workers)
        if rank_and_world_size()[0] != 0:
            return 0
        if options.json:
            print_json({"recover_steps": options.recover_steps, "rows": [asdict(row) for row in rows]})
            return 0
        table = Table("blocks", "kept", "parameters", "FLOPs", "held-out loss", "recovered")
        for row in rows:
            figures = ((row.parameters, ",.0f"), (row.flops, ",.0f"), (row.pruned, ".4g"), (row.recovered, ".4g"))
            shown = ["" if value is None else format(value, how) for value, how in figures]
            table.add_row(str(len(row.kept)), " ".join(map(str, row.kept)), *shown)
        print_table(table)
        return 0
