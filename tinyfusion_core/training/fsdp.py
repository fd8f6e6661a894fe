"""Networks whose weights are spread over the processes, block by block (FSDP2), and made whole again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping  # fully_shard has no public way back
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from ..errors import Diverged, Interrupted
from .objective import Ema, Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

Replaced = dict[int, Any]
"""The sharded parameter in the place of each plain one, by the plain one's `id`."""


class Shards:
    """The networks of one training, sharded while the context is open.

    The student's blocks, gradients and optimizer state are spread, its average and the networks beside it (a teacher)
    likewise: each is as large as the student or larger. The gates stay whole: they are tiny, and every process
    samples with them. Every process must call every method.

    Args:
        accelerator: the processes.
        objective: what is trained.
        ema: its average, if there is one.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, ema: Ema | None) -> None:
        self.accelerator, self.objective, self.ema = accelerator, objective, ema
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.stack = ExitStack()
        self.replaced: Replaced = {}

    def __enter__(self) -> Shards:
        with ExitStack() as stack:
            for network, units in self.objective.beside():
                stack.enter_context(sharded(network, units, self.mesh, trained=False))
            if self.ema is not None:
                average, blocks = self.ema.average.module, set(self.objective.units)
                copies = [average.get_submodule(path) for path, m in self.ema.source.named_modules() if m in blocks]
                if copies:  # else it averages the gates
                    stack.enter_context(sharded(average, copies, self.mesh, trained=False))
            units, gates = self.objective.units, self.objective.gates
            self.replaced = stack.enter_context(sharded(self.objective, units, self.mesh, gates))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def parameters(self, plain: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What stands in the place of some parameters now."""
        return [self.replaced.get(id(p), p) for p in plain]

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Average the gates' gradients, then scale all to a norm of at most `largest`. Returns the norm before.

        Those of the sharded parameters are averaged in the backward pass.
        """
        if gates := [p.grad for p in self.objective.gates if p.grad is not None]:
            mean = self.accelerator.reduce(torch.cat([g.flatten() for g in gates]), reduction="mean")
            for g, part in zip(gates, mean.split([g.numel() for g in gates]), strict=True):
                g.copy_(part.view_as(g))
        shards = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        gates = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        square = self.accelerator.reduce(get_total_norm(shards).square().to(self.accelerator.device))
        norm: Tensor = (square + get_total_norm(gates).to(square).square()).sqrt()
        torch._foreach_mul_([*shards, *gates], (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gathered(self, state: Any) -> Any:
        """A state dict with whole tensors on the CPU in the place of sharded ones, on the main process alone."""

        def whole(t: DTensor) -> Tensor | None:
            full = t.full_tensor()
            return full.cpu() if self.accelerator.is_main_process else None

        return tree_map_only(DTensor, whole, state)

    def spread(self, state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """An optimizer's whole state dict, laid out like the parameters that it is for."""

        def like(p: nn.Parameter, value: Any) -> Any:
            if not isinstance(p, DTensor) or not isinstance(value, Tensor) or value.shape != p.shape:
                return value
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

        moments = {
            index: {name: like(parameters[index], value) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return {**state, "state": moments}


@contextmanager
def sharded(
    root: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    replicated: Sequence[nn.Parameter] = (),
    trained: bool = True,
) -> Iterator[Replaced]:
    """Spread a network's parameters over the processes while the context is open, each block as one unit.

    A unit is a whole block: gating runs the inside of a block once or twice, and collectives in there would not match
    between processes. Weights are gathered in their own precision and cast by autocast as everywhere, gradients
    averaged in float32: so the numbers are those of replicated training.

    Afterwards the modules are plain again and hold the very parameter objects of before, with the new values, where
    they were. After an error that the processes do not share nothing can be gathered any more, and the weights are NaN.

    Args:
        root: the module whose call runs everything; what is in no unit forms one of its own.
        units: its blocks.
        mesh: the processes, and the kind of device that computes.
        replicated: parameters that every process keeps whole; the caller averages their gradients.
        trained: False for a network that is only run.

    Yields:
        The sharded parameters.
    """
    plain = [(m, type(m), set(m.__dict__), _hooks(m), dict(m._parameters)) for m in root.modules()]
    home = next((p.device for p in root.parameters()), torch.device("cpu"))
    kept, policy = set(replicated), MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*units, root):
        # A teacher's head may be called after its forward, so its root stays gathered.
        free = module is not root or trained
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=free, ignored_params=kept)
    before = {m: parameters for m, *_, parameters in plain}
    added = [set(m.__dict__) - names for m, _, names, _, _ in plain]
    replaced: Replaced = {}
    for module, _, _, _, parameters in plain:
        for name, p in parameters.items():
            new = module._parameters[name]
            if p is not None and isinstance(new, DTensor):
                replaced[id(p)] = new
                p.data, p.grad = p.new_empty(0), None
    for p in kept:
        p.data = p.data.to(mesh.device_type)
    together = False
    try:
        yield replaced
        together = True
    except (Interrupted, Diverged) as e:  # a stop that was agreed upon, and this, every process raises at the same step
        together = isinstance(e, Diverged) or e.agreed
        raise
    finally:
        for unit in (*units, root):
            assert isinstance(unit, FSDPModule)
            if together:
                unit.unshard()  # one collective for all of its parameters
            for module in unit.modules():
                for name, new in module._parameters.items():
                    old = before[module].get(name)
                    if old is not None and id(old) in replaced and not isinstance(new, DTensor):
                        assert new is not None
                        old.data = new.detach().to(home, copy=True)
            unit.reshard()
        for old in (p for own in before.values() for p in own.values() if p is not None and id(p) in replaced):
            if not together:
                old.data = torch.full(replaced[id(old)].shape, torch.nan, dtype=old.dtype)
        for buffer in root.buffers():
            buffer.data = buffer.data.to(home)
        for (module, kind, _, hooks, parameters), extra in zip(plain, added, strict=True):
            module.__class__ = kind
            module._parameters.update(parameters)
            _module_state_mapping.pop(module, None)
            for name in extra:
                module.__dict__.pop(name, None)
            for name, known in hooks.items():
                for key in set(module.__dict__[name]) - known:
                    del module.__dict__[name][key]


def _hooks(module: nn.Module) -> dict[str, set[Any]]:
    return {name: set(value) for name, value in module.__dict__.items() if "hooks" in name and hasattr(value, "keys")}
