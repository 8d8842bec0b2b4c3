"""Muon: gradient descent whose steps of matrices are (nearly) orthogonal, and Nesterov SGD for all that is no matrix.

    B <- momentum * B + G
    U <- orthogonal(G + momentum * B)                    with nesterov=False: orthogonal(B)
    W <- (1 - lr * weight_decay) * W - lr * sqrt(max(1, rows / columns)) * U

G             gradient of a weight, seen as matrices [groups, rows, columns]: rows are the outputs of a group, columns
              its inputs times the kernel's positions
orthogonal    Newton–Schulz iteration towards the nearest matrix of singular values 1 (they end between 0.6 and 1.2)

A standardized weight acts through the direction of its filters off their mean alone. There U loses, filter by filter,
its mean and its part along the filter, neither of which changes the function, and the filter keeps the norm it had
before the first step, so that a step turns it by the same angle throughout training. Weight decay has no effect on it.

Sources: K. Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024, whose coefficients these
are; ``torch.optim.Muon``, whose arguments have these names, takes matrices alone. Convolutions (grouped, transposed),
standardized weights, batches of equal shapes and the division of the work among ranks are added here.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from normfree.common.checks import check_choice, check_integer, check_number, check_rate, invalid
from normfree.common.torch_compat import ConvNd, ConvTransposeNd, unwrapped
from normfree.nn.scaled_ws import Standardized
from normfree.optim.clipping import owned_parameters, placements_of
from normfree.optim.groups import final_layers, parameter_groups

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ on the singular values: the steepest at zero that keeps them near one."""

NS_STEPS = 5
EPS = 1e-7
"""Smallest Frobenius norm a matrix is divided by."""

Rule = Literal["muon", "sgd"]
"""By which a group of parameters is stepped."""


