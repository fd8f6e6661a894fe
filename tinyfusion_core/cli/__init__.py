"""The command line. No logic here: every command is one call of the library."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..protocols.command import Command

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 a mistake of the user's, 130 (or 143) interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Plugins take seconds to import, and most commands need none of theirs.
    first = next((word for word in arguments if not word.startswith("-")), None)
    brought = {} if first is None or first in _COMMANDS else _brought()
    parser = _parser(brought)
    options, flags = parser.parse_known_args(arguments)
    if flags and options.command not in ("run", "validate", "costs", "compare", "audit"):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    from ..errors import FailedElsewhere, Interrupted, UserError
    from ..runtime.signals import interruptible

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        with interruptible():
            extra = brought.get(options.command)
            code: int = _COMMANDS[options.command](options, flags) if extra is None else extra(options)
    except FailedElsewhere:  # that process says why
        return USER_ERROR
    except UserError as e:
        if options.debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as e:
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"{e or 'interrupted'}. Go on with:\n  {_command(_to_go_on(arguments))}", file=sys.stderr)
        return 128 + e.signum if isinstance(e, Interrupted) else INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _brought() -> dict[str, Command]:
    """The commands of plugins, by name."""
    from ..protocols.registry import registry

    return {cls.name: cls() for cls in registry().classes["command"].values()}


def _parser(brought: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyfusion", description="Learned depth pruning: which blocks can a transformer lose?", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **kwargs: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        # Given before or after the command; the default must not overwrite what came before it.
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    keys = "Any key of the recipe can be set: --search.steps 600 (values are YAML). `tinyfusion keys` lists them."
    run = command("run", "do what a recipe says, or what is left of it", epilog=keys)
    run.add_argument("recipe", type=Path)
    run.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME_OF_THE_RECIPE)")
    run.add_argument(
        "--restart-from",
        metavar="STAGE",
        help="forget this stage (train, search, recover, evaluate; ROUND.search ...) and the later ones, then run",
    )
    validate = command("validate", "plan a recipe on the meta device and print the plan", epilog=keys)
    validate.add_argument("recipe", type=Path)
    validate.add_argument("--devices", type=int, default=1, help="plan the memory of so many (default: 1)")
    validate.add_argument("--memory", help="of each device, as 24GB: say when the plan does not fit")
    for name, text in (
        ("compare", "prune with every criterion, recover all alike, and set them beside random subsets"),
        ("audit", "heal many random subsets and see how well cheap scores foretell the healed loss"),
    ):
        comparison = command(name, text, epilog=keys)
        comparison.add_argument("recipe", type=Path)
        comparison.add_argument("--run-dir", type=Path, help=f"default: runs/NAME_OF_THE_RECIPE-{name}")
    costs = command("costs", "measure what every block costs, for a budget in parameters, FLOPs or time", epilog=keys)
    costs.add_argument("recipe", type=Path)
    command("keys", "list every key that a recipe can have")
    plugins = command("plugins", "list installed plugins and what they bring")
    plugins.add_argument("--json", action="store_true", help="for programs")
    check = command("check-plugin", "check that what a plugin brings holds to the contract")
    check.add_argument("name", help="of the plugin, as `tinyfusion plugins` lists it, or its Python file")
    new = command("new-plugin", "write a small package that brings a backbone and a loss, to begin with")
    new.add_argument("name", help="of the package: my-backbone")
    new.add_argument("--into", type=Path, default=Path(), help="the folder that gets it (default: this one)")
    watch = command("watch", "show what a run or a comparison is doing, from the files of its folder")
    watch.add_argument("run_dir", type=Path)
    watch.add_argument("--once", action="store_true", help="print how it stands and end")
    show = command("show", "print the table of a finished run")
    show.add_argument("run_dir", type=Path)
    budgets = command("budgets", "prune a run's teacher to several budgets by what its search has learned")
    budgets.add_argument("run_dir", type=Path)
    budgets.add_argument("--keep", type=int, nargs="+", default=(), metavar="K", help="blocks (default: all numbers)")
    budgets.add_argument("--recover-steps", type=int, default=0, metavar="N", help="recover each student (default: 0)")
    export = command("export", "hand a run's student, or which blocks it kept, to other software")
    export.add_argument("run_dir", type=Path)
    export.add_argument(
        "--to", required=True, metavar="FORMAT", help="transformers, diffusers, mergekit, llama.cpp, peft, indices"
    )
    export.add_argument("--out", type=Path, help="folder or file (default: RUN_DIR/export/FORMAT, or print it)")
    for name, extra in brought.items():
        extra.add_arguments(command(name, extra.help))
    return parser


def _run(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console

    from ..pipeline.recipe import load_recipe
    from ..pipeline.run import run_recipe
    from ..reporting.report import results_table
    from ..runtime.run_folder import RunFolder

    run_dir = options.run_dir or Path("runs") / options.recipe.stem
    command = _command(["run", str(options.recipe), *flags])
    recipe = load_recipe(options.recipe, flags)
    report = run_recipe(recipe, run_dir, command, options.restart_from)
    if not recipe.trainer.accelerator.is_main_process:
        return 0
    console = Console(highlight=False)
    console.print(results_table(RunFolder(run_dir)))
    console.print(f"report: {report}", soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, flags: list[str]) -> int:
    from ..pipeline.compare import compare_recipe, print_tables
    from ..pipeline.recipe import load_recipe

    run_dir = options.run_dir or Path("runs") / f"{options.recipe.stem}-{options.command}"
    command = _command([options.command, str(options.recipe), *flags])
    recipe = load_recipe(options.recipe, flags)
    findings, report = compare_recipe(recipe, options.command, run_dir, command)
    if recipe.trainer.accelerator.is_main_process:
        print_tables(findings)
        print(f"report: {report}")
    return 0


def _validate(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..errors import UserError, require
    from ..pipeline.memory import parse_bytes
    from ..pipeline.plan import Hardware, make_plan
    from ..pipeline.recipe import load_recipe

    require(options.devices >= 1, "--devices", options.devices, "at least 1")
    hardware = Hardware(options.devices, None if options.memory is None else parse_bytes(options.memory))
    plan = make_plan(load_recipe(options.recipe, flags), comparisons=True, hardware=hardware)
    table = Table(title=f"{options.recipe}", title_justify="left", show_header=False)
    for what, value in plan.rows:
        table.add_row(what, value)
    console = Console(highlight=False)
    console.print(table)
    for missing in plan.missing:
        console.print(f"needed to run: {missing}", soft_wrap=True)
    if plan.problems:
        raise UserError("\n".join(f"{options.recipe}: {p}" for p in plan.problems))
    console.print("the plan works out" + (", once these are there" if plan.missing else ""))
    return 0


def _costs(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..pipeline.recipe import load_recipe
    from ..protocols.data import Tensors
    from ..protocols.task import Task
    from ..selection.costs import block_costs, whole

    recipe = load_recipe(options.recipe, flags)
    backbone = recipe.backbone
    # Neither weights nor data change what a block costs.
    examples, model = Tensors(backbone.example(1)), backbone.construct(backbone.config())
    task = Task(backbone=backbone, loss=recipe.loss, train=examples, held_out=examples, model=model)
    costs = block_costs(task, recipe.trainer)
    table = Table("block", "parameters", "FLOPs", "ms")
    for path, parameters, flops, ms in zip(task.blocks, *costs.values(), strict=True):
        table.add_row(path, f"{parameters:,.0f}", f"{flops:,.0f}", f"{ms:.3f}")
    console = Console(highlight=False)
    console.print(table)
    for name, values in costs.items():
        rules = f"costs: {whole(values)}, budget: {round(sum(whole(values)) / 2)}"
        console.print(f"half of the {name}: rules: {{{rules}}}", soft_wrap=True)
    return 0


def _keys(options: argparse.Namespace, flags: list[str]) -> int:
    from ..pipeline.recipe import describe_keys
    from ..protocols.registry import registry

    registry()
    print(describe_keys(), end="")
    return 0


def _plugins(options: argparse.Namespace, flags: list[str]) -> int:
    import dataclasses
    import json

    from rich.console import Console
    from rich.table import Table

    from ..protocols.registry import registry

    plugins = registry().plugins
    if options.json:
        print(json.dumps([dataclasses.asdict(p) for p in plugins], indent=2))
        return 0
    table = Table("plugin", "kind", "brings", "module", "distribution")
    table.columns[2].no_wrap = True  # names to copy
    for p in plugins:
        for kind, name in p.brings or [("left out", "")]:
            table.add_row(p.name, kind, name, p.module, f"{p.distribution} {p.version}")
    console = Console(highlight=False)
    console.print(table)
    for p in plugins:
        if p.error:
            console.print(f"{p.name}: {p.error}", soft_wrap=True, markup=False)
    return 0


def _check_plugin(options: argparse.Namespace, flags: list[str]) -> int:
    from ..errors import UserError
    from ..testing import check_plugin

    results, subject = [], ""
    for result in check_plugin(options.name):
        results.append(result)
        if result.subject != subject:
            subject = result.subject
            print(subject)
        print(f"  {'FAIL' if result.error else 'ok  '}  {result.check:22} {result.meaning}", flush=True)
        if result.error:
            print(f"        {result.error}")
    failed = [result.check for result in results if result.error]
    if failed:
        raise UserError(f"plugin '{options.name}': {len(failed)} of {len(results)} checks failed")
    print(f"all {len(results)} checks hold")
    return 0


def _new_plugin(options: argparse.Namespace, flags: list[str]) -> int:
    from ..testing.scaffold import new_plugin

    folder = new_plugin(options.name, options.into)
    print(f"{folder}: README.md says how to go on")
    return 0


def _show(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console

    from ..reporting.report import results_table
    from ..runtime.run_folder import existing_run

    Console(highlight=False).print(results_table(existing_run(options.run_dir)))
    return 0


def _budgets(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..pipeline.budgets import budgets_of
    from ..runtime.distributed import rank_and_world_size
    from ..runtime.run_folder import existing_run

    rows = budgets_of(existing_run(options.run_dir), options.keep, options.recover_steps)
    if rank_and_world_size()[0] != 0:
        return 0
    table = Table("blocks", "kept", "parameters", "FLOPs", "held-out loss", "recovered")
    for row in rows:
        figures = ((row.parameters, ",.0f"), (row.flops, ",.0f"), (row.pruned, ".4g"), (row.recovered, ".4g"))
        shown = ["" if value is None else format(value, how) for value, how in figures]
        table.add_row(str(len(row.kept)), " ".join(map(str, row.kept)), *shown)
    Console(highlight=False).print(table)
    return 0


def _watch(options: argparse.Namespace, flags: list[str]) -> int:
    from contextlib import suppress

    from .watch import watch

    with suppress(KeyboardInterrupt):  # it has nothing to lose
        watch(options.run_dir, options.once)
    return 0


def _export(options: argparse.Namespace, flags: list[str]) -> int:
    from ..pipeline.export import export_run
    from ..runtime.run_folder import existing_run

    print(export_run(existing_run(options.run_dir), options.to, options.out))
    return 0


def _to_go_on(arguments: list[str]) -> list[str]:
    """The command without --restart-from, which would throw away what has just been saved."""
    out, skip = [], False
    for word in arguments:
        if not skip and not word.startswith("--restart-from"):
            out.append(word)
        skip = word == "--restart-from"
    return out


def _command(arguments: Sequence[str]) -> str:
    import shlex

    return shlex.join(["tinyfusion", *arguments])


_COMMANDS = {
    "run": _run,
    "compare": _compare,
    "audit": _compare,
    "validate": _validate,
    "costs": _costs,
    "budgets": _budgets,
    "keys": _keys,
    "plugins": _plugins,
    "check-plugin": _check_plugin,
    "new-plugin": _new_plugin,
    "watch": _watch,
    "show": _show,
    "export": _export,
}
