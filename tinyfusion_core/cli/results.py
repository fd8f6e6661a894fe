"""`tinyfusion watch`, `show` and `export`: what a run folder holds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..protocols.command import Command


class Watch(Command):
    """Look on."""

    name = "watch"
    help = "show what a run or a comparison is doing, from the files of its folder"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run_dir", type=Path)
        parser.add_argument("--once", action="store_true", help="print how it stands and end")

    def __call__(self, options: Namespace) -> int:
        from contextlib import suppress

        from .watch import watch

        with suppress(KeyboardInterrupt):  # it has nothing to lose
            watch(options.run_dir, options.once)
        return 0


class Show(Command):
    """Print the figures."""

    name = "show"
    help = "print the table of a finished run"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run_dir", type=Path)

    def __call__(self, options: Namespace) -> int:
        from rich.console import Console

        from ..reporting.report import results_table
        from ..runtime.run_folder import existing_run

        Console(highlight=False).print(results_table(existing_run(options.run_dir)))
        return 0


class Export(Command):
    """Hand on."""

    name = "export"
    help = "hand a run's student, or which blocks it kept, to other software"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run_dir", type=Path)
        parser.add_argument(
            "--to", required=True, metavar="FORMAT", help="transformers, diffusers, mergekit, llama.cpp, peft, indices"
        )
        parser.add_argument("--out", type=Path, help="folder or file (default: RUN_DIR/export/FORMAT, or print it)")

    def __call__(self, options: Namespace) -> int:
        from ..pipeline.export import export_run
        from ..runtime.run_folder import existing_run

        print(export_run(existing_run(options.run_dir), options.to, options.out))
        return 0
