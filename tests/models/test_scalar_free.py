"""One training step of every normalizer-free family: what multiplies a map, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
from saved import saved_tensors
from torch import nn
from watch import MapMultiplications

from normfree.models import create_model
from normfree.models.resnets import ScalarBias
from normfree.nn import MaxPool2d, SqueezeExcite

BATCH = 5  # as many filters has no convolution below
SHAPES = {
    "nf_resnet50": {"width": 0.5},
    "skipinit_resnet50": {"width": 0.5},
    "fixup_resnet50": {"width": 0.5},
    "nf_regnet_b0": {"widths": (16, 24, 32, 40), "group_size": 4},
    "nfnet_f0": {"widths": (16, 24, 32, 40), "group_size": 4},
}
FAMILIES = [
    ("nf_resnet50", {}),
    ("nf_resnet50", {"use_se": True}),
    ("nf_resnet50", {"activation": "silu"}),
    ("skipinit_resnet50", {}),
    ("fixup_resnet50", {}),
    ("nf_regnet_b0", {}),
    ("nf_regnet_b0", {"use_se": False, "padding": "same"}),
    ("nfnet_f0", {}),
    ("nfnet_f0", {"use_se": False, "activation": "elu"}),
]
TWINS = {"nf_resnet50": "resnetv2_50", "nf_regnet_b0": "bn_regnet_b0"}
SHAPES |= {twin: SHAPES[name] for name, twin in TWINS.items()}


def small(name, **overrides):
    torch.manual_seed(0)
    shape = {"depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0, **SHAPES[name]}
    return create_model(name, num_classes=3, **{**shape, **overrides}).train()


def gates(model):
    return [m.linear1.out_features for m in model.modules() if isinstance(m, SqueezeExcite)]


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_forward_multiplies_no_map_but_by_a_gate(name, overrides):
    model = small(name, **overrides)
    with MapMultiplications(BATCH) as watch:
        loss = model(torch.randn(BATCH, 3, 64, 64)).square().sum()
        forward = list(watch.found)
        loss.backward()
    assert forward == [((BATCH, channels, 1, 1),) for channels in gates(model)]
    # The watch saw the backward pass, too: there a gate's gradient is two products.
    assert len(watch.found) >= 3 * len(forward)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [*{name: 0 for name, _ in FAMILIES}])
def test_stochastic_depth_multiplies_by_one_number_an_example(name):
    model = small(name, stochdepth_rate=0.5)
    with MapMultiplications(BATCH) as watch:
        model(torch.randn(BATCH, 3, 64, 64))
    masks = [shapes for shapes in watch.found if shapes == ((BATCH, 1, 1, 1),)]
    assert len(masks) == 4  # of five blocks the first is never skipped
    assert len(watch.found) == len(masks) + len(gates(model))


def needed(model, x):
    """The shapes of the maps a backward pass cannot do without, one per storage.

    Of ReLU its output, of a smooth activation its input; what a gate gates; what a max-pool chooses from; of a
    convolution its input, or what that is made from by an activation, or by adding a number.
    """
    found, made_from, alive = {}, {}, []

    def hook(module, inputs, output):
        (x,) = inputs
        alive.append((x, output))  # so that no address is used twice
        kept = x
        if isinstance(module, (nn.ReLU, nn.SiLU, nn.GELU, nn.ELU)):
            kept = output if isinstance(module, nn.ReLU) else x
            made_from[id(output)] = kept
        elif isinstance(module, ScalarBias):
            made_from[id(output)] = x
            return
        elif isinstance(module, nn.Conv2d):
            kept = made_from.get(id(x), x)
        found.setdefault(kept.untyped_storage().data_ptr(), tuple(kept.shape))

    kinds = (nn.ReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Conv2d, ScalarBias, SqueezeExcite, MaxPool2d)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    model(x)
    for handle in handles:
        handle.remove()
    return list(found.values())


def inner_maps(shapes):
    """Those that are neither the image, which is kept padded or not, nor of one cell."""
    return sorted(shape for shape in shapes if shape[1] != 3 and shape[2] * shape[3] > 1)


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_only_what_convolutions_and_nonlinearities_need_is_kept(name, overrides):
    model = small(name, **overrides)
    x = torch.randn(BATCH, 3, 64, 64)
    # A max-pool's choices are integers.
    kept = [tuple(t.shape) for t in saved_tensors(model, x, maps_of=BATCH) if t.is_floating_point()]
    assert inner_maps(kept) == inner_maps(needed(model, x))


@pytest.mark.parametrize(("name", "share"), [("nf_resnet50", 0.65), ("nf_regnet_b0", 0.6)])
def test_a_normalized_twin_keeps_far_more(name, share):
    x = torch.randn(BATCH, 3, 64, 64)
    free, twin = (
        sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors(small(which), x, maps_of=BATCH))
        for which in (name, TWINS[name])
    )
    assert free < share * twin
