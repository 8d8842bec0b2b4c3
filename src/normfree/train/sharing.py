"""Whole states of networks that may be sharded: what a checkpoint keeps does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn
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


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state, inside one that clips."""
    return getattr(optimizer, "optimizer", optimizer)
