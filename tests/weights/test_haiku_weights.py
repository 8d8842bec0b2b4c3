"""Official weights in our models: the authors' own numbers, and every tensor of every family there and back."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from golden import GOLDEN, golden_case, golden_file, images
from torch import nn

import normfree
from normfree import create_model, load_haiku_weights
from normfree.nn import ScaledWSConv2d
from normfree.weights.haiku import haiku_names

SMALL = {"depths": (1, 2, 1, 1), "num_classes": 5, "padding": "same"}
REGNET = {**SMALL, "widths": (12, 16, 24, 32)}
NFNET = {**SMALL, "widths": (16, 24, 32, 32), "group_size": 4}

# Model, overrides; the official network, its block, and the names of a first and of a second block, by hand.
SHORTCUT = ["~/conv_shortcut/w", "~/conv_shortcut/gain", "~/conv_shortcut/bias"]
SE = [f"~/squeeze_excite/~/{linear}/{leaf}" for linear in ("linear", "linear_1") for leaf in "wb"]


def convolutions(*names, leaves=("w", "gain", "bias")):
    return [f"~/{name}/{leaf}" for name in names for leaf in leaves]


NF = [*convolutions("conv0", "conv1", "conv2"), "skip_gain"]
NFNET_BLOCK = [*convolutions("conv0", "conv1", "conv1b", "conv2"), *SE, "skip_gain"]
BN = [
    *convolutions("conv0", "conv1", "conv2", leaves="w"),
    *convolutions("bn0", "bn1", "bn2", leaves=("scale", "offset")),
]
FIXUP = [*convolutions("conv0", "conv1", "conv2", leaves="w"), *(f"bias{i}{half}" for i in (1, 2, 3) for half in "ab")]
NORM_SHORTCUT = ["~/conv_shortcut/w", "shortcut_bn/scale", "shortcut_bn/offset"]
FAMILIES = {
    "nf_resnet50": (SMALL | {"width": 0.25}, "NF_ResNet", "nf_res_block", NF, SHORTCUT),
    "nf_resnet50 with gates": (SMALL | {"width": 0.25, "use_se": True}, "NF_ResNet", "nf_res_block", NF + SE, SHORTCUT),
    "skipinit_resnet50": (
        SMALL | {"width": 0.25},
        "SkipInit_ResNet",
        "nf_res_block",
        [*convolutions("conv0", "conv1", "conv2", leaves="wb"), "skip_gain"],
        ["~/conv_shortcut/w", "~/conv_shortcut/b"],
    ),
    "fixup_resnet50": (SMALL | {"width": 0.25}, "FixUp_ResNet", "res_block", [*FIXUP, "scale"], SHORTCUT[:1]),
    "resnet50": (SMALL | {"width": 0.25}, "ResNet", "res_block_v1", BN, NORM_SHORTCUT),
    "resnetv2_50": (SMALL | {"width": 0.25}, "ResNet", "res_block_v2", BN, SHORTCUT[:1]),
    "nf_regnet_b0": (REGNET, "NF_RegNet", "nf_block", NF + SE, SHORTCUT),
    "bn_regnet_b0": (REGNET, "BN_RegNet", "block", BN + SE, NORM_SHORTCUT),
    "nfnet_f0": (NFNET, "NFNet", "nf_block", NFNET_BLOCK, SHORTCUT),
}
OUTSIDE = {
    "nf_resnet50": convolutions("initial_conv"),
    "skipinit_resnet50": ["~/initial_conv/w"],
    "fixup_resnet50": ["~/initial_conv/w", "bias1", "bias2"],
    "resnet50": ["~/initial_conv/w", "~/initial_bn/scale", "~/initial_bn/offset"],
    "resnetv2_50": ["~/initial_conv/w", "~/final_bn/scale", "~/final_bn/offset"],
    "nf_regnet_b0": convolutions("initial_conv", "final_conv"),
    "bn_regnet_b0": [
        *convolutions("initial_conv", "final_conv", leaves="w"),
        *convolutions("initial_bn", "final_bn", leaves=("scale", "offset")),
    ],
    "nfnet_f0": convolutions(*(f"stem_conv{index}" for index in range(4)), "final_conv"),
}


def randomized(name, seed=0, **overrides):
    model = create_model(name.split(" ")[0], **{**FAMILIES[name][0], **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 3)
    return model


def official_modules(model, name):
    """Yield a model's modules and parameters with their official paths: a walk, written apart from the library's."""
    _, network, kind, *_ = FAMILIES[name]
    for key, module in [*model.stem.named_children(), *model.final.named_children()]:
        outer = "final" if module in [*model.final.children()] else "initial"
        if isinstance(module, nn.Conv2d):
            yield f"{network}/~/{'stem_' + key if key[-1].isdigit() else outer + '_conv'}", module
        elif isinstance(module, nn.BatchNorm2d):
            yield f"{network}/~/{outer}_bn", module
    yield f"{network}/~/linear", model.classifier
    if network == "FixUp_ResNet":
        yield network, {"bias1": model.stem.bias.bias, "bias2": model.classifier_bias.bias}
    for index, block in enumerate(block for stage in model.stages for block in stage):
        path = f"{network}/~/{kind}_{index}" if index else f"{network}/~/{kind}"
        factor = "scale" if network == "FixUp_ResNet" else "skip_gain"
        skip_gains = [tensor for key, tensor in block.named_parameters() if key.endswith(".skip_gain")]
        own = dict(zip([factor], skip_gains, strict=False))  # none, or one
        biases = [f"bias{number}{half}" for number in "123" for half in "ab"]
        own |= {biases[i]: getattr(block, f"bias{i}").bias for i in range(6) if network == "FixUp_ResNet"}
        if own:
            yield path, own
        for key, module in block.named_modules():
            number = next((letter for letter in key if letter.isdigit()), "")
            if isinstance(module, nn.Conv2d) and "shortcut" in key:
                yield f"{path}/~/conv_shortcut", module
            elif isinstance(module, nn.Conv2d):
                yield f"{path}/~/{key.split('.')[0]}", module
            elif isinstance(module, nn.BatchNorm2d):
                yield (f"{path}/shortcut_bn" if "shortcut" in key else f"{path}/~/bn{number}"), module
            elif isinstance(module, nn.Linear):
                yield f"{path}/~/squeeze_excite/~/linear" + ("_1" if number == "1" else ""), module


def official_tree(model, name):
    """Return a model's parameters and running statistics as the official code would hold them."""
    params, state = {}, {}
    for path, module in official_modules(model, name):
        if isinstance(module, dict):
            params[path] = {leaf: tensor.detach().numpy() for leaf, tensor in module.items()}
        elif isinstance(module, nn.BatchNorm2d):
            weight, bias, mean, variance, counter = (tensor.numpy() for tensor in module.state_dict().values())
            params[path] = {"scale": weight[None, None, None], "offset": bias[None, None, None]}
            for average, value in (("mean_ema", mean), ("var_ema", variance)):
                value = value.reshape(1, 1, 1, -1)
                state[f"{path}/~/{average}"] = {"hidden": value / 2, "average": value, "counter": counter}
        else:
            arrays = {key: tensor.numpy() for key, tensor in module.state_dict().items() if key != "skip_gain"}
            weight = arrays.pop("weight")
            # einsum, for a layout written another way than the library's
            params[path] = {"w": np.einsum("oihw->hwio" if weight.ndim == 4 else "oi->io", weight)}
            renamed = {} if isinstance(module, ScaledWSConv2d) else {"bias": "b"}
            params[path] |= {renamed.get(key, key): array for key, array in arrays.items()}
    return params, state


