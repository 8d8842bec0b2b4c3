"""Carrying out a conversion: exchange modules, fold norms into layers, measure on the example what is still open.

Exchanging needs the original and the record alone, no dataflow: so a file can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normfree import nn as ours
from normfree.common.process import seeded
from normfree.common.torch_compat import DispatchMode, copy_model
from normfree.convert.dataflow import (
    KEPT_TWINS,
    SAME_PADDED,
    TWINS,
    After,
    Before,
    Trains,
    activation_in,
    channels_of,
    class_name,
    prepare_run,
)
from normfree.convert.dropout import DropoutActs
from normfree.convert.record import (
    AFFINE,
    BARE,
    COPY,
    KEPT_MEAN,
    OUT_OF_PLACE,
    OUTPUT_COPY,
    RESCALED,
    SCALED,
    UNITS,
    WITH_ACTIVATION,
    Change,
    Conversion,
)
from normfree.nn import ChannelAffine, ChannelUnits, KeptMean, Standardization, WeightLayout, standardization_of
from normfree.nn.scaled_ws import BranchEnd, ScaledLayer, StandardizedFilters
from normfree.nn.standardized_module import WeightScale, raw_name, scale_weight, weight_scale_of
from normfree.trace import operations as op
from normfree.trace.inputs import SPARSE, Batch, call, copy_of, is_without_values, tensors_in
from normfree.trace.preserve import Writes


def rewrite(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Return a copy of the original with every change of a record made, and the record as its ``conversion``.

    Weights that are new are drawn from the record's seed; the caller's random state is left alone.

    Raises:
        ValueError: the record names modules the model does not have, or of another class.
    """
    return exchange_modules(model, conversion)[0]


@torch.inference_mode(False)  # parameters made inside of it would never learn
def exchange_modules(model: nn.Module, conversion: Conversion) -> tuple[nn.Module, set[nn.Module]]:
    """What :func:`rewrite` gives, and the modules of the copy in whose place others stand now."""
    converted = copy_model(model)
    modules = dict(converted.named_modules(remove_duplicate=False))
    found: dict[nn.Module, nn.Module] = {}
    options = _options(model)
    with _seeded(conversion.seed):
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
                if is_rescaled(change):
                    scale_weight(old, change.weight.weight, _input_scale(change))
                else:
                    _standardize_in_place(old, change)
                continue
            if change.within is not None:
                continue
            made = _make(found.get(old, old), change, options).train(old.training)
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
            parent._modules[attribute] = _make(old, change, options).train(old.training)
    _draw_copies_alike(model, converted, conversion.changes)
    keep_frozen(model, converted, conversion.changes)
    _mark_state(model, converted)
    converted.conversion = conversion  # type: ignore[assignment]
    return converted, set(found) - set(converted.modules())


def _make(old: nn.Module, change: Change, options: dict[str, Any]) -> nn.Module:
    """The module a change puts in the place of an old one; ``options`` are the model's device and precision."""
    factors = _factors(change)
    if change.now in LAYERS:
        made = layer_like(old, LAYERS[change.now], input_scale=_input_scale(change), **factors)
        if change.bias is not None:
            nn.init.constant_(made.bias, change.bias)  # type: ignore[arg-type]
        return made
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
    """Whether a change gives a layer an input scale: by another layer in its place, or in place."""
    return change.now in LAYERS or change.weight is not None


def is_rescaled(change: Change) -> bool:
    """Whether a change leaves a layer its weight, and gives it an input scale alone."""
    return change.now.startswith(f"{RESCALED} ")


def _factors(change: Change) -> dict[str, Any]:
    return {} if change.alpha is None else {"alpha": change.alpha, "skip_gain": change.skip_gain}


def _input_scale(change: Change) -> float:
    return 1.0 if change.input_scale is None else change.input_scale


def _activations(norm: nn.Module) -> list[nn.Module]:
    return [part for _, part in activation_in(norm)]


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


