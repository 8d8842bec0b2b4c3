"""What leaving normalizers out buys, family by family; a batch-normalised twin fails each of these tests.

Gradients are compared in float64, where two orders of summation differ by 1e-16 of what is summed.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import normfree
from normfree.nn import SqueezeExcite

GROUPED = {"widths": (16, 24, 32, 40), "group_size": 4}
CASES = {
    "nf_resnet50": ("nf_resnet50", {"width": 0.5}),
    "nf_resnet50 with SE": ("nf_resnet50", {"width": 0.5, "use_se": True}),
    "skipinit_resnet50": ("skipinit_resnet50", {"width": 0.5}),
    "fixup_resnet50": ("fixup_resnet50", {"width": 0.5}),
    "nf_regnet_b0": ("nf_regnet_b0", GROUPED),
    "nfnet_f0": ("nfnet_f0", GROUPED),
    "resnet50": ("resnet50", {"width": 0.5}),
    "resnetv2_50": ("resnetv2_50", {"width": 0.5}),
    "bn_regnet_b0": ("bn_regnet_b0", GROUPED),
}
FREE = [case for case in CASES if not case.startswith(("resnet", "bn_"))]
TWINS = [case for case in CASES if case not in FREE]


def small(case, **overrides):
    """A small training-mode model in float64 whose every branch is heard."""
    name, shape = CASES[case]
    quiet = {"depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0, "num_classes": 3}
    torch.manual_seed(0)
    model = normfree.create_model(name, **{**quiet, **shape, **overrides}).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(examples=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 3, 48, 40, dtype=torch.float64, generator=generator)
    return x, torch.arange(examples) % 3


def gradients(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))


def difference(ones, others):
    """The largest difference of two lists of gradients, of the largest gradient of all."""
    largest = max(other.abs().max() for other in others)
    return max(((one - other).abs().max() / largest).item() for one, other in zip(ones, others, strict=True))


def leak(case):
    """How much an example's logits depend on the other examples, of how much they do on it."""
    model, (x, _) = small(case), batch()
    x.requires_grad_()
    (found,) = torch.autograd.grad(model(x)[1].square().sum(), x)
    others = found[[0, 2, 3]].abs().max()
    return (others / found[1].abs().max()).item()


def mode_gap(case):
    """How far training mode is from evaluation mode."""
    model, (x, _) = small(case), batch()
    evaluated = copy.deepcopy(model).eval()(x)
    return ((model(x) - evaluated).abs().max() / evaluated.abs().max()).item()


def split_gap(case):
    """How far the gradient of a batch is from the sum of those of its parts."""
    model, (x, y) = small(case), batch()
    parts = [gradients(model, x[rows], y[rows]) for rows in (slice(0, 1), slice(1, 4))]
    return difference([a + b for a, b in zip(*parts, strict=True)], gradients(model, x, y))


@pytest.mark.parametrize("case", FREE)
def test_examples_do_not_leak_into_each_other(case):
    assert leak(case) == 0


@pytest.mark.parametrize("case", FREE)
def test_training_and_evaluation_are_one_function(case):
    assert mode_gap(case) == 0


@pytest.mark.parametrize("case", FREE)
def test_micro_batches_give_the_gradient_of_the_batch(case):
    assert split_gap(case) < 1e-12


@pytest.mark.parametrize("measure", [leak, mode_gap, split_gap])
@pytest.mark.parametrize("case", TWINS)
def test_batch_norm_fails_all_three(case, measure):
    assert measure(case) > 1e-3


