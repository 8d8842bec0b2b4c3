"""Adaptive gradient clipping: a unit's gradient may be as long as a fraction of the unit's weight, and no longer.

    if |G_i| > clip_factor * max(|W_i|, eps):   G_i <- G_i * clip_factor * max(|W_i|, eps) / |G_i|

i       a unit: what one output of a layer owns of its weight; a vector or scalar is one unit (``units.py``)
|.|     Frobenius norm of a unit

Source: Brock, De, Smith, Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
ICML 2021 (arXiv 2102.06171), section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from normfree.common.checks import check_number, invalid
from normfree.optim.sharding import Split, local, split_of, sum_over
from normfree.optim.units import Parameters, Units, units_of

Bucket = tuple[torch.device, torch.dtype, Split]


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
    buckets: defaultdict[Bucket, list[Units]] = defaultdict(list)
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
    weights = [one.arranged(local(one.parameter)) for one in bucket]
    gradients = [one.arranged(local(_gradient(one))) for one in bucket]
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
