"""`tinyfusion watch`, `show`, `slice` and `export`: use the results in a run folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..protocols.command import FOR_PROGRAMS, Command, a_count, a_path

LORA = "lora"
"""The format of `tinyfusion export` that takes an adapter."""


class Watch(Command):
    """Show the progress of a run."""

    name = "watch"
    help = "show what a run or a comparison is doing, from the files of its folder"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A run folder, and whether to print once."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument("--once", action="store_true", help="print how it stands and end")

    def __call__(self, options: Namespace) -> int:
        """Show progress until the run has finished or Ctrl-C is pressed."""
        from contextlib import suppress

        from .watch import watch

        with suppress(KeyboardInterrupt):  # it has nothing to lose
            watch(options.run_dir, options.once)
        return 0


class Show(Command):
    """Print the results."""

    name = "show"
    help = "print the table of a finished run"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A run folder, and the output format."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument("--json", action="store_true", help=FOR_PROGRAMS)

    def __call__(self, options: Namespace) -> int:
        """Print the results table of a finished run."""
        from ..reporting.results import results_record, results_table
        from ..runtime.run_folder import existing_run
        from .printing import print_json, print_table

        folder = existing_run(options.run_dir)
        if options.json:
            print_json(results_record(folder))
        else:
            print_table(results_table(folder))
        return 0


class Slice(Command):
    """Cut a shallower student out of one that was trained at several depths."""

    name = "slice"
    help = "write a shallower student out of one that was trained with recover.depths"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A run folder, a depth, and where to write."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument("--depth", type=a_count, required=True, help="how many blocks, or branches, it keeps")
        parser.add_argument("--out", type=a_path, help="folder (default: RUN_DIR/slices/DEPTH)")

    def __call__(self, options: Namespace) -> int:
        """Print the folder that was written."""
        from ..pipeline.slices import write_slice
        from ..runtime.run_folder import existing_run

        print(write_slice(existing_run(options.run_dir), options.depth, options.out))
        return 0


class Export(Command):
    """Export the student or the decision."""

    name = "export"
    help = "hand a run's student, or which blocks it kept, to other software"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """A run folder, a format, and where to write."""
        parser.add_argument("run_dir", type=a_path)
        parser.add_argument(
            "--to",
            required=True,
            metavar="FORMAT",
            help=f"transformers, diffusers, single-file, adapter, mergekit, llama.cpp, peft, indices, {LORA}",
        )
        parser.add_argument(
            "--adapter", type=a_path, help=f"for --to {LORA}: a LoRA of the teacher, to go on the student"
        )
        parser.add_argument("--out", type=a_path, help="folder or file (default: RUN_DIR/export/FORMAT, or print it)")

    def __call__(self, options: Namespace) -> int:
        """Print the exported text, or the path that was written."""
        from ..errors import UserError
        from ..pipeline.exporting.adapters import export_adapter
        from ..pipeline.exporting.export import export_run
        from ..runtime.run_folder import existing_run

        if (options.to == LORA) != (options.adapter is not None):
            raise UserError(
                f"--to {LORA} and --adapter go together: the LoRA of the teacher that the student is to have"
            )
        folder = existing_run(options.run_dir)
        if options.adapter is not None:
            print(export_adapter(folder, options.adapter, options.out))
        else:
            print(export_run(folder, options.to, options.out))
        return 0
