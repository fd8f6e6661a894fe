"""The verdict of a run in words: what went, what that gained and cost, how sure the choice is, whether to be content.

Every sentence follows from numbers of the run folder. Where words stand for numbers, the limits are the constants here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..protocols.blocks.paths import block_lists, numbers_of, word_for
from ..pruning.decision import Decision
from .measured import LOSS, Measured, figure, last_to_first

SETTLED, UNDECIDED = 0.9, 0.6
"""Confidences from which on a search has settled, and below which it is undecided."""
ERRORS = 2.0
"""Standard errors that tell two entrants of a race apart."""
MOST, HALF = 0.9, 0.5
"""Shares of what pruning has cost that a good recovery takes back, and that a bad one does not."""
FAR = 1.5
"""A measurement that is worse than the teacher's by this factor is far from it."""
TIMES, RATE = ("ms", "s"), "/s"
"""Units of measurements of speed."""
ALONE = "No other choice was recovered for comparison."
NEIGHBOUR = "neighbour"
"""Who proposes, in a race, what is one exchange away from its leader."""


def verdict(decisions: Mapping[str, Decision], measured: Sequence[Measured]) -> dict[str, str]:
    """Return the verdict as sentences by what they are about, in the order of reading.

    Args:
        decisions: those of the rounds by name; without rounds, the name is empty.
        measured: the measurements; their last network is the result of the run.
    """
    if not decisions:
        return {}
    found = {
        "What went": _what_went(decisions),
        "Speed and size": _gains(measured),
        "Quality": _costs(measured),
        "How sure": " ".join(
            f"{f'{name}: ' if name else ''}{how_sure(decision)}" for name, decision in decisions.items()
        ),
        "Content?": _content(decisions, measured),
    }
    return {about: text for about, text in found.items() if text}


def how_sure(decision: Decision) -> str:
    """Return how sure a choice is: of a search its confidence, of a race how far the others are behind."""
    if rounds := decision.provenance.get("race"):
        return _lead(decision, rounds[-1])
    if decision.confidence is not None:
        return _confidence(decision)
    if depths := decision.provenance.get("quality"):
        chosen = next(e for e in depths if e["kept"] == list(decision.kept))
        if chosen["probability"] is None:
            return f"Not known: {chosen['measures']} is one number, and the prediction has no interval."
        return f"{chosen['probability']:.2f}: the probability that so few blocks recover within what was allowed."
    if decision.provenance.get("finals"):
        return "It won the finals on one recovery each; how sure that is was not measured."
    return f"Not measured: {decision.method} names blocks and does not say how surely."


def _confidence(decision: Decision) -> str:
    value = min(decision.confidences)
    which = ""
    if len(decision.confidences) > 1:
        which = f" in the least sure of {len(decision.confidences)} choices"
        if len(decision.choices) == len(decision.confidences):
            which += f", that among blocks {spans(decision.choices[decision.confidences.index(value)])}"
    if value < UNDECIDED:
        return f"{value:.2f}{which}: undecided; try more steps or a race."
    if value < SETTLED:
        return f"{value:.2f}{which}: leaning, not settled; more steps may settle it."
    return f"{value:.2f}{which}: settled, which does not say that it is right."


def _lead(decision: Decision, entrants: Sequence[Mapping[str, Any]]) -> str:
    """How far those who were left in the last round of a race are behind."""
    others = [e for e in entrants if e["kept"] != list(decision.kept) and e["behind"] is not None]
    steps = f"{entrants[0]['steps']:,} steps of recovery"
    if not others:
        return f"Decided: after {steps} nobody else was left in the race."
    nearest = min(others, key=lambda e: float(e["behind"]))
    side = "behind" if nearest["behind"] >= 0 else "ahead"
    gap = f"{abs(nearest['behind']):.2g} ± {nearest['standard_error']:.1g} {side}"
    close = [e for e in others if e["behind"] < ERRORS * e["standard_error"]]
    if not close:
        return f"Decided, as far as {steps} tell: the next entrant's loss is {gap}."
    tied = "1 other entrant is" if len(close) == 1 else f"{len(close)} other entrants are"
    return (
        f"Undecided: after {steps}, {tied} within {ERRORS:g} standard errors, the nearest {gap}; "
        "a longer race may tell them apart."
    )


def _what_went(decisions: Mapping[str, Decision]) -> str:
    sentences = []
    for name, decision in decisions.items():
        lists, numbers = block_lists(decision.blocks), numbers_of(decision.blocks)
        gone = [
            f"{f'{path} ' if len(lists) > 1 else ''}{spans([numbers[i] for i in members if i in decision.removed])}"
            for path, members in lists.items()
            if not set(members).isdisjoint(decision.removed)
        ]
        count, total = len(decision.removed), len(decision.blocks)
        what = word_for(decision.blocks)
        text = f"{count} of {total} {what}: {'; '.join(gone)}." if count else f"Nothing: all {total} {what} stay."
        sentences.append(f"{name}: {text}" if name else text)
    return " ".join(sentences)


def _gains(measured: Sequence[Measured]) -> str:
    known = {m["name"]: m for m in measured}
    speed = _speed(measured)
    parts = [speed] if speed else []
    for name in ("parameters", "FLOPs"):
        ratio = last_to_first(known[name]) if name in known else None
        if ratio is not None:
            parts.append(f"{ratio:.0%} of the {name}")
    unknown = "" if speed else "Speed was not measured; add Latency to evaluate."
    return " ".join(filter(None, [f"{_listed(parts)}." if parts else "", unknown]))


