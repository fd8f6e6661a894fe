"""`tinyfusion plugins`, `keys`, `check-plugin` and `new-plugin`: what recipes can use, and how to extend it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from ..protocols.command import FOR_PROGRAMS, Command, a_path


class Keys(Command):
    """List the keys of recipes."""

    name = "keys"
    help = "list the keys that a recipe can have"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """What is wanted."""
        parser.add_argument(
            "word", nargs="?", default="", help="a section, a class or a part of a key: search, Race, batch_size"
        )

    def __call__(self, options: Namespace) -> int:
        """Print keys with their types, defaults and meanings."""
        from ..pipeline.key_list import describe_keys

        print(describe_keys(options.word), end="")
        return 0


class Plugins(Command):
    """List the installed plugins."""

    name = "plugins"
    help = "list installed plugins and what they bring"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The output format."""
        parser.add_argument("--json", action="store_true", help=FOR_PROGRAMS)

    def __call__(self, options: Namespace) -> int:
        """Print every plugin with its classes, and why one was skipped."""
        from rich.table import Table

        from ..registry.extras import missing
        from ..registry.registry import registry
        from .printing import print_json, print_table

        plugins = registry().plugins
        lacking = {p.name: missing(p.distribution, p.name) for p in plugins}
        if options.json:
            print_json([{**asdict(p), "missing": lacking[p.name]} for p in plugins])
            return 0
        table = Table("plugin", "kind", "brings", "from")
        for p in plugins:
            table.add_section()
            for kind in dict.fromkeys(kind for kind, _ in p.brings) or ["left out"]:
                brings = ", ".join(name for k, name in p.brings if k == kind)
                table.add_row(p.name, kind, brings, f"{p.module} ({p.distribution} {p.version})")
        print_table(table)
        for p in plugins:
            if p.error:
                print(f"{p.name}: {p.error}")
            if lacking[p.name]:
                extra = f"{p.distribution}[{p.name}]"
                print(f"{p.name}: needs {', '.join(lacking[p.name])}: pip install '{extra}'")
        return 0


class CheckPlugin(Command):
    """Run the conformance kit."""

    name = "check-plugin"
    help = "check that what a plugin brings holds to the contract"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The plugin."""
        parser.add_argument("name", help="of the plugin, as `tinyfusion plugins` lists it, or its Python file")

    def __call__(self, options: Namespace) -> int:
        """Print the result of every check; fails if any check does."""
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


class NewPlugin(Command):
    """Write the plugin template."""

    name = "new-plugin"
    help = "write a small package that brings a backbone and a loss, to begin with"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The name of the package, and where to write it."""
        parser.add_argument("name", help="of the package: my-backbone")
        parser.add_argument("--into", type=a_path, default=Path(), help="the folder that gets it (default: this one)")

    def __call__(self, options: Namespace) -> int:
        """Write the package and print its folder."""
        from ..testing.scaffold import new_plugin

        folder = new_plugin(options.name, options.into)
        print(f"{folder}: README.md says how to go on")
        return 0
