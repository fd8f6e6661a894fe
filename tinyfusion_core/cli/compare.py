"""`tinyfusion compare`, `audit`, `costs` and `budgets`."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import ClassVar, Literal

from ..protocols.command import Command, a_count, a_path


class Compare(Command):
    """Compare criteria, with random subsets as reference."""

    name: ClassVar[Literal["compare", "audit"]] = "compare"
    help = "prune with every criterion, recover all alike, and set them beside random subsets"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden, and the folder of the results."""
        parser.add_argument("recipe", type=a_path)
        parser.add_argument("--run-dir", type=a_path, help=f"default: runs/NAME_OF_THE_RECIPE-{self.name}")

    def __call__(self, options: Namespace) -> int:
        """Compute what is missing, print the tables and the path of the report."""
        from ..pipeline.compare import compare_recipe, print_tables
        from ..pipeline.recipe import load_recipe

        run_dir = options.run_dir or Path("runs") / f"{options.recipe.stem}-{self.name}"
        command = shlex.join(["tinyfusion", self.name, str(options.recipe), *options.overrides])
        recipe = load_recipe(options.recipe, options.overrides)
        results, report = compare_recipe(recipe, self.name, run_dir, command)
        if recipe.trainer.accelerator.is_main_process:
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

    def __call__(self, options: Namespace) -> int:
        """Print parameters, FLOPs and milliseconds of every block, and rules to copy into a recipe."""
        from rich.table import Table

        from ..pipeline.recipe import load_recipe
        from ..protocols.task import Task
        from ..runtime.progress import plain_console
        from ..selection.budget import measure, parse_budget

        recipe = load_recipe(options.recipe, options.overrides)
        backbone = recipe.backbone
        # Neither weights nor data change what a block costs.
        task = Task.without_data(backbone, recipe.loss, backbone.construct(backbone.config()))
        batch_size = {} if options.batch_size == 1 else {"batch_size": options.batch_size}
        halves = [parse_budget(said, "costs") for said in (
            {"parameters": "0.5x"}, {"flops": "0.5x"}, {"latency_ms": "0.5x", **batch_size}
        )]  # fmt: skip
        costs = measure(halves, task, recipe.trainer)
        table = Table("block", "parameters", "FLOPs", "ms")
        columns = [(*costs[half.name].blocks, costs[half.name].outside) for half in halves]
        for path, parameters, flops, ns in zip([*task.blocks, "outside of the blocks"], *columns, strict=True):
            table.add_row(path, f"{parameters:,}", f"{flops:,}", f"{ns / 1e6:.3f}")
        console = plain_console()
        console.print(table)
        for half in halves:
            console.print(f"search: {{budget: {half}}}  # {half.describe(costs[half.name])}", soft_wrap=True)
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

    def __call__(self, options: Namespace) -> int:
        """Print one row for each budget; they are also in `budgets.json`."""
        from rich.table import Table

        from ..pipeline.budgets import budgets_of
        from ..runtime.distributed import rank_and_world_size
        from ..runtime.progress import plain_console
        from ..runtime.run_folder import existing_run

        rows = budgets_of(existing_run(options.run_dir), options.keep, options.recover_steps)
        if rank_and_world_size()[0] != 0:
            return 0
        table = Table("blocks", "kept", "parameters", "FLOPs", "held-out loss", "recovered")
        for row in rows:
            figures = ((row.parameters, ",.0f"), (row.flops, ",.0f"), (row.pruned, ".4g"), (row.recovered, ".4g"))
            shown = ["" if value is None else format(value, how) for value, how in figures]
            table.add_row(str(len(row.kept)), " ".join(map(str, row.kept)), *shown)
        plain_console().print(table)
        return 0
