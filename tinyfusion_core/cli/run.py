"""`tinyfusion run`, `demo`, `validate`, `cache-teacher`, `generate-data`: run a recipe, or make what it learns from."""

from __future__ import annotations

import shlex
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocols.command import Command, a_count, a_path
from .compare import WORKERS, some_workers

if TYPE_CHECKING:
    from ..runtime.workers.base import Workers

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The recipe of `tinyfusion demo`: a link to `recipes/`, a file in the wheel."""


class Run(Command):
    """Run a recipe."""

    name = "run"
    help = "do what a recipe says, or what is left of it"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden, the run folder, and the stage to restart from."""
        parser.add_argument("recipe", type=a_path)
        _add_folder_and_stage(parser)
        parser.add_argument(
            "--workers", type=some_workers, metavar="HOW", help=f"let others recover a race's entrants: {WORKERS}"
        )

    def __call__(self, options: Namespace) -> int:
        """Run or resume; the main process prints the results table and the path of the report."""
        return _run(options.recipe, options, [self.name, str(options.recipe)], options.workers)


class Demo(Command):
    """Run the quickstart's recipe, which is part of the package."""

    name = "demo"
    help = "make a network of 8 blocks one of 4, in minutes: the quickstart, without a recipe file"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The run folder, and the stage to restart from; keys of the recipe can be overridden."""
        _add_folder_and_stage(parser)

    def __call__(self, options: Namespace) -> int:
        """Run or resume, as `tinyfusion run recipes/quickstart.yaml` does."""
        from ..errors import need

        for module in ("timm", "peft"):  # both are told at once, by one name
            need(module, "tinyfusion[demo]", "tinyfusion demo")
        return _run(QUICKSTART, options, [self.name])


def _add_folder_and_stage(parser: ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=a_path, help="the run folder (default: runs/NAME_OF_THE_RECIPE)")
    parser.add_argument(
        "--restart-from",
        metavar="STAGE",
        help="forget this stage (train, search, recover, evaluate; ROUND.search ...) and the later ones, then run",
    )
    parser.add_argument(
        "--extend", action="store_true", help="go on with a recovery that has ended, to the recover.steps of now"
    )


def _run(path: Path, options: Namespace, typed: Sequence[str], workers: Workers | None = None) -> int:
    """Run or resume a recipe for a command, of which `typed` is said in messages on how to go on."""
    from ..pipeline.recipe import load_recipe
    from ..pipeline.run import run_recipe
    from ..reporting.results import results_table
    from ..runtime.run_folder import RunFolder
    from .printing import print_table

    run_dir = options.run_dir or Path("runs") / path.stem
    command = shlex.join(["tinyfusion", *typed, *options.overrides])
    recipe = load_recipe(path, options.overrides)
    report = run_recipe(recipe, run_dir, command, options.restart_from, extend=options.extend, workers=workers)
    if not recipe.trainer.accelerator.is_main_process:
        return 0
    print_table(results_table(RunFolder(run_dir)))
    print(f"report: {report}")
    return 0


class Validate(Command):
    """Plan a recipe."""

    name = "validate"
    help = "plan a recipe on the meta device and print the plan"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden, and the devices to plan for."""
        parser.add_argument("recipe", type=a_path)
        parser.add_argument("--devices", type=a_count, default=1, help="plan the memory of so many (default: 1)")
        parser.add_argument("--memory", help="of each device, as 24GB: say when the plan does not fit")

    def __call__(self, options: Namespace) -> int:
        """Print the plan and the missing files; fails if the plan has problems."""
        from rich.table import Table

        from ..errors import UserError, require
        from ..pipeline.planning.amounts import parse_bytes
        from ..pipeline.planning.plan import make_plan
        from ..pipeline.planning.training import Hardware
        from ..pipeline.recipe import load_recipe
        from .printing import print_table

        require(options.devices >= 1, "--devices", options.devices, "at least 1")
        hardware = Hardware(options.devices, None if options.memory is None else parse_bytes(options.memory))
        plan = make_plan(load_recipe(options.recipe, options.overrides), comparisons=True, hardware=hardware)
        table = Table(title=f"{options.recipe}", title_justify="left", show_header=False)
        for what, value in plan.rows:
            table.add_row(what, value)
        print_table(table)
        for missing in plan.missing:
            print(f"needed to run: {missing}")
        if plan.problems:
            raise UserError("\n".join(f"{options.recipe}: {p}" for p in plan.problems))
        print("the plan works out" + (", once these are there" if plan.missing else ""))
        return 0


class CacheTeacher(Command):
    """Write the predictions that a recovery learns from."""

    name = "cache-teacher"
    help = "write a teacher's predictions to recover.kd.cache.folder, so that the recovery runs no teacher"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe whose recovery names the cache, with keys that can be overridden."""
        parser.add_argument("recipe", type=a_path)

    def __call__(self, options: Namespace) -> int:
        """Write what is missing; the main process prints how much there is."""
        from ..pipeline.recipe import load_recipe
        from ..pipeline.teaching.caching import cache_teacher
        from ..runtime.distributed import rank_and_world_size

        recipe = load_recipe(options.recipe, options.overrides)
        _ = recipe.trainer.accelerator  # from here on the processes know of each other
        said = cache_teacher(recipe)
        if rank_and_world_size()[0] == 0:
            print(said)
        return 0


class GenerateDataCommand(Command):
    """Make training data with a recipe's teacher."""

    name = "generate-data"
    help = "make training data with a recipe's teacher, for recipes with data: Generated"
    takes_overrides = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A recipe, whose keys can be overridden, the folder, and the options of `GenerateData`."""
        parser.add_argument("recipe", type=a_path)
        parser.add_argument("--out", type=a_path, required=True, help="the folder of the data")
        parser.add_argument("--samples", type=a_count, required=True, help="how many samples")
        for option, kind, text in (
            ("--seed", int, "of all that is random in them (default: 0)"),
            ("--dtype", str, "of numbers with a point: float32 (default), float16, bfloat16"),
            ("--shard-size", a_count, "samples in a shard (default: 512)"),
            ("--batch-size", a_count, "samples at once (default: 64)"),
        ):
            parser.add_argument(option, type=kind, default=SUPPRESS, help=text)

    def __call__(self, options: Namespace) -> int:
        """Make what is missing; the main process prints how much there is."""
        from ..evaluation.generated_data import GenerateData
        from ..pipeline.recipe import load_recipe
        from ..pipeline.teaching.generating import generate_data
        from ..runtime.distributed import rank_and_world_size

        recipe = load_recipe(options.recipe, options.overrides)
        _ = recipe.trainer.accelerator  # from here on the processes know of each other
        own = ("command", "debug", "recipe", "out", "overrides")
        given = {name: value for name, value in vars(options).items() if name not in own}
        made = generate_data(recipe, GenerateData(**given), options.out)
        if rank_and_world_size()[0] == 0:
            print(f"{options.out}: {options.samples:,} samples in {len(made['shards']):,} shards, all verified")
        return 0
