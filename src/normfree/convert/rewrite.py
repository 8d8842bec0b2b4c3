"""Exchange modules of a copy of the original, as a record says: no dataflow is needed, so a file can be rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normfree import nn as ours
from normfree.common.text import first_line
from normfree.convert.frozen import keep_frozen
from normfree.convert.kinds import KEPT_TWINS, SAME_PADDED, TWINS, activation_in, channels_of, class_name
from normfree.convert.maps import KEPT_MEAN
from normfree.convert.record import Change, Conversion
from normfree.nn.standardized_module import raw_name

BARE, WITH_ACTIVATION, COPY, OUTPUT_COPY = "Identity", "Activation", "Copy", "OutputCopy"
OUT_OF_PLACE = "OutOfPlace"
AFFINE, UNITS, SCALED = "ChannelAffine", "ChannelUnits", "BranchScale"


def rewritten(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Return a copy of the original with every change of a record made, and the record as its ``conversion``.

    Weights that are new are drawn from the record's seed; the caller's random state is left alone.

    Raises:
        ValueError: the record names modules the model does not have, or of another class.
    """
    return exchanged(model, conversion)[0]


@torch.inference_mode(False)  # parameters made inside of it would never learn
def exchanged(model: nn.Module, conversion: Conversion) -> tuple[nn.Module, set[nn.Module]]:
    """What :func:`rewritten` gives, and the modules of the copy in whose place others stand now."""
    converted = _copied(model)
    modules = dict(converted.named_modules(remove_duplicate=False))
    found: dict[nn.Module, nn.Module] = {}
    options = _options(model)
    with _drawing(conversion.seed):
        for change in conversion.changes:
            old = modules.get(change.name)
            if old is None or class_name(old) != change.was:
                there = "nothing" if old is None else class_name(old)
                raise ValueError(
                    f"original: {change.name} is {there}, and the record changes a {change.was}; "
                    "give the model that was converted, built with the same arguments"
                )
            if change.now == OUT_OF_PLACE:
                old.inplace = False  # type: ignore[assignment]
                continue
            if change.weight is not None:
                _standardize_in_place(old, change)
                continue
            if change.within is not None:
                continue
            made = _made(found.get(old, old), change, options).train(old.training)
            shared = made in found.values()  # an activation of several norms: each place has a module of its own
            found[old] = nn.Sequential(made).train(old.training) if shared else made
    for module in [*converted.modules(), *found.values()]:  # a norm's activation may have been exchanged, too
        for name, child in module._modules.items():
            while child in found and found[child] is not module:
                child = module._modules[name] = found[child]
    converted = found.get(converted, converted)
    for change in conversion.changes:
        if change.within is not None:  # shared: exchanged in the module that runs it there, and in no other
            parent, attribute = converted.get_submodule(change.within), change.name.rpartition(".")[2]
            old = parent.get_submodule(attribute)
            parent._modules[attribute] = _made(old, change, options).train(old.training)
    keep_frozen(model, converted, conversion.changes)
    _mark_state(model, converted)
    converted.conversion = conversion  # type: ignore[assignment]
    return converted, set(found) - set(converted.modules())


def _mark_state(original: nn.Module, converted: nn.Module) -> None:
    """Have the converted model's state dict fit the original's class no longer, however little a loader checks.

    Loaders that pass over names they lack (``strict=False``, as ``from_pretrained`` of many libraries) would else put
    the converted weights into the original, and make up the norms. All of them compare sizes: the first tensor that the
    original has and the converted model has not is in its place without elements.
    """
    left, modules = converted.state_dict(), dict(converted.named_modules(remove_duplicate=False))
    places = []
    for name, tensor in original.state_dict().items():
        place, _, own = name.rpartition(".")
        if name in left or not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if place in modules and not hasattr(modules[place], own):
            places.append((place, own, tensor))

    def is_within_layer(place: str) -> bool:
        parts = place.split(".")
        outer = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
        return any(modules[name]._parameters for name in outer)

    if places:  # outside of layers that learn, where Opacus takes no buffers, if there is such a place
        place, own, tensor = next((each for each in places if not is_within_layer(each[0])), places[0])
        modules[place].register_buffer(own, tensor.detach().new_empty(0))


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Make modules as if nothing but a seed had been chosen: on the CPU, in float32; the caller's state is kept."""
    precision = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(precision)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # weight_norm's computed weight is no leaf; a lock cannot be copied
        raise ValueError(
            f"model: {class_name(model)} cannot be copied ({first_line(error, 120)}): have "
            "copy.deepcopy make one (if it uses torch.nn.utils.weight_norm or spectral_norm, use those of "
            "torch.nn.utils.parametrizations)"
        ) from error


