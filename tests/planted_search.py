"""Searches of a network in which it is known which blocks work."""

from __future__ import annotations

from functools import partial

import tinyfusion_core as tiny
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.subset import ExactK, GumbelTopK, ScoreFunction
from toys import Match, Planted, planted_data

WORKING = [1, 3, 4, 7]


TRAINER = tiny.Trainer(batch_size=16, seed=0, log_every=10)


LISTS = {"blocks": 8}


SAMPLERS = {
    "exact": partial(ExactK, rules=Rules(keep=4)),
    "score": partial(ScoreFunction, rules=Rules(keep=4), masks=2),
    "score, four masks and entropy": partial(ScoreFunction, rules=Rules(keep=4), masks=4, entropy=(0.3, 0.0)),
    "score, control": partial(ScoreFunction, rules=Rules(keep=4), control=True),
    "top-k": partial(GumbelTopK, keep=4),
    "reinmax": partial(GroupedSampler, pattern=(4, 8), scaling=(1.0, 1.0), estimator="reinmax"),
    "straight-through": partial(GroupedSampler, pattern=(4, 8)),
}


def task(scales: tuple[float, ...] = Planted.scales) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=Planted(scales=scales), loss=Match(), train=data, held_out=data)


def search(sampler, **options) -> tiny.Search:
    how = {"steps": 160, "update": tiny.Frozen(), **options}
    return tiny.Search(sampler=sampler, **how)