def assert_same(model, other):
    state = other.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("case", "name", "overrides"),
    [("case01", "nf_resnet50", {"width": 1}), ("case04", "nf_regnet_b0", {"width": 0.25})],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_are_the_authors(case, name, overrides, dtype, tolerance):
    arrays = golden_case(case)
    model = create_model(name, num_classes=10, padding="same", **overrides).to(dtype).eval()
    assert load_haiku_weights(model, golden_file(f"{case}*.npz")) is model
    expected = arrays["extra/f64/logits" if dtype == torch.float64 else "logits"]
    error = np.abs(model(images(arrays["x"], dtype)).detach().numpy() - expected).max()
    assert error < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_the_official_ones(name):
    overrides, network, kind, block, shortcut = FAMILIES[name]
    names = set(haiku_names(create_model(name.split(" ")[0], **overrides)).parameters.values())
    expected = {f"{network}/~/linear/w", f"{network}/~/linear/b"}
    expected |= {f"{network}/{path}" for path in OUTSIDE[name.split(" ")[0]]}
    for index in range(5):
        number = f"_{index}" if index else ""
        expected |= {f"{network}/~/{kind}{number}/{path}" for path in block + (shortcut if index != 2 else [])}
    assert names == expected


REFERENCES = [
    ("NF_ResNet/ResNet50/width4/use_se", "nf_resnet50", {"use_se": True}),
    ("ResNet_BN/ResNet50/width4/preact", "resnetv2_50", {}),
    ("ResNet_BN/ResNet50/width4/postact", "resnet50", {}),
    ("SkipInit_ResNet/ResNet50/width4", "skipinit_resnet50", {}),
    ("FixUp_ResNet/ResNet50/width4", "fixup_resnet50", {}),
    ("NF_RegNet/B8/width0.75", "nf_regnet_b8", {}),
    ("NFNet/F7/width1.0", "nfnet_f7", {}),
]