def per_example(model, x, y):
    """The gradients of every example by ``torch.func``: [examples, ...] by parameter."""

    def loss(parameters, example, label):
        return F.cross_entropy(functional_call(model, parameters, (example[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


@pytest.mark.parametrize("case", FREE)
def test_per_example_gradients_equal_looped_ones(case):
    model, (x, y) = small(case), batch(3)
    together = per_example(model, x, y)
    for index in range(len(x)):
        alone = gradients(model, x[index : index + 1], y[index : index + 1])
        assert difference([gradient[index] for gradient in together.values()], alone) < 1e-12


@pytest.mark.parametrize("case", TWINS)
def test_batch_norm_has_no_per_example_gradients(case):
    with pytest.raises(RuntimeError, match="that would mutate a captured Tensor"):
        per_example(small(case), *batch(3))


@pytest.mark.parametrize("case", FREE)
def test_opacus_takes_the_model_and_its_per_example_gradients_are_right(case):
    opacus = pytest.importorskip("opacus")
    model, (x, y) = small(case), batch(3)
    looped = [gradients(model, x[index : index + 1], y[index : index + 1]) for index in range(len(x))]
    assert opacus.validators.ModuleValidator.validate(model) == []
    sampled = opacus.GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(sampled(x), y, reduction="sum").backward()
    for index, alone in enumerate(looped):
        assert difference([parameter.grad_sample[index] for parameter in model.parameters()], alone) < 1e-12


@pytest.mark.parametrize("case", FREE)
def test_a_differentially_private_step(case):
    """With next to no noise, the step is the mean of the clipped gradients of the examples."""
    opacus = pytest.importorskip("opacus")
    model, (x, y) = small(case), batch(4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    expected = [torch.zeros_like(parameter) for parameter in before]
    for index in range(len(x)):
        alone = gradients(model, x[index : index + 1], y[index : index + 1])
        norm = torch.stack([gradient.norm() for gradient in alone]).norm()
        assert norm > 0.1
        for total, gradient in zip(expected, alone, strict=True):
            total += gradient * (0.1 / (norm + 1e-6)) / len(x)  # 1e-6: Opacus's own
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4),
        noise_multiplier=1e-14,
        max_grad_norm=0.1,
        poisson_sampling=False,
    )
    F.cross_entropy(private(x), y).backward()
    optimizer.step()
    steps = [old - new for old, new in zip(before, model.parameters(), strict=True)]
    assert difference(steps, expected) < 1e-9


@pytest.mark.parametrize("case", TWINS)
def test_opacus_refuses_batch_norm(case):
    opacus = pytest.importorskip("opacus")
    assert not opacus.validators.ModuleValidator.is_valid(small(case))


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(model, x):
    with torch.no_grad(), Operations() as watch:
        model.eval()(x)
    return watch.counts


ALLOWED = {"relu", "silu", "gelu", "max_pool2d_with_indices", "avg_pool2d", "mean"}


@pytest.mark.parametrize("case", FREE)
def test_a_folded_model_runs_plain_convolutions_activations_and_additions_only(case):
    model, (x, _) = small(case), batch(2)
    folded = normfree.fold(model)
    torch.testing.assert_close(folded(x), model.eval()(x))
    layers = Counter(type(module) for module in folded.modules())
    gates = layers[SqueezeExcite]
    counts = operations(folded, x)
    assert counts.pop("convolution") == layers[nn.Conv2d]
    assert counts.pop("addmm") == layers[nn.Linear]
    # One sum a block and FixUp's numbers; of a gate, its product with the map and three on its [N, C].
    assert counts.pop("add") == 5 + sum(type(module).__name__ == "ScalarBias" for module in folded.modules())
    assert counts.pop("mul", 0) <= 4 * gates + 1
    assert counts.pop("sigmoid", 0) == gates
    views = {"view", "t", "unsqueeze", "detach", "alias", "slice", "expand", "_unsafe_view"}
    assert set(counts) - views <= ALLOWED
    # Unfolded, the same and the arithmetic of the weights.
    assert operations(model, x).total() > operations(folded, x).total()


@pytest.mark.parametrize("case", TWINS)
def test_folding_leaves_batch_norm_in(case):
    counts = operations(normfree.fold(small(case)), batch(2)[0])
    assert counts["native_batch_norm"] + counts["_native_batch_norm_legit_no_training"] > 0