def _padding(old: Any) -> Any:
    """Explicit numbers, or "same": torch's own, which asks for a stride of 1, is TensorFlow's there."""
    if class_name(old) in SAME_PADDED or getattr(old, "padding_style", "") == "same":
        return "same"
    if old.padding == "valid":
        return tuple(0 for _ in old.kernel_size)
    return old.padding


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format of a weight; torch.preserve_format where it is the usual one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    special = formats.get(weight.dim())
    is_usual = special is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=special)
    return torch.preserve_format if special is None or is_usual else special


def _options(module: nn.Module) -> dict[str, Any]:
    """The device and precision of a module that has tensors."""
    tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    return {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}


def _standardize_in_place(module: nn.Module, change: Change) -> None:
    """Standardize the weight of a module that stays: drawn anew on the CPU, its bias constant, both of which learn."""
    assert change.weight is not None
    kept_mean = change.now.startswith(f"{KEPT_MEAN} ")
    options = {"input_scale": _input_scale(change), "kept_mean": kept_mean, **_factors(change)}
    ours.standardize_module(module, change.weight, **options)
    weight = module.get_parameter(raw_name(change.weight.weight))
    fan_in = change.weight.filters(weight)[0].numel()
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(std=fan_in**-0.5))
        for name in change.weight.biases:
            start = (change.bias or 0.0) / change.weight.bias_factor
            module.get_parameter(raw_name(name)).fill_(start).requires_grad_()
    weight.requires_grad_()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make modules as if nothing but a seed had been chosen: on the CPU, in float32; the caller's state is kept."""
    with seeded(seed), torch.device("cpu"):
        precision = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(precision)


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


@torch.no_grad()
def fold_affine(old: Any, new: Any, scale: Tensor, shift: Tensor) -> None:
    """Have the layer that keeps means compute ``scale * y + shift``, y being what the old one computes.

    Args:
        old: the layer before the rewriting; the factors of a :class:`normfree.nn.ScaledConv2d` are part of what it
            computes.
        new: the layer in its place, or itself with its weight standardized in place.
        scale: [O], in float64.
        shift: [O], in float64.
    """
    part = ours.standardization_of(new)
    layout = ours.WeightLayout() if part is None else part.layout
    before, device = old._parameters.get(layout.bias), old._parameters[layout.weight].device
    scale, shift = scale.to(device), shift.to(device)
    weight, factor = old.get_parameter(layout.weight), scale
    if isinstance(old, ScaledLayer):
        end = old.branch_scale()
        scale = scale if end is None else scale * torch.as_tensor(end).double()
        factor = scale * old.input_scale
    bias = shift / layout.bias_factor if before is None else shift / layout.bias_factor + scale * before.double()
    if part is not None:
        part.set_effective_weight(new.get_parameter(raw_name(layout.weight)), weight, factor)
        new.get_parameter(raw_name(layout.biases[0])).copy_(bias)
    elif isinstance(new, ours.KeptMean):
        new.set_effective(weight, bias, factor)
    else:
        new.weight.copy_(weight.double() * factor.view(-1, 1, 1, 1))
        new.bias.copy_(bias)


def keep_frozen(original: nn.Module, converted: nn.Module, changes: Iterable[Change]) -> None:
    """Freeze what was made of frozen parameters of the original.

    A weight drawn anew (*fresh*) learns. A layer that a norm was folded into learns where the two did; an affine map in
    the place of a norm, where the norm did.
    """
    for change in changes:
        norm = original.get_submodule(change.name)
        if change.into is not None:
            _freeze_layer(converted.get_submodule(change.into), original.get_submodule(change.into), norm)
        elif change.now in (ChannelAffine.__name__, ChannelUnits.__name__):
            for module in converted.get_submodule(change.name).modules():
                if isinstance(module, ChannelAffine):
                    module.weight.requires_grad_(learns(norm, "weight"))
                    module.bias.requires_grad_(learns(norm, "bias"))


