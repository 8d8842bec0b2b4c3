"""Adaptive gradient clipping: a unit's gradient may be as long as a fraction of the unit's weight, and no longer.

    if |G_i| > clip_factor * max(|W_i|, eps):   G_i <- G_i * clip_factor * max(|W_i|, eps) / |G_i|

i       a unit: what one output of a layer owns of the layer's weight
|.|     Frobenius norm of a unit

Which axis of a parameter its units are on depends on the layer:

    linear, embedding               [out, in]              axis 0
    convolution, grouped too        [out, in/G, ...]       axis 0
    transposed convolution          [in, out, ...]         axis 1
    ... of G groups                 [in, out/G, ...]       seen as [G, in/G, out/G, ...], axes 0 and 2
    standardized in place           any layout             the axes that count its outputs
    vectors, scalars, and all with one axis longer than 1: the whole parameter is one unit

In this order: the clipping itself, as a function and as a wrapper of an optimizer; the units of a network; sharded
parameters.

Source: Brock, De, Smith, Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
ICML 2021 (arXiv 2102.06171), section 4.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from normfree.common.checks import check_number, invalid, suggestion
from normfree.common.torch_compat import ConvTransposeNd, unwrapped
from normfree.nn import standardization_of
from normfree.nn.standardized_module import raw_name
from normfree.optim.groups import final_layers

Parameters = nn.Module | Iterable[tuple[str, Tensor]]


def clip_grad_adaptive_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    *,
    exclude: Iterable[str] | None = None,
) -> Tensor:
    """Clip gradients in place, unit by unit, to a fraction of the norm of the weights: the equation above.

    Call it once per optimizer step: after the last micro-batch of an accumulated gradient, and after
    ``scaler.unscale_(optimizer)``, for a scaled gradient is clipped as if it were that large.

    Norms of half-precision gradients are taken in float32. A gradient that is not finite stays so, for a gradient
    scaler or a training loop to find. A finite one whose norm overflows (1.8e19 in float32) becomes zero.

    Args:
        parameters: the model (compiled, data-parallel or sharded by ``fully_shard`` too); or pairs
            (name, parameter), with the outputs of each on axis 0.
        clip_factor: lambda, the largest norm of a gradient as a fraction of its weight's norm; 0.01 in the paper
            for batches of 4096, more for smaller ones.
        eps: smallest norm a weight counts with, so that weights that start at zero can grow.
        exclude: names of parameters, or of modules for all of theirs, to leave alone. By default the weights of the
            model's :func:`final_layers` (their biases are clipped); ``()`` for none. Required with pairs.

    Returns:
        The fraction of units that were clipped, over all ranks: 0-d, on the device of the gradients, which it does
        not wait for. 0 if there is no gradient.

    Raises:
        ValueError: for a factor or floor that is not above 0, an unknown name in ``exclude``, a sparse gradient, and
            shards that cut through units (FSDP1).

    Source: Brock et al. 2021 (arXiv 2102.06171), equation 3; what is a unit and what is excluded, the official code.
    """
    check_number("clip_factor", clip_factor, 0.0, exclusive=True)
    check_number("eps", eps, 0.0, exclusive=True)
    return clip_units_(units_of(parameters, exclude), clip_factor, eps)


@torch.no_grad()
def clip_units_(units: Sequence[Units], clip_factor: float, eps: float) -> Tensor:
    """Clip the gradients of these parameters in place; what :func:`clip_grad_adaptive_` does after its checks."""
    buckets: defaultdict[tuple[torch.device, torch.dtype, Split], list[Units]] = defaultdict(list)
    for one in units:
        if (gradient := one.parameter.grad) is None or one.parameter.numel() == 0:
            continue
        if gradient.layout != torch.strided:
            rule = f"its gradient is {gradient.layout}, which has no norm for each unit"
            raise invalid("parameters", one.name, rule, "build the layer with sparse=False, or exclude it")
        real = gradient.dtype.to_real()
        dtype = torch.promote_types(real, torch.float32)
        buckets[gradient.device, dtype, split_of(one)].append(one)
    clipped, total = [torch.zeros(())], 0
    for (_, dtype, split), bucket in buckets.items():
        clipped.append(_clip_bucket_(bucket, dtype, split, clip_factor, eps))
        total += sum(one.count for one in bucket)
    device = clipped[-1].device
    return sum((count.to(device) for count in clipped[1:]), torch.zeros((), device=device)) / max(total, 1)


def _clip_bucket_(bucket: Sequence[Units], dtype: torch.dtype, split: Split, clip_factor: float, eps: float) -> Tensor:
    """Clip parameters that share device, precision and sharding; how many units were clipped, over all ranks.

    Only norms and products touch the parameters. All that lies between runs on one vector of all units.
    """
    weights = [one.arrange(local(one.parameter)) for one in bucket]
    gradients = [one.arrange(local(_gradient(one))) for one in bucket]
    shapes, norms = _norms(bucket, weights + gradients, dtype)
    if split.within:
        norms = sum_over(norms.square(), split.mesh, split.within).sqrt()
    weight_norm, gradient_norm = norms
    limit = weight_norm.clamp_min(eps) * clip_factor
    too_long = gradient_norm > limit  # not so if it is not a number
    scale = torch.where(too_long, limit / gradient_norm, 1.0)
    scales = [part.view(shape) for part, shape in zip(scale.split([s.numel() for s in shapes]), shapes, strict=True)]
    torch._foreach_mul_(gradients, scales)  # pyright: ignore[reportPrivateImportUsage]
    return sum_over(too_long.sum(dtype=torch.float32), split.mesh, split.between)


def _norms(bucket: Sequence[Units], tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[torch.Size], Tensor]:
    """Norms of all units as [2, units], of the weights and of the gradients, and each parameter's part of a row.

    What is one unit as a whole, half of all parameters, goes through one fused operation.
    """
    whole = [index for index in range(len(tensors)) if not bucket[index % len(bucket)].kept]
    found: dict[int, Tensor] = {}
    if whole:
        whole_tensors = [tensors[index] for index in whole]
        fused = torch._foreach_norm(whole_tensors, 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
        found = dict(zip(whole, fused, strict=True))
    for index, tensor in enumerate(tensors):
        if index not in found:
            found[index] = bucket[index % len(bucket)].norms(tensor, dtype)
    ordered = [found[index] for index in range(len(tensors))]
    return [norm.shape for norm in ordered[: len(bucket)]], torch.cat([n.flatten() for n in ordered]).view(2, -1)


def _gradient(units: Units) -> Tensor:
    assert units.parameter.grad is not None, "only parameters with a gradient are put into buckets"
    return units.parameter.grad


class AdaptiveGradientClipping(Optimizer):
    """An optimizer that clips each unit's gradient, see ``clip_grad_adaptive_``, and then steps as another does.

    It stands in for the other everywhere: schedulers, closures, gradient scalers (which unscale first, as they
    must) and checkpoints; its state is the other's, so that a run may start or stop clipping when it resumes.

    Args:
        optimizer: the optimizer that steps.
        parameters: the model, or pairs (name, parameter), that the optimizer's parameters belong to.
        clip_factor, eps, exclude: as ``clip_grad_adaptive_``'s.

    Attributes:
        optimizer: the optimizer that steps.
        clip_fraction: fraction of units clipped in the last step, 0-d, on the gradients' device.

    Raises:
        ValueError: as ``clip_grad_adaptive_``, and if the optimizer has a parameter that ``parameters`` lacks.

    Source: Brock et al. 2021 (arXiv 2102.06171), section 4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Parameters,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        exclude: Iterable[str] | None = None,
    ) -> None:
        __tracebackhide__ = True
        if not hasattr(optimizer, "param_groups"):
            swapped = hasattr(parameters, "param_groups")
            remedy = "swap the first two arguments" if swapped else "pass the optimizer first and the model second"
            raise invalid("optimizer", type(optimizer).__name__, "must be an optimizer", remedy)
        self.optimizer = optimizer
        self.clip_factor = check_number("clip_factor", clip_factor, 0.0, exclusive=True)
        self.eps = check_number("eps", eps, 0.0, exclusive=True)
        self.parameters = parameters if isinstance(parameters, torch.nn.Module) else list(check_pairs(parameters))
        self.exclude = exclude if exclude is None or isinstance(exclude, str) else tuple(exclude)
        self.clip_fraction = torch.zeros(())
        # Hooks and profiling as Optimizer's constructor sets them up, but no parameters of its own.
        super().__setstate__({})
        self._find_units()

    def _find_units(self) -> None:
        """Keep the units of what the optimizer steps; others are frozen or another optimizer's."""
        stepped = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        self._stepped = stepped
        known = {id(one.parameter) for one in units_of(self.parameters, ())}
        if unknown := len(stepped - known):
            rule = f"has {unknown} parameters that the model does not have"
            remedy = "pass the model whose parameters it steps (after moving or sharding it)"
            raise invalid("optimizer", type(self.optimizer).__name__, rule, remedy)
        clipped = units_of(self.parameters, self.exclude)
        self._units: list[Units] = [one for one in clipped if id(one.parameter) in stepped]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip and step; a closure is clipped after each time it is called. Returns what the optimizer returns."""
        if self._stepped != {id(parameter) for group in self.param_groups for parameter in group["params"]}:
            self._find_units()  # a parameter was added or replaced since
        if closure is None:
            self._clip()
            return self.optimizer.step()

        def clipping() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clip()
            return loss

        return self.optimizer.step(clipping)

    def _clip(self) -> None:
        self.clip_fraction: Tensor = clip_units_(self._units, self.clip_factor, self.eps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's defaults."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(clip_factor={self.clip_factor}, eps={self.eps}, {self.optimizer!r})"


@dataclass(frozen=True)
class Units:
    """One parameter and how it divides into units.

    Attributes:
        name: of the parameter.
        parameter: the parameter itself.
        groups: of a transposed convolution, whose first axis is to be seen as [groups, in / groups]; otherwise 1.
        kept: axes (after that) whose entries are the units; none if the parameter is one unit.
    """

    name: str
    parameter: Tensor
    groups: int = 1
    kept: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many units there are, over all shards of the parameter."""
        shape = self.parameter.shape
        shape = shape if self.groups == 1 else (self.groups, shape[0] // self.groups, *shape[1:])
        return math.prod(shape[axis] for axis in self.kept)

    def arrange(self, tensor: Tensor) -> Tensor:
        """Return the parameter's values or gradient, or a shard of them, as a view whose axes ``kept`` are units."""
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return tensor if self.groups == 1 else tensor.unflatten(0, (self.groups, -1))

    def norms(self, arranged: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the norm of each unit of an arranged tensor, with the axes that it sums over kept at size 1."""
        summed = [axis for axis in range(arranged.dim()) if axis not in self.kept]
        return torch.linalg.vector_norm(arranged, 2, summed, keepdim=True, dtype=dtype)


def units_of(parameters: Parameters, exclude: Iterable[str] | None = None) -> list[Units]:
    """Return how every parameter divides into units, those excluded left out.

    Args:
        parameters: a module; or pairs (name, parameter), which do not say what layer a parameter belongs to: axis 0
            is then taken to be the output's, and ``exclude`` must be given.
        exclude: names of parameters, or of modules for all of theirs. By default the weights of a module's final
            layers, see :func:`normfree.optim.groups`; ``()`` for none.

    Returns:
        One entry for each parameter, shared ones once.

    Raises:
        ValueError: for a name that no parameter has, pairs without ``exclude``, and parameters that FSDP1 has
            flattened.
    """
    if isinstance(exclude, str):
        raise invalid("exclude", exclude, "must be a collection of names", f"pass exclude=[{exclude!r}]")
    if isinstance(parameters, nn.Module):
        model = unwrapped(parameters)
        owned = list(owned_parameters(model))
        excluded = _final_weights(model) if exclude is None else _matching_names((n for n, *_ in owned), exclude)
    else:
        owned = [(name, parameter, None) for name, parameter in check_pairs(parameters)]
        if exclude is None:
            rule = "bare parameters do not tell which of them are the final layers' weights"
            raise invalid("exclude", None, rule, "pass the model, or name what to leave alone; exclude=() clips all")
        excluded = _matching_names((n for n, *_ in owned), exclude)
    # By identity: a tied weight has two names, and is left alone if either is excluded.
    left_out = {id(parameter) for name, parameter, _ in owned if name in excluded}
    found: dict[int, Units] = {}
    for name, parameter, owner in owned:
        if id(parameter) not in left_out and id(parameter) not in found:
            found[id(parameter)] = _units(name, parameter, owner)
    return list(found.values())


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Every name of every parameter with the layer it belongs to, which for parametrizations is the layer above."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        owner = module
        if isinstance(module, ParametrizationList):
            owner = modules[prefix.rpartition(".parametrizations.")[0]]
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, parameter, owner


def _final_weights(model: nn.Module) -> set[str]:
    """The weights of the final layers, by all the names a parametrization may have split them into."""
    layers = final_layers(model)
    if not layers:
        warnings.warn(
            f"exclude: {type(model).__name__} has no final linear layer or convolution to be left alone, so all "
            "weights are clipped; pass exclude=() if that is meant, or the names of the layers its outputs come from",
            stacklevel=4,
        )
    prefixes = [f"{layer}." if layer else "" for layer in layers]
    starts = tuple(start for each in prefixes for start in (f"{each}weight", f"{each}parametrizations.weight."))
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if starts and name.startswith(starts)}


def _matching_names(names: Iterable[str], exclude: Iterable[str]) -> set[str]:
    known, excluded = list(names), set[str]()
    for wanted in exclude:
        if not isinstance(wanted, str):
            rule, remedy = "is no name", "give names of parameters or modules, as model.named_parameters() has them"
            raise invalid("exclude", type(wanted).__name__, rule, remedy)
        matching = {name for name in known if name == wanted or name.startswith(f"{wanted}.")}
        if not matching:
            raise invalid("exclude", wanted, "no parameter or module has this name", suggestion(wanted, known))
        excluded |= matching
    return excluded


def check_pairs(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give the pairs (name, parameter).

    Raises:
        ValueError: an item that is none.
    """
    __tracebackhide__ = True
    if isinstance(parameters, Optimizer) or not isinstance(parameters, Iterable):
        rule = "must be a module, or give pairs (name, parameter)"
        remedy = "pass the model; AdaptiveGradientClipping takes the optimizer first and the model second"
        raise invalid("parameters", type(parameters).__name__, rule, remedy)
    for item in parameters:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor)):
            rule = "must be a module, or give pairs (name, parameter)"
            raise invalid("parameters", type(item).__name__, rule, "pass the model, or model.named_parameters()")
        yield item


