"""Whole states of networks that may be sharded: what a checkpoint keeps does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from normfree.models import Backbone, create_model


class States(Protocol):
    """How states go out and come in."""

    def network(self, network: Backbone) -> Backbone:
        """A network with all weights, that ``normfree.save`` takes."""
        ...

    def load_network(self, network: Backbone, tensors: Mapping[str, Tensor]) -> None:
        """Give a network the weights it was saved with."""
        ...

    def optimizer(self, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state."""
        ...

    def load_optimizer(self, network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Give an optimizer the state it was saved with."""
        ...

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups whose tensors are of one kind each, as fused updates want them."""
        ...

    def gradient_norm(self, network: nn.Module) -> Tensor:
        """Euclidean norm of the whole gradient, 0-d, once all ranks' gradients are one."""
        ...


class WholeStates:
    """Every rank has everything: one process, or DistributedDataParallel."""

    def network(self, network: Backbone) -> Backbone:
        return network

    def load_network(self, network: Backbone, tensors: Mapping[str, Tensor]) -> None:
        network.load_state_dict(dict(tensors))

    def optimizer(self, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer(self, network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return groups

    def gradient_norm(self, network: nn.Module) -> Tensor:
        return get_total_norm([p.grad for p in network.parameters() if p.grad is not None], foreach=True)


class ShardedStates:
    """Every rank has a shard (FSDP): states are gathered on the CPU of rank 0, and spread again."""

    def network(self, network: Backbone) -> Backbone:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(network, options=options)
        whole = create_model(**network.config)
        if tensors:  # on rank 0
            whole.load_state_dict(tensors)
        return whole

    def load_network(self, network: Backbone, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(network, dict(tensors), options=StateDictOptions(full_state_dict=True))

    def optimizer(self, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Any], get_optimizer_state_dict(network, _inner(optimizer), options=options))

    def load_optimizer(self, network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(network, _inner(optimizer), state, options=options)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        halves = []
        for group in groups:
            whole = [parameter for parameter in group["params"] if parameter.ndim == 0]
            shards = [parameter for parameter in group["params"] if parameter.ndim > 0]
            named = ((shards, group["name"]), (whole, f"{group['name']} scalars"))
            halves += [{**group, "params": params, "name": name} for params, name in named if params]
        return halves

    def gradient_norm(self, network: nn.Module) -> Tensor:
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        scalars = [gradient for gradient in gradients if gradient.ndim == 0]
        norm = get_total_norm([gradient for gradient in gradients if gradient.ndim > 0], foreach=True)
        norm = norm.full_tensor()  # type: ignore[attr-defined]
        if not scalars:
            return norm
        mean = torch.stack(scalars)  # FSDP leaves them to us: one all-reduce for all
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
        for gradient, value in zip(scalars, mean.unbind(), strict=True):
            gradient.copy_(value)
        return torch.hypot(norm, mean.norm())


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state, inside one that clips."""
    return getattr(optimizer, "optimizer", optimizer)