@torch.no_grad()
def _draw_copies_alike(original: nn.Module, converted: nn.Module, changes: Iterable[Change]) -> None:
    """Give layers that were copies of one another, as a teacher's are of its student, one draw.

    A frozen copy of a layer that learns stays frozen: it gets that one's weights, now as before.
    """
    groups: dict[tuple[Any, ...], list[list[Change]]] = {}
    layouts = {change.name: change.weight or WeightLayout() for change in changes}

    def before(change: Change) -> Tensor:
        return original.get_submodule(change.name).get_parameter(layouts[change.name].weight)

    for change in changes:
        if not is_layer_change(change) or is_rescaled(change) or change.within is not None:
            continue
        weight = before(change)
        if weight.numel() > 1 and not bool(
            (weight == weight.flatten()[0]).all()
        ):  # constants (zeros) are equal without being copies
            key = (change.now, weight.shape, weight.dtype, *weight.flatten()[:4].tolist())
            alike = next((group for group in groups.setdefault(key, []) if torch.equal(before(group[0]), weight)), None)
            if alike is None:
                groups[key].append([change])
            else:
                alike.append(change)
    for copies in (group for each in groups.values() for group in each if len(group) > 1):
        modules = [converted.get_submodule(change.name) for change in copies]
        for module in modules[1:]:
            pairs = zip(module.parameters(recurse=False), modules[0].parameters(recurse=False), strict=True)
            for parameter, first in pairs:
                parameter.copy_(first)
        frozen = [module for change, module in zip(copies, modules, strict=True) if not before(change).requires_grad]
        for module in frozen if len(frozen) < len(copies) else ():
            module.requires_grad_(False)


def _freeze_layer(new: nn.Module, old: nn.Module, norm: nn.Module) -> None:
    """Freeze the weight as the old weight, the bias as the biases, and the factors where neither weight learns."""
    part = standardization_of(new)
    layout = WeightLayout() if part is None else part.layout
    weight = learns(old, layout.weight)
    (bias_name,) = layout.biases
    parts = ((old, bias_name), (norm, "bias"))
    biases = [learns(one, name) for one, name in parts if one._parameters.get(name) is not None]
    scaled = weight or learns(norm, "weight")
    names = [layout.weight, bias_name] if part is None else [raw_name(layout.weight), raw_name(bias_name)]
    keeps_raw = part is not None or isinstance(new, KeptMean)
    own = dict(zip(names, (weight if keeps_raw else scaled, any(biases) if biases else weight), strict=True))
    for name, parameter in new.named_parameters(recurse=False):
        if part is None or name in own:
            parameter.requires_grad_(own.get(name, scaled))
    for parameter in () if part is None else part.parameters():
        parameter.requires_grad_(scaled)


def learns(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of a name, and it is not frozen; of a module with other names, any of them."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return any(
            p.requires_grad for n, p in module._parameters.items() if p is not None and n not in ("weight", "bias")
        )
    return parameter.requires_grad


EPS = 1e-5
"""Added to the variance of a channel of the input, as BatchNorm does."""


LEAST_VALUES = 16
"""Values of a channel whose variance says something of the signal (its relative error is sqrt(2 / 16) = 0.35)."""


MOST_OFF = 100.0
"""The variance that a norm gave may be off by so much where standardized layers before it carry it instead."""


LEAST_SEEN = 1e-10
"""Share of its input's mean square that a layer must pass on: filters of mean zero turn an input that does not vary
into rounding, of about 1e-14 in float32."""


DRIFT = 2.0
"""A closed form whose output is off by more is measured, where no norm was: in a row of layers the errors multiply, of
zero padding on small maps and of few channels."""


FEW_VALUES = "Expected more than 1 value per channel"
"""How torch's own message begins where a norm in training mode gets one value of each channel."""


