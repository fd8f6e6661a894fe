"""Every mistake in the table is noticed by the tests that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutations.mutation import Mutation, run_on_copy
from mutations.table import MUTATIONS

NAMES = [mutation.name for mutation in MUTATIONS]
EACH = pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)


def test_the_table_is_long_and_says_nothing_twice() -> None:
    assert len(MUTATIONS) >= 44
    assert len(set(NAMES)) == len({(m.file, m.right, m.wrong) for m in MUTATIONS}) == len(MUTATIONS)


@EACH
def test_a_mutation_is_not_stale(mutation: Mutation) -> None:
    compile(mutation.source(), mutation.file, "exec")
    assert mutation.wrong != mutation.right and mutation.tests


@pytest.mark.slow
def test_the_tests_pass_where_nothing_is_wrong(tmp_path: Path) -> None:
    """Else they would seem to catch whatever there is."""
    tests = dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests)
    done = run_on_copy(tmp_path, tests, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@EACH
def test_a_mutation_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    done = run_on_copy(tmp_path, mutation.tests, mutation)
    assert done.returncode == 1, f"exit code {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