def _units(name: str, parameter: Tensor, owner: nn.Module | None) -> Units:
    if getattr(parameter, "_fsdp_flattened", False):
        rule = "FullyShardedDataParallel flattens parameters, which then have no units"
        raise invalid("parameters", name, rule, "shard with torch.distributed.fsdp.fully_shard")
    if sum(size > 1 for size in parameter.shape) <= 1:
        return Units(name, parameter)
    part = None if owner is None else standardization_of(owner)
    if part is not None and name.endswith(raw_name(part.layout.weight)):
        layout = part.layout
        order = layout.order or range(parameter.dim() + (layout.groups > 1))
        return Units(name, parameter, layout.groups, tuple(sorted(order[: layout.leading])))
    if isinstance(owner, ConvTransposeNd) and parameter.dim() > 2:
        return Units(name, parameter, owner.groups, (1,) if owner.groups == 1 else (0, 2))
    return Units(name, parameter, kept=(0,))


@dataclass(frozen=True)
class Split:
    """How the units of a parameter lie on a device mesh; nothing of it for an ordinary parameter.

    Attributes:
        mesh: the device mesh, or None.
        within: mesh axes over which each unit is split, so that its squared norm is a sum over ranks.
        between: mesh axes over which the units are dealt out, so that each rank sees only some.
    """

    mesh: Any = None
    within: tuple[int, ...] = ()
    between: tuple[int, ...] = ()