@dataclass(frozen=True)
class Measured:
    """What one pass over the example gave.

    Attributes:
        scales: the input scale of each layer that had none, or one that was off.
        sizes: the mean square of what each layer to be checked gave, its alpha and skip gain apart.
        biases: the bias of each layer that keeps its weight, by which what it gives has mean 0.
        factors: the factor of each norm's place that had none.
        units: the mean and the standard deviation of each channel in the place of each affine map.
        same: which channels are constant throughout the example, in the place of each affine map where some are.
        lost: the mean square at each norm's place where the layers before it do not carry the variance.
        shares: of the variance within channels and that of their means, at each norm's place, the share of the first.
        runs: the mean square at the place of each norm to be watched, each time it is passed.
        constant: the layers whose filters have seen a constant each time so far.
    """

    scales: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    units: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    same: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)


def measure(
    model: nn.Module,
    conversion: Conversion,
    batch: Batch,
    *,
    trains: Trains = None,
    checked: Container[str] = (),
    watched: Container[str] = (),
) -> Measured:
    """Set what a record leaves open on a converted model, and check at each norm's place what carries its variance.

    A layer's input scale is the one under which its output has a mean square of 1, times a correction of its own. The
    filters sum to zero, so the mean square is the variance plus what differing channel means bring; of features pooled
    to one position it is the quantity that does not depend on how alike the examples are. An affine map gives each
    channel mean 0 and variance 1, a factor in a norm's place the whole a variance of 1. They are set one after another
    as the signal reaches them, in the mode in which the network will be trained: norms that stay on the statistics of
    the batch, branches awake (skip gains of one), dropout on. What runs several times is set by its first input, past
    those that are constant, as a first state of zeros is.

    Args:
        model: the converted model; it keeps what is found.
        conversion: its record.
        batch: what to measure with.
        trains: the modules in training mode: auxiliary heads run in training alone.
        checked: the layers whose closed form is replaced where it is off by more than :data:`DRIFT`.
        watched: the removed norms whose places are measured each time.

    Raises:
        ValueError: a layer's filters see a constant, so that no scale gives its output a variance; or a norm that stays
            has one value of each channel.
    """
    modules, found = dict(model.named_modules()), Measured()
    ran, scaled = set[str](), {change.name for change in conversion.changes if change.alpha is not None}
    hooks = [
        (modules[name], hook)
        for change in conversion.changes
        for name, hook in _hooks(change, conversion, scaled, found, ran, checked)
    ]
    hooks += [(modules[c.name], _run_reader(c.name, found)) for c in conversion.changes if c.name in watched]
    apart = torch.no_grad()  # also where the model's own forward asks for gradients
    hooks = [(module, apart(_where_values(hook))) for module, hook in hooks]
    readers = [(modules[c.name], _size_reader(c, found)) for c in conversion.changes if c.name in checked]
    readers = [(module, apart(_where_values(hook))) for module, hook in readers]
    gains = [m.skip_gain for m in model.modules() if isinstance(m, BranchEnd) and m.skip_gain is not None]
    try:
        run = {"mode": "batch-statistics", "trains": trains, "before": hooks, "after": readers}
        with prepare_run(model, batch, **run) as (keeper, given):
            for gain in gains:
                keeper.before_writing(gain)
                gain.fill_(1)
            keeper.seed(conversion.seed)  # of dropout
            with Writes(keeper), DropoutActs():
                call(model, given)
    except ValueError as error:
        if not str(error).startswith(FEW_VALUES):
            raise
        raise ValueError(
            "example_input: a norm that stays takes its statistics over the batch, as it will in training, and has one "
            "value of each channel there; give several examples, two or more of which come to it"
        ) from error
    if found.constant:
        raise ValueError(
            f"example_input: all that a filter of {min(found.constant)} sees at once is the same (a constant, or grey "
            "images seen pixel by pixel), and filters that sum to zero make nothing of it, so its scale cannot be "
            "measured; give a batch of several different examples, in colour"
        )
    for name, scale in found.scales.items():  # the run leaves attributes and buffers as they were
        _rule_of(modules[name]).input_scale = scale
    layouts = {change.name: change.weight for change in conversion.changes if change.name in found.biases}
    for name, bias in found.biases.items():
        with torch.no_grad():
            modules[name].get_parameter(layouts[name].bias).copy_(bias)  # type: ignore[union-attr]
    for name, factor in found.factors.items():
        modules[name][0].correction = factor  # type: ignore[index]
    for name, (mean, deviation) in found.units.items():
        _set_units(modules[name], mean, deviation)
    return found