def _made(old: nn.Module, change: Change, options: dict[str, Any]) -> nn.Module:
    """The module a change puts in the place of an old one; ``options`` are the model's device and precision."""
    factors = _factors(change)
    if change.now in LAYERS:
        return layer_like(old, LAYERS[change.now], input_scale=_input_scale(change), **factors)
    if change.now == SCALED:
        scale = ours.BranchScale(correction=change.correction or 1.0, **factors).to(**options)
        return nn.Sequential(scale, *_activations(old)) if change.carried_by else nn.Sequential(old, scale)
    if change.now in (AFFINE, UNITS):
        kind = ours.ChannelAffine if change.now == AFFINE else ours.ChannelUnits
        affine = kind(channels_of(old)).to(**(_options(old) or options))
        return nn.Sequential(affine, *_activations(old)) if activation_in(old) else affine
    if change.now not in (BARE, WITH_ACTIVATION, COPY, OUTPUT_COPY):
        raise ValueError(f"original: the record puts {change.now!r} at {change.name}, which this version does not make")
    left = _activations(old)
    for activation in left:  # it would write into the output of what comes before
        if getattr(activation, "inplace", False) is True:
            activation.inplace = False  # type: ignore[assignment]
    if change.now in (COPY, OUTPUT_COPY):
        left = [ours.Copy() if change.now == COPY else ours.OutputCopy(), *left]
    return left[0] if len(left) == 1 else nn.Sequential(*left) if left else nn.Identity()


LAYERS: dict[str, Callable[..., nn.Module]] = {
    kind.__name__: kind for kind in (*TWINS.values(), *KEPT_TWINS.values(), ours.ScaledConv2d)
}
"""The layers a change puts in the place of another, by name."""


def is_layer_change(change: Change) -> bool:
    """Whether a change standardizes the weight of a layer, by another layer in its place or in place."""
    return change.now in LAYERS or change.weight is not None


def _factors(change: Change) -> dict[str, Any]:
    return {} if change.alpha is None else {"alpha": change.alpha, "skip_gain": change.skip_gain}


def _input_scale(change: Change) -> float:
    return 1.0 if change.input_scale is None else change.input_scale


def _standardize_in_place(module: nn.Module, change: Change) -> None:
    """Standardize the weight of a module that stays: drawn anew on the CPU, its bias zeros, both of which learn."""
    assert change.weight is not None
    kept_mean = change.now.startswith(f"{KEPT_MEAN} ")
    options = {"input_scale": _input_scale(change), "kept_mean": kept_mean, **_factors(change)}
    ours.standardize_module(module, change.weight, **options)
    weight = module.get_parameter(raw_name(change.weight.weight))
    fan_in = change.weight.filters(weight)[0].numel()
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(std=fan_in**-0.5))
        for name in change.weight.biases:
            module.get_parameter(raw_name(name)).zero_().requires_grad_()
    weight.requires_grad_()


@torch.no_grad()
def fold_affine(old: Any, new: Any, scale: Tensor, shift: Tensor) -> None:
    """Have the layer that keeps means compute ``scale * y + shift``, y being what the old one computes.

    Args:
        old: the layer before the rewriting.
        new: the layer in its place, or itself with its weight standardized in place.
        scale: [O], in float64.
        shift: [O], in float64.
    """
    part = ours.standardization_of(new)
    layout = ours.WeightLayout() if part is None else part.layout
    before, device = old._parameters.get(layout.bias), old._parameters[layout.weight].device
    scale, shift = scale.to(device), shift.to(device)
    bias = shift / layout.bias_factor if before is None else shift / layout.bias_factor + scale * before.double()
    weight = old.get_parameter(layout.weight)
    if part is not None:
        part.set_effective_weight(new.get_parameter(raw_name(layout.weight)), weight, scale)
        new.get_parameter(raw_name(layout.biases[0])).copy_(bias)
    elif isinstance(new, ours.KeptMean):
        new.set_effective(weight, bias, scale)
    else:
        new.weight.copy_(weight.double() * scale.view(-1, 1, 1, 1))
        new.bias.copy_(bias)


def _activations(norm: nn.Module) -> list[nn.Module]:
    return [part for _, part in activation_in(norm)]


def _options(module: nn.Module) -> dict[str, Any]:
    """The device and precision of a module that has tensors."""
    tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    return {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}


def layer_like(old: Any, kind: Callable[..., nn.Module], **factors: Any) -> nn.Module:
    """A layer of a kind in the geometry of an old one, with a bias, its weight drawn on the CPU."""
    if isinstance(old, nn.Linear):
        new: Any = kind(old.in_features, old.out_features, **factors)
    else:
        options: dict[str, Any] = {"dilation": old.dilation, "groups": old.groups}
        if isinstance(old, nn.modules.conv._ConvTransposeNd):
            options["output_padding"] = old.output_padding
        options |= {"padding": _padding(old), "padding_mode": old.padding_mode}
        new = kind(old.in_channels, old.out_channels, old.kernel_size, old.stride, **options, **factors)
    return new.to(device=old.weight.device, dtype=old.weight.dtype, memory_format=_memory_format(old.weight))


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format of a weight; torch.preserve_format where it is the usual one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    special = formats.get(weight.dim())
    is_usual = special is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=special)
    return torch.preserve_format if special is None or is_usual else special


def _padding(old: Any) -> Any:
    """Explicit numbers, or "same": torch's own, which asks for a stride of 1, is TensorFlow's there."""
    if class_name(old) in SAME_PADDED or getattr(old, "padding_style", "") == "same":
        return "same"
    if old.padding == "valid":
        return tuple(0 for _ in old.kernel_size)
    return old.padding
