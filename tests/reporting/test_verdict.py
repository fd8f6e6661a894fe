"""The verdict of a run: each sentence follows from numbers, whatever was measured and whatever was not."""

from __future__ import annotations

from typing import Any

import pytest

import tinyfusion_core as tiny
from tinyfusion_core.reporting.measured import Measured
from tinyfusion_core.reporting.verdict import how_sure, spans, verdict


def decision(*kept: int, of: int = 8, method: str = "Search", **more: Any) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(f"blocks.{i}" for i in range(of)), kept=kept, method=method, **more)


def measured(
    name: str, *values: float | None, unit: str = "", better: str = "lower", names: tuple[str, ...] = ()
) -> Measured:
    names = names or ("teacher", "pruned", "recovered")[: len(values)]
    return Measured(name=name, values=dict(zip(names, values, strict=True)), unit=unit, better=better, note="")


LOSS = measured("held-out loss", 0.08, 0.28, 0.084)
MEASURED = [
    measured("blocks", 8, 4, 4, better=""),
    measured("parameters", 1000, 540, 540),
    measured("FLOPs", 100, 50, 50, unit="FLOP"),
    LOSS,
    measured("conditional accuracy", 0.968, 0.5, 0.92, better="higher"),
    measured("latency", 20.0, 10.0, 10.5, unit="ms"),
    measured("throughput", 50.0, 100.0, 95.0, unit="samples/s", better="higher"),
]


def entrant(kept: list[int], behind: float | None, error: float, *of: str) -> dict[str, Any]:
    return {"kept": kept, "of": of, "steps": 10, "loss": behind, "behind": behind, "standard_error": error}


def test_a_search_that_has_settled_and_a_student_that_has_recovered() -> None:
    chosen = decision(0, 1, 3, 6, confidences=(0.97,), choices=(tuple(range(8)),))
    assert verdict({"": chosen}, MEASURED) == {
        "What went": "4 of 8 blocks: 2, 4, 5 and 7.",
        "Speed and size": (
            "1.90 times as fast (latency 20 ms → 10.5 ms), 54% of the parameters and 50% of the FLOPs."
        ),
        "Quality": (
            "Held-out loss 0.08 → 0.084, 5% higher; conditional accuracy 0.968 → 0.92, 5% lower. "
            "Recovery took back 98% of the loss that pruning had cost."
        ),
        "How sure": "0.97: settled, which does not say that it is right.",
        "Content?": "Yes, by what was measured. No other choice was recovered for comparison.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("confidences", "choices", "said"),
    [
        ((0.51,), (), "0.51: undecided; try more steps or a race."),
        ((0.6,), (), "0.60: leaning, not settled; more steps may settle it."),
        ((0.9,), (), "0.90: settled, which does not say that it is right."),
        (
            (0.95, 0.51),
            ((0, 1, 2, 3), (4, 5, 6, 7)),
            "0.51 in the least sure of 2 choices, that among blocks 4 to 7: undecided; try more steps or a race.",
        ),
        ((), (), "Not measured: Taylor names blocks and does not say how surely."),
    ],
)
def test_confidence_is_words_and_a_number(confidences: tuple, choices: tuple, said: str) -> None:
    chosen = decision(0, 1, 4, 5, method="Taylor", confidences=confidences, choices=choices)
    assert how_sure(chosen) == said


def test_a_race_says_who_was_close_and_whose_choices_were_tried() -> None:
    first = [
        entrant([0, 1], 0.0, 0.0, "Taylor", "Search"),
        entrant([0, 2], 0.001, 0.001, "Greedy"),
        entrant([0, 3], 0.02, 0.001, "neighbour"),
        entrant([0, 4], None, 0.0, "Search"),
    ]

    def said(*rounds: list) -> tuple[str, str]:
        chosen = decision(0, 1, provenance={"race": list(rounds)}, method="Race")
        return how_sure(chosen), verdict({"": chosen}, MEASURED)["Content?"]

    close, content = said(first, first[:2])
    assert close == (
        "Undecided: after 10 steps of recovery, 1 other entrant is within 2 standard errors, "
        "the nearest 0.001 ± 0.001 behind; a longer race may tell them apart."
    )
    assert content == (
        "Yes, by what was measured. Beside this choice, which Taylor and Search proposed, 3 others were recovered "
        "briefly (of Greedy, 1 neighbour); none was surely better."
    )
    assert said([first[0], entrant([0, 2], -0.001, 0.002, "Greedy")])[0].endswith(
        "the nearest 0.001 ± 0.002 ahead; a longer race may tell them apart."
    )
    decided, _ = said(first, [first[0], first[2]])
    assert decided == "Decided, as far as 10 steps of recovery tell: the next entrant's loss is 0.02 ± 0.001 behind."
    assert said([first[0], first[3]])[0] == "Decided: after 10 steps of recovery nobody else was left in the race."