def _hooks(
    change: Change, conversion: Conversion, scaled: set[str], found: Measured, ran: set[str], checked: Container[str]
) -> Iterator[tuple[str, Before]]:
    """What to do before the first run of an exchanged module, and its name; ``scaled`` are the ends of branches."""
    name = change.name
    if is_layer_change(change):
        yield name, lambda module, inputs, named: ran.add(name)
        if is_rescaled(change):
            yield name, _at_first(_rescaler(change, found))
        elif change.input_scale is None or name in checked:
            yield name, _at_first(_setter(name, change, found))
    elif change.now == UNITS:
        yield name, _at_first(_units_setter(name, found))
    elif change.now == SCALED and change.carried_by and change.alpha is None:
        yield name, _at_first(_factor_setter(name, found.factors))
    elif change.carried_by:
        size = conversion.alpha if not scaled.isdisjoint(change.carried_by) else 1.0
        yield name, _at_first(_checker(change, size, found, ran))


def _where_values(hook: Callable[..., Any]) -> Callable[..., None]:
    """The hook for runs that are given values: one on no rows of the example is as if there were none."""

    def where_values(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *output: Any) -> None:
        if not is_without_values((inputs, named)):
            hook(module, inputs, named, *output)

    return where_values


def _at_first(hook: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool | None]) -> Before:
    """The hook at a module's first run alone; at the next one, too, as long as it answers False."""
    ran: list[nn.Module] = []

    def once(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not ran and hook(module, inputs, named) is not False:
            ran.append(module)

    return once


def _run_reader(name: str, found: Measured) -> Before:
    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.runs.setdefault(name, []).append(float(_tensor_in(inputs, named).double().square().mean()))

    return hook


def _setter(name: str, change: Change, found: Measured) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], bool]:
    """Set a layer's input scale; one that the record has stays where it gives a mean square near 1.

    Filters that sum to zero make nothing of a constant: then the answer is False.
    """
    factor = change.correction or 1.0

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
        given = _tensor_in(inputs, named)
        mean_square = float(_plain_output(module, inputs, named).double().square().mean())
        if not mean_square > LEAST_SEEN * float(given.double().square().mean()):
            found.constant.add(name)
            return False
        found.constant.discard(name)
        planned = None if change.input_scale is None else (change.input_scale / factor) ** 2 * mean_square
        if planned is None or not 1 / DRIFT <= planned <= DRIFT:
            found.scales[name] = _rule_of(module).input_scale = factor * mean_square**-0.5
        return True

    return hook


