"""What is decayed and what is not, which layers are a network's last, and the paper's optimizer and schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normfree.common.checks import check_integer, check_number, check_rate, invalid
from normfree.common.torch_compat import ConvNd, NormBase, unwrapped

# Layers whose weight is a matrix or a stack of filters, also where it has a single row or column.
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, ConvNd)
_NORMALIZERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, NormBase)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, classifier_lr_scale: float = 1.0, gain_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Split a model's parameters into those that weight decay is for, and the rest; and those of the classifier.

    Decayed are the weights of linear layers, embeddings and convolutions, and whatever else has two axes longer
    than one. Not decayed are biases, gains, skip gains, a normalizer's affine parameters, layer scales, and all
    scalars and vectors: decay pulls them to zero without making the function any simpler.

    Without a normalizer nothing holds the scale of what the classifier sees, and its weight, unlike the standardized
    ones, is not free of scale either: of all layers it is the one that a large learning rate breaks first. A smaller
    one there lets the others have a larger one (docs/training.md). So do slower gains and biases: their steps move
    whole channels, and nothing behind them takes the shift back.

    Args:
        model: the model; frozen parameters are left out, shared ones are named once.
        weight_decay: of the decayed group; 5e-5 for the paper's NF-ResNets, 2e-5 for NFNets.
        classifier_lr_scale: learning rate of the final layers as a share of the others', above 0; 1 is the papers'.
        gain_lr_scale: learning rate of what is not decayed, but for the final layers, as a share of the weights', above
            0; 1 is the papers'.

    Returns:
        Groups for any ``torch.optim`` optimizer, each with a "name" and an "lr_scale", what to multiply its learning
        rate by: "decayed" and "undecayed", and with another scale for the classifier "classifier decayed" and
        "classifier undecayed". One that is empty is absent.

    Raises:
        ValueError: for a negative decay, a model without trainable parameters, and a scale for the classifier of a
            model that ends in no linear layer or convolution.

    Source: Brock et al. 2021, appendix on training ("we do not apply weight decay to the affine parameters").
    """
    __tracebackhide__ = True
    check_module(model)
    check_number("weight_decay", weight_decay, 0.0)
    check_number("classifier_lr_scale", classifier_lr_scale, 0.0, exclusive=True)
    check_number("gain_lr_scale", gain_lr_scale, 0.0, exclusive=True)
    classifier = _classifier(model) if classifier_lr_scale != 1 or gain_lr_scale != 1 else set()
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("decayed", "undecayed", "classifier decayed", "classifier undecayed")
    }
    known = set[int]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                part = "classifier " if id(parameter) in classifier else ""
                groups[part + ("decayed" if _decays(module, name, parameter) else "undecayed")].append(parameter)
    if not known:
        rule = "it has no parameter that requires a gradient"
        raise invalid("model", type(model).__name__, rule, "unfreeze what is to be trained")
    scales = {"undecayed": gain_lr_scale}
    scales |= dict.fromkeys(("classifier decayed", "classifier undecayed"), classifier_lr_scale)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if name.endswith("undecayed") else weight_decay,
            "lr_scale": scales.get(name, 1.0),
            "name": name,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def _classifier(model: nn.Module) -> set[int]:
    """Identities of the final layers' parameters."""
    network = unwrapped(model)
    layers = final_layers(network)
    if not layers:
        rule = "it does not end in a linear layer or convolution, whose learning rate could be scaled"
        raise invalid("model", type(network).__name__, rule, "pass classifier_lr_scale=1")
    modules = dict(network.named_modules(remove_duplicate=False))
    return {id(parameter) for name in layers for parameter in modules[name].parameters()}


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _NORMALIZERS) or "bias" in name:
        return False
    if isinstance(module, _WEIGHTED) and name == "weight":
        return True
    return sum(size > 1 for size in parameter.shape) > 1


def nesterov_sgd(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 5e-5,
    momentum: float = 0.9,
    classifier_lr_scale: float = 1.0,
    gain_lr_scale: float = 1.0,
    **options: Any,
) -> torch.optim.SGD:
    """Return the paper's optimizer: SGD with Nesterov momentum, decay on weights alone.

    Args:
        model: the model.
        lr: learning rate; the paper's ResNets take 0.1 * batch size / 256.
        weight_decay: of weights, see :func:`parameter_groups`.
        momentum: above 0 and below 1.
        classifier_lr_scale: learning rate of the final layers as a share of ``lr``, see :func:`parameter_groups`.
        gain_lr_scale: learning rate of gains and biases as a share of ``lr``, see there.
        options: more of ``torch.optim.SGD``'s, such as ``fused=True``.

    Raises:
        ValueError: for a number outside its range, and a model without trainable parameters.

    Source: Brock, De, Smith, ICLR 2021, section 5.
    """
    __tracebackhide__ = True
    check_number("lr", lr, 0.0)
    if check_rate("momentum", momentum) == 0:
        raise invalid("momentum", momentum, "Nesterov's look-ahead needs one", "pass 0.9, or use torch.optim.SGD")
    scales = {"classifier_lr_scale": classifier_lr_scale, "gain_lr_scale": gain_lr_scale}
    groups = parameter_groups(model, weight_decay, **scales)
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, **options)