def test_finals_and_qualities_say_what_they_know() -> None:
    finals = [[{"kept": [0, 1], "loss": 1.0, "of": ["Search"]}, {"kept": [0, 2], "loss": 2.0, "of": ["Greedy"]}]]
    chosen = decision(0, 1, provenance={"finals": finals})
    assert how_sure(chosen) == "It won the finals on one recovery each; how sure that is was not measured."
    assert verdict({"": chosen}, MEASURED)["Content?"].endswith(
        "Beside this choice, which Search proposed, one other was recovered briefly (of Greedy); "
        "none was surely better."
    )
    depths = [{"kept": [0], "probability": 0.1}, {"kept": [0, 1], "probability": 0.72}]
    assert how_sure(decision(0, 1, provenance={"quality": depths})) == (
        "0.72: the probability that so few blocks recover within what was allowed."
    )
    by_metric = [{"kept": [0, 1], "probability": None, "measures": "FID"}]
    assert how_sure(decision(0, 1, provenance={"quality": by_metric})) == (
        "Not known: FID is one number, and the prediction has no interval."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([LOSS], "Yes, by what was measured."),
        ([measured("held-out loss", 0.08, 0.28, 0.11)], "Nearly: the loss has not come all the way back. "
         "More steps of recovery may do."),
        ([measured("held-out loss", 0.08, 0.28, 0.2)], "No: recovery did not take back half of the loss. "
         "Try more steps, a higher rate, or distillation (kd)."),
        ([LOSS, measured("FID", 3.0, 40.0, 5.0)], "Not yet: still far from the teacher in FID. "
         "Try more steps of recovery first."),
        ([measured("accuracy", 0.9, 0.1, 0.3, better="higher")], "Not yet: still far from the teacher in accuracy. "
         "Try more steps of recovery first."),
        ([measured("held-out loss", 0.08, 0.28)], "Not yet: nothing was recovered. Add a recover section."),
        ([measured("held-out loss", 0.08, 0.28, None)], "No: the result has no value of held-out loss."),
        ([measured("latency", 2.0, 1.0, 1.0, unit="ms")], "Not known: no quality was measured."),
        ([], "Not known: no quality was measured."),
        ([measured("held-out loss", -1.0, 2.0, -0.9)], "Yes, by what was measured."),
    ],
)  # fmt: skip
def test_whether_to_be_content(rows: list[Measured], said: str) -> None:
    content = verdict({"": decision(0)}, rows)["Content?"]
    assert content == f"{said} No other choice was recovered for comparison."


@pytest.mark.parametrize(
    ("rows", "speed", "quality"),
    [
        ([], "Speed was not measured; add Latency to evaluate.", "The held-out loss was not measured."),
        (
            [measured("parameters", 10, 5), measured("FLOPs", None, None, unit="FLOP"), measured("latency", None, None,
             unit="ms"), measured("held-out loss", 1.0, 3.0)],
            "50% of the parameters. Speed was not measured; add Latency to evaluate.",
            "Held-out loss 1 → 3, 3.0 times the teacher's.",
        ),
        (
            [measured("decode", 100.0, 150.0, unit="tokens/s", better="higher"), measured("perplexity", 9.0, 9.01)],
            "1.50 times as fast (decode 100 tokens/s → 150 tokens/s).",
            "Perplexity 9 → 9.01, as the teacher's. The held-out loss was not measured.",
        ),
        (
            [measured("latency", 1.0, 2.0, unit="ms"), measured("KID", -0.1, 0.2),
             measured("held-out loss", 1.0, None), measured("win rate", None, 0.625, better="higher")],
            "0.50 times as fast (latency 1 ms → 2 ms).",
            "KID -0.1 → 0.2; held-out loss has no value; win rate 0.625.",
        ),
        ([measured("held-out loss", 1.0, 5.0, 0.9)], "Speed was not measured; add Latency to evaluate.",
         "Held-out loss 1 → 0.9, 10% lower. Recovery took back 100% of the loss that pruning had cost."),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_said_or_left_out(rows: list[Measured], speed: str, quality: str) -> None:
    said = verdict({"": decision(0)}, rows)
    assert (said["Speed and size"], said["Quality"]) == (speed, quality)


def test_rounds_are_named_and_the_last_network_counts() -> None:
    names = ("teacher", "d4 pruned", "d4", "d2 pruned", "d2")
    rows = [measured("held-out loss", 1.0, 9.0, 1.1, 8.0, 1.2, names=names)]
    rounds = {"d4": decision(0, 1, 2, 7, confidences=(0.95,)), "d2": decision(0, 3, of=4, method="Greedy")}
    assert verdict(rounds, rows) == {
        "What went": "d4: 4 of 8 blocks: 3 to 6. d2: 2 of 4 blocks: 1 and 2.",
        "Speed and size": "Speed was not measured; add Latency to evaluate.",
        "Quality": "Held-out loss 1 → 1.2, 20% higher.",
        "How sure": (
            "d4: 0.95: settled, which does not say that it is right. "
            "d2: Not measured: Greedy names blocks and does not say how surely."
        ),
        "Content?": "Yes, by what was measured. No other choice was recovered for comparison.",
    }
    race = [[entrant([0, 3], 0.0, 0.0, "neighbour"), entrant([0, 1], 0.1, 0.01, "neighbour")]]
    rounds["d2"] = decision(0, 3, of=4, provenance={"race": race})
    assert verdict(rounds, rows)["Content?"] == (
        "Yes, by what was measured. d4: No other choice was recovered for comparison. "
        "d2: Beside this choice, one other was recovered briefly (1 neighbour); none was surely better."
    )


def test_block_lists_are_named_and_nothing_is_nothing() -> None:
    blocks = (*(f"encoder.{i}" for i in range(4)), *(f"decoder.{i}" for i in range(4)))
    chosen = tiny.Decision(blocks=blocks, kept=(0, 4, 5, 7), method="Search")
    assert verdict({"": chosen}, [])["What went"] == "4 of 8 blocks: encoder 1 to 3; decoder 6."
    assert verdict({"": decision(0, 1, of=2)}, [])["What went"] == "Nothing: all 2 blocks stay."
    assert verdict({}, MEASURED) == {}
    assert spans([0, 2, 4, 5, 6, 7, 9, 10]) == "0, 2, 4 to 7, 9 and 10"
