"""Without gradients a block that nobody keeps need not run: the form of its output is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefix_nets import ROWS, TOKENS, WIDTH, Bend, Make, gates_of, runs


class Forms(nn.Module):
    """A block after what may change the type and the shape of the stream."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Bend(make)])

    def forward(self, x: Tensor, take: Callable[[Any], Tensor]) -> Tensor:
        return take(self.blocks[0](x))


def test_without_gradients_a_dropped_block_runs_only_until_its_form_is_known() -> None:
    x, first, pair = torch.randn(ROWS, TOKENS, WIDTH), lambda out: out[0], lambda y: (y.bfloat16(), 7, None)
    net = Forms(pair)
    dropped, kept = torch.zeros(ROWS, 1), torch.ones(ROWS, 1)

    def run(mask: Tensor, x: Tensor) -> Any:
        gates.mask = mask
        return net(x, lambda out: out)

    with torch.no_grad(), gates_of(net) as gates:
        assert runs(lambda: run(dropped, x)) == 1
        once = run(dropped, x)
        assert runs(lambda: run(dropped, x)) == 0
        assert torch.equal(first(once), x.bfloat16()) and once[1:] == (7, None)
        assert first(once).data_ptr() != first(run(dropped, x)).data_ptr()
        assert runs(lambda: run(dropped[:2], x[:2])) == 0
        assert runs(lambda: run(dropped, x[:, :2])) == 1  # another length may have another form
        assert runs(lambda: run(kept, x[:, :1])) == 1
        assert runs(lambda: run(dropped, x[:, :1])) == 0
        with torch.enable_grad():
            assert runs(lambda: run(dropped, x)) == 1


@pytest.mark.parametrize("make", [lambda y: (y, y + 1), lambda y: (y, [None])])
def test_more_than_streams_and_plain_values_is_no_known_form(make: Make) -> None:
    net, x = Forms(make), torch.randn(1, TOKENS, WIDTH)
    with torch.no_grad(), gates_of(net) as gates:
        gates.mask = torch.zeros(1, 1)
        assert [runs(lambda: net(x, lambda out: out[0])) for _ in range(2)] == [1, 1]
