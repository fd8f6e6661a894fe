"""Shard the weights of networks over processes, block by block (FSDP2), and restore them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping  # see `_PlainModule`
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..errors import Diverged, Interrupted
from .objective import Ema, Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

ShardedParameters = dict[int, nn.Parameter]
"""The sharded parameter that replaces each plain one, by the plain one's `id`."""


class ShardedNetworks:
    """The networks of one training, sharded while the context is open.

    The student's blocks, gradients and optimizer state are sharded, and so are its average and the frozen networks (a
    teacher): each is at least as large as the student. The gates are replicated: they are tiny, and every process
    samples with them. Every process must call every method.

    Args:
        accelerator: the processes.
        objective: what is trained.
        ema: its average, if there is one.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, ema: Ema | None) -> None:
        self.accelerator, self.objective, self.ema = accelerator, objective, ema
        self._sharded: ShardedParameters = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShardedNetworks:
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        with ExitStack() as stack:
            for network, blocks in self.objective.frozen_modules():
                stack.enter_context(sharded(network, blocks, mesh, trained=False))
            if self.ema is not None:
                average, originals = self.ema.average.module, set(self.objective.blocks)
                copies = [average.get_submodule(path) for path, m in self.ema.source.named_modules() if m in originals]
                if copies:  # else it averages the gates
                    stack.enter_context(sharded(average, copies, mesh, trained=False))
            blocks, gates = self.objective.blocks, self.objective.gates
            self._sharded = stack.enter_context(sharded(self.objective, blocks, mesh, gates))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def parameters(self, plain: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that now replace the given plain ones."""
        return [self._sharded.get(id(p), p) for p in plain]

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Average the gates' gradients, then clip all gradients.

        The gradients of the sharded parameters are averaged in the backward pass.

        Args:
            parameters: all trained parameters, of any shape.
            largest: largest norm of the gradient.

        Returns:
            The norm before clipping, a scalar.
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

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather weights, optimizer state and average on the CPU of the main process; other processes get None.

        torch has functions for the optimizer's state too. They take a step with zero gradients where a parameter has no
        state yet, which would use up the bias correction of gates that wait for the end of the warm-up.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        trained = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return {
            "weights": get_model_state_dict(self.objective, options=trained),
            "optimizer": tree_map_only(DTensor, self._whole, optimizer.state_dict()),
            "ema": get_model_state_dict(self.ema.average, options=whole) if self.ema else None,
        }

    def shard_moments(self, state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """Shard an optimizer's full state dict like the parameters it belongs to."""

        def like(p: nn.Parameter, value: Any) -> Any:
            if not isinstance(p, DTensor) or not isinstance(value, Tensor) or value.shape != p.shape:
                return value
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

        moments = {
            index: {name: like(parameters[index], value) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return {**state, "state": moments}

    def _whole(self, t: DTensor) -> Tensor | None:
        full = t.full_tensor()
        return full.cpu() if self.accelerator.is_main_process else None


@contextmanager
def sharded(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    replicated: Sequence[nn.Parameter] = (),
    trained: bool = True,
) -> Iterator[ShardedParameters]:
    """Shard a network's parameters over the processes while the context is open, each block as one unit.

    A unit is a whole block: gating runs the inside of a block once or twice, and collectives in there would not match
    between processes. Weights are gathered in their own precision and cast by autocast as usual, gradients are averaged
    in float32: so the numbers are those of replicated training.

    On exit the modules are plain again and hold the original parameter objects, with the new values, on their original
    device. After an error that only some processes have, nothing can be gathered, and the weights are NaN.

    Args:
        root: the module whose call runs everything; what is in no block forms a unit of its own.
        blocks: its blocks.
        mesh: the processes, and the type of device that computes.
        replicated: parameters that every process keeps in full; the caller averages their gradients.
        trained: False for a network that is only run.

    Yields:
        The sharded parameters.
    """
    network = _Network(root, blocks)
    network.shard(mesh, set(replicated), trained)
    shared = False
    try:
        yield network.sharded
        shared = True
    except (Interrupted, Diverged) as e:  # a stop that was agreed upon, and this, every process raises at the same step
        shared = isinstance(e, Diverged) or e.agreed
        raise
    finally:
        if shared:
            network.gather()
        else:
            network.invalidate()
        network.restore()


class _Network:
    """One network, sharded in place: gating has replaced the forward of these very modules, so a copy would not do."""

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.root, self.units = root, (*blocks, root)
        self.home = next((p.device for p in root.parameters()), torch.device("cpu"))
        self.plain = {m: _PlainModule(m) for m in root.modules()}
        self.sharded: ShardedParameters = {}

    def shard(self, mesh: DeviceMesh, replicated: set[nn.Parameter], trained: bool) -> None:
        """Shard every unit, and free the memory of the plain parameters."""
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in self.units:
            # A teacher's head may be called after its forward, so its root stays gathered.
            free = unit is not self.root or trained
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=free, ignored_params=replicated)
        for module, plain in self.plain.items():
            plain.note_additions()
            now = _own_parameters(module)
            for name, p in plain.parameters.items():
                if isinstance(now[name], DTensor):
                    self.sharded[id(p)] = now[name]
                    p.data, p.grad = p.new_empty(0), None
        for p in replicated:
            p.data = p.data.to(mesh.device_type)

    def gather(self) -> None:
        """Copy the values of the sharded parameters to the plain ones, one collective per unit."""
        for unit in self.units:
            assert isinstance(unit, FSDPModule)
            unit.unshard()
            for module in unit.modules():
                for name, new in _own_parameters(module).items():
                    old = self.plain[module].parameters.get(name)
                    if id(old) in self.sharded and not isinstance(new, DTensor):  # else another unit's
                        assert old is not None
                        old.data = new.detach().to(self.home, copy=True)
            unit.reshard()

    def invalidate(self) -> None:
        """Fill the plain parameters with NaN: their values are lost."""
        for p in (p for plain in self.plain.values() for p in plain.parameters.values() if id(p) in self.sharded):
            p.data = torch.full(self.sharded[id(p)].shape, torch.nan, dtype=p.dtype)

    def restore(self) -> None:
        """Make all modules plain again."""
        for plain in self.plain.values():
            plain.restore()
        for buffer in self.root.buffers():
            buffer.data = buffer.data.to(self.home)


class _PlainModule:
    """A module as it was before `fully_shard`, which has no public inverse.

    `fully_shard` changes a module's class, adds attributes and hooks, replaces parameters and keeps a table of the
    modules' states, in which a module that is sharded a second time must not be found. All code that depends on this is
    here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.parameters = module, type(module), _own_parameters(module)
        self._added, self._attributes = set[str](), set(vars(module))
        self._hooks = {
            name: set(value) for name, value in vars(module).items() if "hooks" in name and hasattr(value, "keys")
        }

    def note_additions(self) -> None:
        """Remember what `fully_shard` has just added; what training adds later stays."""
        self._added = set(vars(self.module)) - self._attributes

    def restore(self) -> None:
        self.module.__class__ = self.kind
        for name, p in self.parameters.items():
            self.module.register_parameter(name, p)
        for name in self._added:
            vars(self.module).pop(name, None)
        for name, known in self._hooks.items():
            hooks = vars(self.module)[name]
            for key in set(hooks) - known:
                del hooks[key]
        _module_state_mapping.pop(self.module, None)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