def _speed(measured: Sequence[Measured]) -> str:
    """The first measurement of speed that has a value, in words."""
    for m in measured:
        ratio = last_to_first(m)
        if not ratio or not (m["unit"] in TIMES or m["unit"].endswith(RATE)):
            continue
        from_to = f"{m['name']} {' → '.join(figure(value, m['unit']) for value in _ends(m))}"
        return f"{1 / ratio if m['unit'] in TIMES else ratio:.2f} times as fast ({from_to})"
    return ""


def _costs(measured: Sequence[Measured]) -> str:
    """What the measurements of quality say, relative to the teacher."""
    parts = [_compared(m) for m in measured if _is_quality(m) and len(m["values"]) > 1]
    lost = "" if any(m["name"] == LOSS for m in measured) else "The held-out loss was not measured."
    told = "; ".join(parts)
    sentences = [f"{told[:1].upper()}{told[1:]}." if parts else "", lost]
    share = _taken_back(measured)
    if share is not None:
        sentences.append(f"Recovery took back {min(share, 1):.0%} of the loss that pruning had cost.")
    return " ".join(filter(None, sentences))


def _is_quality(m: Measured) -> bool:
    """Whether a measurement tells how good a network is; what has a unit tells what it takes."""
    return bool(m["better"]) and not m["unit"] and m["name"] != "parameters"


def _compared(m: Measured) -> str:
    """`held-out loss 0.08 → 0.09, 11% higher`."""
    first, last = _ends(m)
    if first is None and last is not None:  # the teacher has none, as of a rate at which it is beaten
        return f"{m['name']} {figure(last)}"
    if first is None or last is None:
        return f"{m['name']} has no value"
    text = f"{m['name']} {figure(first)} → {figure(last)}"
    if first <= 0 or last <= 0:
        return text
    ratio = last / first
    if abs(ratio - 1) < 0.005:
        return f"{text}, as the teacher's"
    if ratio >= 2:
        return f"{text}, {ratio:.1f} times the teacher's"
    return f"{text}, {abs(ratio - 1):.0%} {'higher' if ratio > 1 else 'lower'}"


def _taken_back(measured: Sequence[Measured]) -> float | None:
    """The share of the loss that pruning cost and the recovery took back; None if not known, or in several rounds."""
    for m in measured:
        values = m["values"]
        if m["name"] == LOSS and list(values)[1:] == ["pruned", "recovered"]:
            teacher, pruned, recovered = values.values()
            if teacher is not None and pruned is not None and recovered is not None and pruned > teacher:
                return (pruned - recovered) / (pruned - teacher)
    return None


def _content(decisions: Mapping[str, Decision], measured: Sequence[Measured]) -> str:
    against = {name: _against_others(decision) for name, decision in decisions.items()}
    if any(against.values()):
        told = [f"{f'{name}: ' if name else ''}{text or ALONE}" for name, text in against.items()]
    else:
        told = [ALONE]
    return " ".join([_good_enough(measured), *told])


def _good_enough(measured: Sequence[Measured]) -> str:
    """Whether recovery has done enough, and what to try if not."""
    judged = [m for m in measured if _is_quality(m) and len(m["values"]) > 1]
    if not judged:
        return "Not known: no quality was measured."
    if list(judged[0]["values"])[-1].endswith("pruned"):
        return "Not yet: nothing was recovered. Add a recover section."
    lost = [m["name"] for m in judged if _ends(m)[1] is None]
    if lost:
        return f"No: the result has no value of {_listed(lost)}."
    return _recovered_enough(judged)


def _recovered_enough(judged: Sequence[Measured]) -> str:
    share = _taken_back(judged)
    if share is not None and share < HALF:
        return "No: recovery did not take back half of the loss. Try more steps, a higher rate, or distillation (kd)."
    far = [m["name"] for m in judged if _is_far(m)]
    if far:
        return f"Not yet: still far from the teacher in {_listed(far)}. Try more steps of recovery first."
    if share is not None and share < MOST:
        return "Nearly: the loss has not come all the way back. More steps of recovery may do."
    return "Yes, by what was measured."


def _is_far(m: Measured) -> bool:
    first, last = _ends(m)
    if not first or not last or first < 0 or last < 0:
        return False
    return (last / first if m["better"] == "lower" else first / last) > FAR


def _ends(m: Measured) -> tuple[float | None, float | None]:
    """The values of the first network and of the last."""
    first, *_, last = m["values"].values()
    return first, last


def _against_others(decision: Decision) -> str:
    """Whom the choice was measured against in the run itself; empty if nobody."""
    rounds = decision.provenance.get("race") or decision.provenance.get("finals") or []
    judged = {tuple(e["kept"]): list(dict.fromkeys(e["of"])) for entrants in rounds for e in entrants}
    mine = [name for name in judged.pop(decision.kept, []) if name != NEIGHBOUR]
    if not judged:
        return ""
    whose = f", which {_listed(mine)} proposed" if mine else ""
    others = "one other was" if len(judged) == 1 else f"{len(judged)} others were"
    of = _proposed_by(list(judged.values()), mine)
    return f"Beside this choice{whose}, {others} recovered briefly{of}; none was surely better."


def _proposed_by(others: Sequence[Sequence[str]], but: Sequence[str]) -> str:
    """Where other entrants come from, in parentheses: who else proposed some, and how many are neighbours."""
    names = [name for name in dict.fromkeys(chain(*others)) if name not in (*but, NEIGHBOUR)]
    near = sum(NEIGHBOUR in of for of in others)
    found = [f"of {_listed(names)}"] if names else []
    found += [f"{near} neighbour{'s' if near > 1 else ''}"] if near else []
    return f" ({', '.join(found)})" if found else ""


def spans(numbers: Sequence[int]) -> str:
    """Format ascending numbers: `0, 2 and 4 to 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [
        text
        for run in runs
        for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run])
    ]
    return _listed(texts)


def _listed(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))