def split_of(units: Units) -> Split:
    """Return how a parameter's units are sharded.

    Raises:
        ValueError: for a placement that has no units on any rank.
    """
    placements = placements_of(units.parameter)
    if placements is None:
        return Split()
    gradient = units.parameter.grad
    if gradient is not None and placements_of(gradient) != placements:
        rule = "the gradient is sharded otherwise than its parameter"
        raise invalid("parameters", units.name, rule, "redistribute the gradient to the parameter's placements")
    within, between = [], []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if placement.is_partial() or units.groups > 1:
            rule = "a grouped transposed convolution's shards, and partial sums, cut through its units"
            raise invalid("parameters", units.name, rule, "replicate this parameter, or exclude it")
        (between if placement.dim % units.parameter.dim() in units.kept else within).append(axis)
    return Split(units.parameter.device_mesh, tuple(within), tuple(between))  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, sharing its memory; an ordinary tensor as it is."""
    return tensor if placements_of(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]


def sum_over(tensor: Tensor, mesh: Any, axes: tuple[int, ...]) -> Tensor:
    """Sum a tensor in place over the ranks along some axes of a mesh; collective over these ranks."""
    for axis in axes:
        dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor


def placements_of(tensor: Tensor) -> Any:
    """Return how a sharded tensor lies on its device mesh; None for an ordinary one."""
    # Without a process group there is no sharded tensor, and the import, which takes a second, is saved.
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return tensor.placements if isinstance(tensor, DTensor) else None
