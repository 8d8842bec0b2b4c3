"""Modules of other classes whose weight is standardized in place: the same numbers as our own layers, in every use."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from nn.test_scaled_ws_layers import LAYERS
from torch import nn
from torch.func import functional_call, grad, vmap

from normfree import nn as ours
from normfree.nn import WeightLayout, fold, has_foldable, standardization_of, standardize_module
from normfree.optim.clipping import units_of

IMAGES = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0))


class Padding(nn.Conv2d):
    """Pads in its own forward."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Kernel(nn.Module):
    """A matrix of another name, [in, out], without a bias."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.kernel


KERNEL = WeightLayout(weight="kernel", bias="", order=(1, 0), axis=-1)


def padding(**factors):
    torch.manual_seed(0)
    module = Padding(8, 16, 2)
    standardize_module(module, WeightLayout(), **{"input_scale": 1.7, "alpha": 0.2, "skip_gain": 0.5, **factors})
    return module


def kernel(**factors):
    torch.manual_seed(0)
    module = Kernel(8, 6)
    standardize_module(module, KERNEL, **{"alpha": 0.2, "skip_gain": 0.5, **factors})
    nn.init.normal_(module.raw_added_bias)
    return module


def layout_of(layer):
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return WeightLayout(factor=1.0)
    rest = tuple(range(3, layer.weight.dim() + 1))
    factor = float(torch.tensor(layer.stride).prod()) ** 0.5
    if layer.groups == 1:
        return WeightLayout(order=(1, 0, *(axis - 1 for axis in rest)), factor=factor)
    return WeightLayout(groups=layer.groups, order=(0, 2, 1, *rest), leading=2, factor=factor)


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_are_our_own_layers_to_the_last_bit(name):
    scaled, kept, sizes, options, shape = LAYERS[name]
    factors = {"input_scale": 1.7, "alpha": 0.2, "skip_gain": 0.7}
    x = torch.randn(*shape)
    for kind, keeps in ((scaled, False), (kept, True)):
        torch.manual_seed(0)
        wanted = kind(*sizes, **options, **factors)
        base = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn") and base is not nn.Module)
        plain = base(*sizes, **({"padding": 1} if name in ("2d", "depthwise") else {}), **options)
        part = standardize_module(plain, layout_of(plain), kept_mean=keeps, **factors)
        with torch.no_grad():
            for own, other in ((wanted.weight, plain.raw_weight), (wanted.bias, plain.raw_bias)):
                own.copy_(torch.randn_like(own))
                other.copy_(own)
            part.gain.copy_(wanted.gain.copy_(torch.randn_like(wanted.gain)))
            if keeps:
                part.kept_mean.copy_(wanted.kept_mean.copy_(torch.randn_like(wanted.kept_mean)))
        weight, bias = wanted.effective()
        assert torch.equal(plain.weight, weight) and torch.equal(plain.bias, bias)
        assert torch.equal(plain(x), wanted(x))
        for module in (plain, wanted):
            module(x).square().sum().backward()
        assert torch.equal(plain.raw_weight.grad, wanted.weight.grad)
        torch.testing.assert_close(part.skip_gain.grad, wanted.skip_gain.grad)  # summed in another order


@pytest.mark.parametrize(("make", "x"), [(padding, IMAGES), (kernel, IMAGES)])
def test_fold_gives_the_class_it_had_and_the_same_outputs(make, x):
    x = x if make is padding else x.transpose(1, 3)[..., :8]
    module = make()
    plain = fold(nn.Sequential(module))
    torch.testing.assert_close(plain(x), nn.Sequential(module)(x))
    assert has_foldable(module) and not has_foldable(plain)
    assert set(plain.state_dict()) == ({"0.weight", "0.bias"} if make is padding else {"0.kernel", "0.added_bias"})
    if make is padding:
        assert type(plain[0]) is Padding
    assert standardization_of(module) is not None, "the original is left as it is"


@pytest.mark.parametrize("make", [padding, kernel])
def test_copies_pickles_and_state_dicts(make):
    module = make()
    x = IMAGES if make is padding else IMAGES.transpose(1, 3)[..., :8]
    wanted = module(x)
    assert torch.equal(copy.deepcopy(module)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), wanted)
    folded = fold(module)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))
    other = make(skip_gain=0.9)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), wanted)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


@pytest.mark.parametrize("make", [padding, kernel])
def test_functions_of_the_parameters_and_per_example_gradients(make):
    module = make(kept_mean=True)
    x = IMAGES if make is padding else IMAGES.transpose(1, 3)[..., :8]
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert torch.equal(functional_call(module, parameters, (x,)), module(x))

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],)).pow(2).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    module(x).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)
        assert parameter.grad.abs().sum() > 0


def test_traces_exports_and_precisions():
    module = padding().eval()
    model = nn.Sequential(module, nn.ReLU(), nn.Conv2d(16, 3, 1))
    wanted = model(IMAGES)
    assert torch.equal(torch.fx.symbolic_trace(model)(IMAGES), wanted)
    program = torch.export.export(model, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), wanted)
    exported = torch.export.export(fold(model), (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), wanted)
    assert {node.target for node in exported.graph.nodes if node.op == "call_function"} <= {
        torch.ops.aten.pad.default,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.relu.default,
    }
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IMAGES)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), wanted, rtol=0.1, atol=0.05)
    assert model.double()(IMAGES.double()).dtype == torch.float64
    assert model.to(torch.bfloat16)(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_a_compiled_module_computes_the_same():
    module = padding()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), module(IMAGES))
    compiled(IMAGES).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    module(IMAGES).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        WeightLayout(order=(2, 0, 1), leading=1),
        WeightLayout(order=(1, 2, 0), leading=2),
        WeightLayout(groups=2, order=(0, 2, 1, 3), leading=2),
        WeightLayout(leading=2),
    ],
)
def test_every_layout_reads_back(layout):
    weight = torch.randn(4, 6, 5)
    filters = layout.filters(weight)
    assert torch.equal(layout.weight_of(filters, weight.shape), weight)
    assert filters.numel() == weight.numel()


def test_what_cannot_be_standardized_is_refused():
    module = Padding(8, 16, 2)
    module.standardization = 3
    with pytest.raises(ValueError, match="module: Padding has an attribute 'standardization'"):
        standardize_module(module, WeightLayout())
    with pytest.raises(ValueError, match="fan_in=1"):
        standardize_module(Padding(8, 8, 1, groups=8), WeightLayout())


def test_a_bias_is_added_along_its_axis():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8, 3))

        def forward(self, x):
            return F.conv1d(x, self.weight)

    module = Grouped()
    standardize_module(module, WeightLayout(bias="", axis=1), alpha=0.5)
    x = torch.randn(2, 8, 7)
    before = module(x)
    with torch.no_grad():
        module.raw_added_bias.copy_(torch.arange(6.0))
    torch.testing.assert_close(module(x), before + 0.5 * torch.arange(6.0).view(1, 6, 1))


def test_opacus_gives_per_example_gradients():
    opacus = pytest.importorskip("opacus")
    for make in (padding, kernel):
        x = IMAGES if make is padding else IMAGES.transpose(1, 3)[..., :8]
        module = opacus.GradSampleModule(make())
        module(x).sum().backward()
        assert all(parameter.grad_sample.shape[0] == 4 for parameter in module.parameters())


def test_the_weight_of_a_model_that_is_not_there_yet():
    with torch.device("meta"):
        module = Padding(8, 16, 2)
        standardize_module(module, WeightLayout())
    assert module.weight.is_meta
    assert ours.Standardization.__name__ in repr(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_older_onnx_exporter_takes_standardized_weights():
    onnxruntime = pytest.importorskip("onnxruntime")
    module = Padding(8, 16, 2)
    standardize_module(module, WeightLayout(), kept_mean=True, alpha=0.2)
    model = nn.Sequential(module, ours.ScaledWSConvTranspose2d(16, 6, 2, stride=2, groups=2), nn.Flatten(2))
    model = nn.Sequential(model, ours.KeptMeanLinear(324, 3)).eval()
    file = io.BytesIO()
    torch.onnx.export(model, (IMAGES,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_clipping_knows_the_units_of_any_layout():
    units = {each.name: each for each in units_of(nn.Sequential(kernel(), padding()), exclude=())}
    assert units["0.raw_kernel"].kept == (1,) and units["0.raw_kernel"].count == 6
    assert units["1.raw_weight"].kept == (0,) and units["1.raw_weight"].count == 16
    assert units["0.raw_added_bias"].kept == ()