def warmup_cosine_factor(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Return the learning rate at a step as a fraction of the peak: the equation of :func:`warmup_cosine`, peak 1."""
    if step < warmup_steps:
        return step / warmup_steps
    if step >= steps:
        return final_fraction
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(optimizer: Optimizer, *, steps: int, warmup_steps: int = 0, final_lr: float = 0.0) -> LambdaLR:
    """Return the paper's schedule, a linear warm-up from zero, then half a cosine; ``step()`` it after the optimizer.

    ``lr(t) = peak * t / warmup`` for t < warmup, and then ``final + (peak - final) * (1 + cos(pi * p)) / 2``, where
    ``p = (t - warmup) / (steps - warmup)``: t optimizer steps taken so far, from 0; from t = steps on the rate stays at
    final; the peak is the optimizer's own learning rate, of each parameter group.

    The rate depends on the number of steps alone, and that is all its ``state_dict()`` needs to resume exactly;
    ``steps`` and the rest come from the call, so that a run can be lengthened.

    Args:
        optimizer: whose learning rates are the peaks.
        steps: optimizer steps of the whole run, at least 1.
        warmup_steps: of them, those of the warm-up; 5 epochs for the paper's ResNets. The first is taken at rate 0.
        final_lr: learning rate at the end; 0 for the paper's ResNets, 0.001 for NF-RegNets.

    Raises:
        ValueError: for a warm-up longer than the run, and a final rate above a group's own.

    Source: Brock, De, Smith, ICLR 2021, section 5 and appendix.
    """
    check_integer("steps", steps, 1)
    if check_integer("warmup_steps", warmup_steps, 0) > steps:
        raise invalid("warmup_steps", warmup_steps, f"must be at most steps={steps}", "warm up for fewer")
    check_number("final_lr", final_lr, 0.0)
    factors = []
    for group in optimizer.param_groups:
        peak = float(group.get("initial_lr", group["lr"]))
        if final_lr > peak:
            rule = f"must be at most the optimizer's learning rate, {peak:g}"
            raise invalid("final_lr", final_lr, rule, "pass a smaller one")
        fraction = final_lr / peak if peak else 0.0
        factor = partial(warmup_cosine_factor, steps=steps, warmup_steps=warmup_steps, final_fraction=fraction)
        factors.append(factor)
    return LambdaLR(optimizer, factors)


HEAD = re.compile(r"(.*_)?(classifier|fc|logits|heads?\d*|predictor)(_.*)?", re.IGNORECASE)
"""What networks call the part, or each of the parts, that ends in a final layer."""

_PLAIN = (nn.Linear, ConvNd)
_SEVERAL = (nn.ModuleList, nn.ModuleDict)


def check_module(model: nn.Module) -> None:
    """Refuse what is no module, such as ``model.parameters()``."""
    __tracebackhide__ = True
    if not isinstance(model, nn.Module):
        raise invalid(
            "model", type(model).__name__, "is no torch.nn.Module", "pass the model itself, not its parameters"
        )


def final_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's final linear layers and convolutions, one for each head.

    The structure is looked at, not the dataflow. A head is a child with a name such as "classifier", "fc", "head" or
    "value_head", and each member of a list or dict of heads, unless a later head takes as many features as it gives;
    where there is none, the one child that has parameters is looked into (a training wrapper around a network), and
    failing that the network as a whole is the head. A head ends in its last layer with a weight, and in the layers
    beside it that take the same input (class scores and boxes).

    Args:
        model: the network.

    Returns:
        The names; "" is the model itself. Empty if a head ends in anything but a plain linear layer or convolution:
        the network is a backbone, whose last layer is not a classifier.
    """
    check_module(model)
    return tuple(sorted(set(_ends(model, "")), key=[name for name, _ in model.named_modules()].index))


def _ends(module: nn.Module, name: str) -> Iterator[str]:
    children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
    heads = {key: child for key, child in children.items() if _is_head(key)}
    if isinstance(module, _SEVERAL) and _is_head(name):
        heads = children
    inner = {key: child for key, child in children.items() if any(True for _ in child.parameters())}
    own = any(True for _ in module.parameters(recurse=False))
    if not heads and len(inner) == 1 and not own and not isinstance(module, nn.Sequential | nn.Linear):
        heads = inner
    if not heads:
        yield from _last_layers(module, name)
    modules = dict(module.named_modules(prefix=name, remove_duplicate=False))
    taken = set[int]()  # by the heads behind
    for key, head in reversed(heads.items()):
        for end in _ends(head, key):
            if _sizes(modules[end])[1] not in taken:
                yield end
        first = next((layer for _, layer in _weighted(head, key)), None)
        if isinstance(first, _PLAIN):
            taken.add(_sizes(first)[0])


def _is_head(name: str) -> bool:
    return HEAD.fullmatch(name.rpartition(".")[2]) is not None


def _last_layers(head: nn.Module, name: str) -> Iterator[str]:
    """The last layer with a weight, and the layers just before it that take the same input and do not feed it."""
    feeds = None
    for key, layer in reversed(list(_weighted(head, name))):
        if not isinstance(layer, _PLAIN) or _is_standardized(layer):
            return
        takes, gives = _sizes(layer)
        if feeds is not None and (takes != feeds or gives == feeds):
            return
        feeds = takes
        yield key


def _weighted(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a module that have a weight of more than one axis, as they were registered."""
    for key, layer in module.named_modules(prefix=name):
        if "parametrizations" not in key and any(parameter.dim() > 1 for parameter in _own_parameters(layer)):
            yield key, layer


def _own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer, those behind a parametrization too, and not those of its children."""
    yield from layer.parameters(recurse=False)
    parametrizations = layer._modules.get("parametrizations")
    if parametrizations is not None:
        yield from parametrizations.parameters()


def _is_standardized(layer: nn.Module) -> bool:
    return type_before_parametrizations(layer).__module__.startswith("normfree.")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels or features of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, ConvNd)
    return layer.in_channels, layer.out_channels