@pytest.mark.parametrize(("key", "name", "overrides"), REFERENCES)
def test_there_are_as_many_names_as_official_arrays(key, name, overrides):
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden beside the repository")
    counts = json.loads((GOLDEN / "reference_counts.json").read_text())[key]
    with torch.device("meta"):
        names = haiku_names(create_model(name, **overrides))
    assert len(set(names.parameters.values())) == counts["n_param_arrays"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_every_family_comes_back(name, tmp_path):
    model = randomized(name)
    params, state = official_tree(model, name)
    assert_same(load_haiku_weights(randomized(name, 1), {**params, **state}), model)
    assert_same(load_haiku_weights(randomized(name, 2), {"params": params, "state": state}), model)
    pickled = tmp_path / "weights.npz"
    pickled.write_bytes(pickle.dumps({**params, **state}, 3))
    assert_same(load_haiku_weights(randomized(name, 3), pickled), model)
    flat = {"x": np.ones(3)}
    for part, tree in (("params", params), ("state", state)):
        flat |= {f"{part}/{path}/{leaf}": array for path, group in tree.items() for leaf, array in group.items()}
    np.savez(tmp_path / "flat.npz", **flat)
    assert_same(load_haiku_weights(randomized(name, 4), str(tmp_path / "flat.npz")), model)


def test_without_statistics_the_model_keeps_its_own():
    model, fresh = randomized("resnet50"), randomized("resnet50", 1)
    before = {key: tensor.clone() for key, tensor in fresh.named_buffers()}
    load_haiku_weights(fresh, official_tree(model, "resnet50")[0])
    assert all(torch.equal(tensor, before[key]) for key, tensor in fresh.named_buffers())
    params = dict(model.named_parameters())
    assert all(torch.equal(tensor, params[key]) for key, tensor in fresh.named_parameters())


def test_types_of_the_model_are_kept():
    model = randomized("nfnet_f0").double()
    with torch.no_grad():
        model.stem.conv0.weight.div_(3)  # no float32
    params, _ = official_tree(model, "nfnet_f0")
    swapped = {path: {leaf: a.astype(a.dtype.newbyteorder()) for leaf, a in g.items()} for path, g in params.items()}
    double = load_haiku_weights(randomized("nfnet_f0", 1).double(), swapped)
    assert_same(double, model)
    half = load_haiku_weights(randomized("nfnet_f0", 1).bfloat16(), params)
    assert_same(half, model.bfloat16())


def test_symmetric_padding_is_warned_of():
    params, _ = official_tree(randomized("nf_resnet50"), "nf_resnet50")
    with pytest.warns(UserWarning, match="padding='same'") as caught:
        load_haiku_weights(randomized("nf_resnet50", padding="symmetric"), params)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_haiku_weights(randomized("nf_resnet50"), params)


def test_is_public():
    assert {"load_haiku_weights", "load_timm_weights"} <= set(normfree.__all__)
