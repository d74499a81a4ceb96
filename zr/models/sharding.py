"""Weights that several processes share (FSDP2): each keeps a part, and a module's weights are whole only while it runs.

So whatever reads weights does it in a module's forward pass (:func:`inside`), and all processes make the same passes in the
same order: one that has nothing left to do keeps the others company (:class:`Company`). Without sharding nothing happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "Company",
    "anyone",
    "as_share",
    "gathered",
    "holder",
    "in_order",
    "inside",
    "plain_class",
    "running",
    "shard",
    "sharded",
    "through",
    "whole",
]

T = TypeVar("T")


def shard(model: Any, output: nn.Module, mesh: DeviceMesh) -> None:
    """Deal the weights of a model of transformers to the processes of a mesh.

    Gathered one at a time are the layers and vision blocks, which transformers would not split either; then the output layer,
    unless the embedding has its weights too; and all that is left, as one unit. Parameters have their dtype and
    ``requires_grad`` by now.

    Args:
        model: with adapters, if any.
        output: its output layer.
        mesh: of one dimension.
    """
    units = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if set(model.get_input_embeddings().parameters()).isdisjoint(output.parameters()):
        fully_shard(output, mesh=mesh, reshard_after_forward=True)
    else:
        vars(output)["_held_by"] = model  # and no part of it
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def sharded(module: nn.Module) -> bool:
    """Whether the module's weights are shared by processes; to be asked outside of its passes."""
    return _mesh(module) is not None


def holder(layer: nn.Module) -> nn.Module:
    """The module in whose forward pass a layer's weights are whole: itself, or the model if an embedding shares them."""
    found: nn.Module = vars(layer).get("_held_by", layer)
    return found


def inside(layer: nn.Module, function: Callable[..., T], *inputs: Tensor) -> T:
    """``function(*inputs)``, during which the layer's own weights are whole; gradients pass.

    Args:
        layer: sharded or not.
        function: may read the weights; gives tensors, in lists and tuples if need be, and no views.
        inputs: tensors that may have a gradient.
    """
    module = holder(layer)
    if not isinstance(module, FSDPModule):
        return function(*inputs)
    with running(module, lambda *given: function(*(given or inputs))):
        found: T = module(*inputs) if module is layer else module()
    return found


def through(layer: nn.Module, hidden: Tensor) -> Tensor:
    """``layer(hidden)``, wherever its weights are."""
    found: Tensor = layer(hidden) if holder(layer) is layer else inside(layer, layer, hidden)
    return found


@contextmanager
def running(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a call of the module run ``function`` in place of its forward, inside the module's hooks."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def in_order(hidden: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The states that a pass leaves by the side of its layers, so that a backward pass into them visits the layers in turn.

    A sharded layer gathers its weights when the gradient of its output comes by. States are no output, so their gradients
    could come first, or alone. Here they come only after the gradient of the last hidden states, at least a zero, has started
    on its way through all layers.

    Args:
        hidden: of the last layer.
        states: two tensors per layer.
    """
    flat = [tensor for pair in states for tensor in pair]
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return list(states)
    learning = [i for i, tensor in enumerate(flat) if tensor.requires_grad]
    for i, tensor in zip(learning, _InOrder.apply(hidden, *(flat[i] for i in learning)), strict=True):
        flat[i] = tensor
    return list(zip(flat[::2], flat[1::2], strict=True))


class _InOrder(torch.autograd.Function):
    """See :func:`in_order`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = {"size": hidden.shape, "dtype": hidden.dtype, "device": hidden.device}
        return tuple(state.detach() for state in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return torch.zeros(**ctx.like), *gradients


def anyone(module: nn.Module, here: bool) -> bool:
    """Whether it is so in any process that shares the module's weights; each of them must ask."""
    mesh = _mesh(module)
    if mesh is None:
        return here
    found = torch.tensor(float(here), device=mesh.device_type)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    return bool(found)


class Company:
    """Keeps the passes of several processes in step, each of which has as many of its own as it likes.

    For example::

        company = Company(model, idle)
        for part in parts:
            company.step()
            passes(part)
        company.wait()

    Args:
        module: whose weights they share.
        idle: makes the same passes as ``passes``, with anything.
    """

    def __init__(self, module: nn.Module, idle: Callable[[], object]) -> None:
        self.module = module
        self.idle = idle

    def step(self) -> None:
        """Tell the others that passes follow."""
        anyone(self.module, True)

    def wait(self) -> None:
        """Go along until nobody has any passes left."""
        while anyone(self.module, False):
            self.idle()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_share(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, on the device of a parameter and dealt like it."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


@contextmanager
def gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """For a while, whole weights on the CPU in place of the shares, so that the module can be saved.

    Args:
        module: sharded or not; every process enters.
        keep: False for a process that only gives its shares; for it nothing changes.
    """
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    found: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for _, _, parameter in places:
            if id(parameter) not in found:
                tensor = parameter.full_tensor()
                found[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad) if keep else parameter
    try:
        for owner, name, parameter in places:
            owner._parameters[name] = found[id(parameter)]
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was sharded, which puts one of its own in front."""
    found: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return found  # type: ignore[no-any-return]


def _mesh(module: nn.Module) -> DeviceMesh | None:
    first = next(module.parameters(), None)
    return first.device_mesh if isinstance(first, DTensor) else None