def orthogonal(matrices: Tensor, steps: int = NS_STEPS) -> Tensor:
    """Return matrices [..., rows, columns] with singular values moved near 1, singular vectors kept.

    The iteration runs in bfloat16 on an accelerator, in float32 on the CPU and in float64 for float64.
    """
    a, b, c = NS_COEFFICIENTS
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    if matrices.device.type != "cpu":
        x = wide.to(torch.bfloat16)
    else:
        x = wide.to(torch.promote_types(matrices.dtype, torch.float32))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if wide is not matrices else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon for weights that are matrices or stacks of filters, Nesterov SGD for the rest: the equations above.

    Args:
        params: weights, or parameter groups such as :func:`muon_groups` makes of a model. Beside "params" a group may
            have "rule" ("muon" or "sgd"), "transposed" (the weight is [in, out / groups, ...]), "groups" and
            "standardized" (see above), and each of the arguments that follow.
        lr: learning rate: each step changes a weight's largest singular value by about so much.
        momentum: 0 or above, below 1.
        nesterov: look ahead by one step of the momentum.
        weight_decay: decoupled for the rule "muon"; for "sgd" the gradient's, as ``torch.optim.SGD``'s.
        ns_steps: Newton–Schulz steps.
        process_group: ranks that hold the same weights and gradients (DistributedDataParallel, or shards of
            ``fully_shard``): they divide the matrices among them. None: each does all.

    Raises:
        ValueError: a number outside its range, a group of the rule "muon" with a vector or scalar, a sparse or complex
            gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = NS_STEPS,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        __tracebackhide__ = True
        check_number("lr", lr, 0.0)
        check_rate("momentum", momentum)
        check_number("weight_decay", weight_decay, 0.0)
        check_integer("ns_steps", ns_steps, 1)
        layout = {"rule": "muon", "transposed": False, "groups": 1, "standardized": False}
        rates = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        self.process_group = process_group
        super().__init__(params, {**rates, "ns_steps": ns_steps, **layout})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a check of its rule and of its weights' shapes."""
        __tracebackhide__ = True
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_choice("rule", group["rule"], Rule)
            for number, parameter in enumerate(group["params"] if group["rule"] == "muon" else ()):
                if parameter.dim() < 2:
                    name = group.get("param_names", {number: number})[number]
                    rule = f"has the shape {tuple(parameter.shape)}, which is no matrix"
                    raise invalid("params", name, rule, "put it into a group with rule='sgd'; muon_groups(model) does")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if weights and group["rule"] == "muon":
                self._step_matrices(group, weights)
            elif weights:
                self._step_others(group, weights)
        return loss

    def _step_matrices(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        updates = [_whole(update) for update in self._look_ahead(group, weights, _gradients(weights))]
        layout = group["transposed"], group["groups"]
        stacks = self._orthogonalize_across_ranks([_matrices(update, *layout) for update in updates], group["ns_steps"])
        for weight, stack in zip(weights, stacks, strict=True):
            rows, columns = stack.shape[-2:]
            step = stack * (group["lr"] * math.sqrt(max(1.0, rows / columns)))
            before = _matrices(_whole(weight), *layout)
            if group["standardized"]:
                norms = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
                norms = self.state[weight].setdefault("filter_norms", norms)
                after = before - _off_filters(step, before)
                after = after * (norms / torch.linalg.vector_norm(after, dim=-1, keepdim=True).clamp_min(EPS))
            else:
                after = before * (1 - group["lr"] * group["weight_decay"]) - step
            _write(weight, _from_matrices(after, weight.shape, *layout))

    def _step_others(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        gradients = _gradients(weights)
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])  # pyright: ignore
        torch._foreach_add_(weights, self._look_ahead(group, weights, gradients), alpha=-group["lr"])  # pyright: ignore

    def _look_ahead(
        self, group: dict[str, Any], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Update the momentum, and return what is descended along."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])  # pyright: ignore
        torch._foreach_add_(buffers, gradients)  # pyright: ignore
        if not group["nesterov"]:
            return buffers
        return torch._foreach_add(gradients, buffers, alpha=group["momentum"])  # pyright: ignore

    def _orthogonalize_across_ranks(self, stacks: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Orthogonalize stacks [groups, rows, columns], each on one rank of the process group, and collect them."""
        ranks = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        if ranks == 1:
            return _orthogonal_stacks(stacks, steps)
        shares = _shares([stack.shape for stack in stacks], ranks)
        own = shares[dist.get_rank(self.process_group)]
        found = _orthogonal_stacks([stacks[index] for index in own], steps)
        sizes = [sum(stacks[index].numel() for index in share) for share in shares]
        dtype = functools.reduce(torch.promote_types, [stack.dtype for stack in stacks])
        sent = torch.zeros(max(sizes), dtype=dtype, device=stacks[0].device)
        if found:
            sent[: sizes[dist.get_rank(self.process_group)]] = torch.cat([stack.flatten() for stack in found])
        received = sent.new_empty(ranks * len(sent))
        dist.all_gather_into_tensor(received, sent, group=self.process_group)
        collected: dict[int, Tensor] = {}
        for share, part in zip(shares, received.view(ranks, -1), strict=True):
            pieces = part.split(
                [*(stacks[i].numel() for i in share), len(part) - sum(stacks[i].numel() for i in share)]
            )
            collected |= {
                i: piece.view(stacks[i].shape).to(stacks[i].dtype) for i, piece in zip(share, pieces, strict=False)
            }
        return [collected[index] for index in range(len(stacks))]


def _orthogonal_stacks(stacks: Sequence[Tensor], steps: int) -> list[Tensor]:
    """:func:`orthogonal` of each stack [groups, rows, columns], those of one shape of matrices together."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        alike[stack.shape[1:], stack.dtype, stack.device].append(index)
    found: dict[int, Tensor] = {}
    for indices in alike.values():
        together = orthogonal(torch.cat([stacks[index] for index in indices]), steps)
        found |= dict(zip(indices, together.split([len(stacks[index]) for index in indices]), strict=True))
    return [found[index] for index in range(len(stacks))]


def _shares(shapes: Sequence[torch.Size], ranks: int) -> list[list[int]]:
    """Which stacks each rank orthogonalizes: the costliest first, each to the rank with the least to do."""
    costs = [groups * min(rows, columns) ** 2 * max(rows, columns) for groups, rows, columns in shapes]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda each: -costs[each]):
        rank = load.index(min(load))
        shares[rank].append(index)
        load[rank] += costs[index]
    return shares


def _off_filters(step: Tensor, filters: Tensor) -> Tensor:
    """A step [G, O, N] without, row by row, its mean and its part along the centred filter."""
    step = step - step.mean(-1, keepdim=True)
    centred = filters - filters.mean(-1, keepdim=True)
    along = (step * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_min(EPS**2)
    return step - along * centred


def _matrices(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A weight [out, in / groups, ...], or transposed [in, out / groups, ...], as [groups, rows, columns]."""
    weight = weight.unflatten(0, (groups, -1))
    return (weight.transpose(1, 2) if transposed else weight).flatten(2)


def _from_matrices(matrices: Tensor, shape: torch.Size, transposed: bool, groups: int) -> Tensor:
    """The inverse of :func:`_matrices`."""
    if transposed:
        return matrices.unflatten(2, (shape[0] // groups, *shape[2:])).transpose(1, 2).flatten(0, 1)
    return matrices.reshape(shape)


def _gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    gradients = []
    for weight in weights:
        gradient = weight.grad
        assert gradient is not None, "only weights with a gradient are stepped"
        if gradient.layout != torch.strided or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else str(gradient.layout)
            raise invalid("params", tuple(weight.shape), f"its gradient is {kind}", "step it with another optimizer")
        gradients.append(gradient)
    return gradients


def _whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; an ordinary one as it is."""
    return tensor if placements_of(tensor) is None else tensor.full_tensor()  # type: ignore[attr-defined]


def _write(weight: Tensor, value: Tensor) -> None:
    """Give a weight, or this rank's shard of it, a new value."""
    if placements_of(weight) is not None:
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicated.redistribute(placements=placements_of(weight))
    weight.copy_(value)


def muon_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    sgd_lr_scale: float = 1.0,
    sgd_weight_decay: float = 0.0,
    classifier_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Split a model's parameters into matrices, which Muon is for, and the rest, which SGD steps.

    Matrices are the weights of convolutions and linear layers, but for the network's final layers
    (:func:`final_layers`), whose rows are classes and not features. Embeddings, gains, biases, skip gains and
    normalizers' parameters are the rest.

    Args:
        model: the model; frozen parameters are left out, shared ones are named once.
        weight_decay: of the matrices.
        sgd_lr_scale: learning rate of the rest as a multiple of the matrices'.
        sgd_weight_decay: of the final layers' weights and of embeddings.
        classifier_lr_scale: learning rate of the final layers as a share of the rest's.

    Returns:
        Groups for :class:`Muon`, each with a "name" and an "lr_scale", what to multiply the learning rate by; matrices
        of one layout are one group.

    Raises:
        ValueError: as :func:`parameter_groups`, whose rule tells what is decayed.
    """
    check_number("sgd_lr_scale", sgd_lr_scale, 0.0, exclusive=True)
    network = unwrapped(model)
    modules = dict(network.named_modules(remove_duplicate=False))
    heads = {id(p) for name in final_layers(network) for p in modules[name].parameters()}
    layouts = {
        id(parameter): _layout(owner)
        for _, parameter, owner in owned_parameters(network)
        if isinstance(owner, (nn.Linear, ConvNd)) and parameter.dim() >= 2 and id(parameter) not in heads
    }
    matrices: defaultdict[tuple[bool, int, bool], list[Tensor]] = defaultdict(list)
    others = []
    for group in parameter_groups(network, sgd_weight_decay, classifier_lr_scale=classifier_lr_scale):
        rest = [parameter for parameter in group["params"] if id(parameter) not in layouts]
        for parameter in group["params"]:
            if id(parameter) in layouts:
                matrices[layouts[id(parameter)]].append(parameter)
        if rest:
            scale = group["lr_scale"] * sgd_lr_scale
            others.append({**group, "params": rest, "lr_scale": scale, "rule": "sgd"})
    made = [
        {
            "params": parameters,
            "weight_decay": weight_decay,
            "lr_scale": 1.0,
            "name": " ".join(
                ("standardized",) * standardized + ("transposed",) * transposed + (f"matrices / {groups}",)
            ),
            "rule": "muon",
            "transposed": transposed,
            "groups": groups,
            "standardized": standardized,
        }
        for (transposed, groups, standardized), parameters in matrices.items()
    ]
    return [*made, *others]


def _layout(layer: nn.Linear | ConvNd) -> tuple[bool, int, bool]:
    """Whether a layer's weight is transposed, its groups, and whether it is standardized."""
    groups = layer.groups if isinstance(layer, ConvNd) else 1
    return isinstance(layer, ConvTransposeNd), groups, isinstance(layer, Standardized)


def muon_sgd(
    model: nn.Module,
    lr: float = 0.02,
    *,
    sgd_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    sgd_weight_decay: float = 5e-4,
    classifier_lr_scale: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Muon:
    """Return Muon for a model's convolutions and linear layers, with Nesterov SGD for all else.

    Args:
        model: the model.
        lr: learning rate of matrices, above 0.
        sgd_lr: learning rate of gains, biases, embeddings and the final layers.
        momentum: of both, above 0 and below 1.
        weight_decay: of matrices that are not standardized, decoupled.
        sgd_weight_decay: of the final layers' weights.
        classifier_lr_scale: learning rate of the final layers as a share of ``sgd_lr``.
        process_group: as :class:`Muon`'s.

    Raises:
        ValueError: for a number outside its range, and a model without trainable parameters.
    """
    check_number("lr", lr, 0.0, exclusive=True)
    check_number("sgd_lr", sgd_lr, 0.0, exclusive=True)
    if check_rate("momentum", momentum) == 0:
        raise invalid("momentum", momentum, "Nesterov's look-ahead needs one", "pass 0.9")
    groups = muon_groups(
        model,
        weight_decay,
        sgd_lr_scale=sgd_lr / lr,
        sgd_weight_decay=sgd_weight_decay,
        classifier_lr_scale=classifier_lr_scale,
    )
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    return Muon(groups, lr, momentum=momentum, process_group=process_group)
