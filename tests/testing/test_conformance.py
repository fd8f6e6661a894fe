"""Every built-in plugin passes the conformance kit, in tests and on the command line."""

from __future__ import annotations

import pytest

from places import TESTS
from tinyfusion_core.cli import main
from tinyfusion_core.errors import UserError
from tinyfusion_core.registry.registry import registry
from tinyfusion_core.testing import pairs_of, parametrize_with_checks
from tinyfusion_core.testing.checks import CHECKS
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow, ScheduledDiffusion
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_llm import (
    CausalLM,
    EncoderDecoder,
    MaskedLM,
    MaskedToken,
    NextToken,
    SentenceEmbedding,
    TextEncoder,
)
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching, SiT
from toys import Match, Planted

pytestmark = pytest.mark.numerics

WORKING = Planted(scales=(1, 1, 1, 1))
PLUGINS = [plugin.name for plugin in registry().plugins if {"backbone", "loss"} & {kind for kind, _ in plugin.brings}]
PAIRS = [(DiT, GaussianDiffusion), (DiffusersTransformer, RectifiedFlow), (CausalLM, NextToken)]
ALIKE = [
    *((SiT, FlowMatching), (MAR, MaskedTokenDiffusion), (DiffusersTransformer, ScheduledDiffusion)),
    *((EncoderDecoder, NextToken), (MaskedLM, MaskedToken), (TextEncoder, SentenceEmbedding)),
]
"""Those that share much of their code with one of the others."""


@parametrize_with_checks(PAIRS)
def test_built_in_plugins(check) -> None:
    check()


@pytest.mark.slow
@parametrize_with_checks(ALIKE)
def test_those_much_like_another(check) -> None:
    check()


@parametrize_with_checks([(WORKING, Match())])
def test_a_small_one_of_ones_own(check) -> None:
    check()


def test_every_built_in_backbone_and_loss_is_checked() -> None:
    assert {pair for name in PLUGINS for pair in pairs_of(name, registry())} == {*PAIRS, *ALIKE}
    classes = registry().classes
    parts = {part for pair in (*PAIRS, *ALIKE) for part in pair}
    assert parts == {*classes["backbone"].values(), *classes["loss"].values()}


def test_expected_failures_must_fail(pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\npythonpath = {TESTS}\n")
    pytester.makepyfile(
        """
        from tinyfusion_core.testing import parametrize_with_checks
        from toys import Match, Planted

        class Idle(Planted):
            def blocks(self, model):
                return ["blocks.*"]

        why = {"every_block_learns": "half of the blocks do nothing", "tiny": "does not fail"}

        @parametrize_with_checks([(Idle, Match)], expected_failures=why)
        def test_conformance(check):
            check()
        """
    )
    done = pytester.runpytest_inprocess(
        "-k", "every_block or tiny", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:slipcover", "-rx"
    )
    done.assert_outcomes(xfailed=1, failed=1)
    done.stdout.fnmatch_lines(["*XPASS(strict)*does not fail*", "*Idle-Match-every_block_learns*half of the blocks*"])


def test_expected_failures_name_checks() -> None:
    with pytest.raises(UserError, match="no check 'blokcs'; did you mean 'blocks'"):
        parametrize_with_checks([(Planted, Match)], expected_failures={"blokcs": ""})


def test_every_check_says_what_it_looks_at() -> None:
    for check in CHECKS:
        assert (check.__doc__ or "").strip().endswith("."), check


@pytest.mark.slow
def test_the_command_line_gives_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-plugin", "sit"]) == 0
    out = capsys.readouterr().out
    assert "SiT + FlowMatching" in out
    assert out.count("ok ") == len(CHECKS)
    assert f"all {len(CHECKS)} checks hold" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ditt", "no plugin 'ditt' is installed; did you mean 'dit'?"),
        ("images", "brings neither a backbone nor a loss"),
    ],
)
def test_plugins_that_cannot_be_checked(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-plugin", name]) == 2
    assert message in capsys.readouterr().err
