"""What a plugin needs beside its own package: the extra that has its name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def missing(distribution: str, extra: str) -> list[str]:
    """Return the requirements of an extra that are not installed, or in a wrong version; empty without such an extra.

    Args:
        distribution: the package.
        extra: name of the extra.
    """
    return sorted({str(r) for r in _of_extra(distribution, extra) if not _installed(r)})


def _of_extra(distribution: str, extra: str) -> Iterator[Requirement]:
    try:
        found = [Requirement(line) for line in requires(distribution) or []]
    except PackageNotFoundError:  # a plugin of one file, or a checkout that was never installed
        return
    for requirement in found:
        marker, requirement.marker = requirement.marker, None
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            if requirement.name == distribution:
                for other in requirement.extras:
                    yield from _of_extra(distribution, other)
            else:
                yield requirement


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