def _rescaler(change: Change, found: Measured) -> Before:
    """Set the input scale of a layer that keeps its weight: its channels get a mean variance of 1.

    Its filters do not sum to zero, so its mean square would count what all examples have in common. A bias that learns
    takes that out: the mean of each channel becomes 0, as what standardized filters make of an offset.
    """
    layout = change.weight
    assert layout is not None, "scaled in place"

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        part, bias = weight_scale_of(module), module._parameters.get(layout.bias)
        assert part is not None, "a rescaled layer has its factor"
        scaled = isinstance(module, BranchEnd) and module.branch_scale() is not None
        if bias is not None and (scaled or not bias.requires_grad):
            bias = None
        before = None if bias is None else bias.clone()
        part.input_scale = 1.0
        if bias is not None:
            bias.zero_()
        with MapOutput(part) as map_:
            module.forward(*copy_of(inputs), **copy_of(named))
        channels = map_.output.double().movedim(1 if map_.convolves else -1, 0).flatten(1)
        several = channels.shape[1] >= LEAST_VALUES
        variance = float(channels.var(1, correction=0).mean() if several else channels.var(correction=0))
        constant = variance <= LEAST_SEEN * float(channels.square().mean())
        found.scales[change.name] = part.input_scale = 1.0 if constant else variance**-0.5
        if bias is not None and several and not constant:
            found.biases[change.name] = -part.input_scale / layout.bias_factor * channels.mean(1)
            before = found.biases[change.name]
        if bias is not None and before is not None:
            bias.copy_(before)

    return hook


def _size_reader(change: Change, found: Measured) -> After:
    name = change.name

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        rule = _rule_of(module)
        scale = rule.branch_scale()
        if name not in found.sizes and rule is module and scale != 0:  # a forward of its own may do more than the map
            output = output.double() - (change.bias or 0.0)
            found.sizes[name] = float(output.square().mean()) / float(1 if scale is None else scale) ** 2

    return hook


def _plain_output(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What the layer's map makes with an input scale of 1, no bias and no branch factor."""
    rule = _rule_of(module)
    before: Mapping[str, Any] = {"input_scale": rule.input_scale, "alpha": rule.alpha}
    gain, rule._parameters["skip_gain"] = rule._parameters["skip_gain"], None
    rule.input_scale = rule.alpha = 1.0
    try:
        if rule is module:
            bias, module._parameters["bias"] = module._parameters["bias"], None
            try:
                return module.forward(*inputs, **named)
            finally:
                module._parameters["bias"] = bias
        with MapOutput(rule) as found:
            module.forward(*copy_of(inputs), **copy_of(named))
        return found.output
    finally:
        vars(rule).update(before)
        rule._parameters["skip_gain"] = gain


class MapOutput(DispatchMode):
    """Catches what the convolution or matrix product makes that reads a weight standardized or scaled in place.

    Args:
        part: the factors of the module that will run.

    Attributes:
        output: what was made.
        convolves: by a convolution.
    """

    follows_weights = True
    output: Tensor
    convolves: bool

    def __init__(self, part: Standardization | WeightScale) -> None:
        super().__init__()
        self.part = part
        self.made: Any = WeakTensorKeyDictionary()

    def __enter__(self) -> MapOutput:
        def weight(raw: Tensor) -> Tensor:
            made = type(self.part).weight(self.part, raw)  # type: ignore[arg-type]
            self.made[made] = True
            return made

        vars(self.part)["weight"] = weight
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        del vars(self.part)["weight"]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tensor in self.made for tensor in op.tensors_in(args, kwargs or {})):
            if op.name_of(func) in op.CONVOLUTION | op.LINEAR:
                self.output, self.convolves = result, op.name_of(func) in op.CONVOLUTION
            else:
                for leaf in tree_leaves(result):
                    if isinstance(leaf, Tensor):
                        self.made[leaf] = True
        return result


def _rule_of(module: nn.Module) -> Any:
    """What has the factors of a layer: itself, or its child where its weight is standardized or scaled in place."""
    return standardization_of(module) or weight_scale_of(module) or module


def _factor_setter(name: str, found: dict[str, float]) -> Before:
    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        variance = float(_tensor_in(inputs, named).double().var(correction=0))
        module[0].correction = found[name] = (variance + EPS) ** -0.5

    return hook


def _units_setter(name: str, found: Measured) -> Before:
    """Have a :class:`ChannelUnits` give each channel of its input [N, C, …] mean 0 and variance 1.

    A channel that is the same throughout has no deviation: it takes the others' median, so that a value it has later is
    worth what theirs are, and not three hundred times as much.
    """

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _tensor_in(inputs, named)
        channels = given.transpose(0, 1).flatten(1).double()
        if channels.shape[1] < 2:
            raise ValueError(
                f"example_input: one value of each channel at {name} has no variance, which the affine map in the "
                "place of the norm needs; give several examples, two or more of which come to it"
            )
        variance, mean = torch.var_mean(channels, 1, correction=0)
        deviation, same = (variance + EPS).sqrt(), variance <= ROUNDING * mean.square()
        if same.any():
            deviation[same] = 1.0 if same.all() else deviation[~same].median()
            found.same[name] = same
        found.units[name] = mean, deviation
        _set_units(module, *found.units[name])

    return hook


ROUNDING = 1e-12
"""Variance of a constant, in squares of it: what rounding in double precision leaves, with a wide margin."""


def _set_units(place: Any, mean: Tensor, deviation: Tensor) -> None:
    """Enter the constants of a :class:`ChannelUnits`, which an activation may follow in its place."""
    constants: Any = (place if isinstance(place, ChannelUnits) else place[0])[0]
    constants.mean.copy_(mean)
    constants.deviation.copy_(deviation)


def _checker(change: Change, size: float, found: Measured, ran: set[str]) -> Before:
    """Note a mean square at a norm's place that is far from ``size`` squared, and what channels of [N, C, …] share."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _tensor_in(inputs, named).double()
        mean_square = float(given.square().mean())
        if not ran.isdisjoint(change.carried_by) and not size**2 / MOST_OFF <= mean_square <= MOST_OFF:
            found.lost[change.name] = mean_square
        channels = given.transpose(0, 1).flatten(1) if given.dim() > 1 else given[None]
        if channels.shape[1] >= LEAST_VALUES:
            variance, mean = torch.var_mean(channels, 1, correction=0)
            within = float(variance.mean())
            found.shares[change.name] = within / max(within + float(mean.var(correction=0)), torch.finfo().tiny)

    return hook


def _tensor_in(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    first = tensors_in((inputs, named))[0]
    return first.to_dense() if first.layout in SPARSE else first


SMALLEST_FILTER = 0.1
"""Norm of a raw filter, ten times what standardization takes for constant (the root of its floor of 1e-4)."""


@torch.no_grad()
def keep_pace(model: nn.Module, converted: nn.Module, changes: Iterable[Change], normalized: Container[str]) -> None:
    """Scale the raw weights of standardized layers so that they train at the pace of the original's.

    The size of a raw weight W changes no output, but its gradient is inverse to it, and so a step of gradient descent
    moves the effective weight by a share that falls as 1 / |W|². The same holds of the original where a norm follows
    the layer: there the raw weight gets the size of the original's, and a learning rate found for the original fits.
    (PyTorch's default initialization, of variance 1 / (3 N), is a third of the effective size after a ReLU: at that
    size such a layer would turn nine times more slowly.) Elsewhere a step moves the effective weight as far as it
    would move a plain layer's if the raw weight has its size; a layer that shrinks its input (c < 1) keeps its own.

    Args:
        model: the original.
        converted: its conversion, changed.
        changes: of its record.
        normalized: the layers whose output a removed norm took.
    """
    for change in filter(is_layer_change, changes):
        layer = converted.get_submodule(change.name)
        rule = _rule_of(layer)
        if not isinstance(rule, StandardizedFilters):
            continue
        name = rule.layout.weight if isinstance(rule, Standardization) else "weight"
        raw = layer.get_parameter(name if rule is layer else raw_name(name))
        size = float(getattr(model.get_submodule(change.name), name).float().norm() / raw.float().norm())
        if change.name in normalized and size > 0:
            raw.mul_(max(size, SMALLEST_FILTER * len(rule.gain) ** 0.5 / float(raw.float().norm())))
        elif rule.constant > 1:
            raw.mul_(rule.constant)
