"""A model, and the process around it, are the same bits after a measurement, also after one that failed."""

from __future__ import annotations

import copy
import random
import re
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from normfree.models import create_model
from normfree.signal import spp


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def plain(value):
    """A value with its containers opened, and its tensors as identity, bits and version."""
    if isinstance(value, dict):
        return type(value), [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item) for item in value]
    if isinstance(value, set):
        return type(value), sorted(map(id, value))
    if isinstance(value, torch.Tensor):
        return id(value), bits(value), value._version
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def state_of(model: nn.Module) -> dict:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "memory": {name: tensor.data_ptr() for name, tensor in tensors},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors},
        "gradients": {name: plain(tensor.grad) for name, tensor in model.named_parameters()},
        "attributes": {name: plain(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
    }


def state_of_process() -> dict:
    return {
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": [v.tobytes() if isinstance(v, np.ndarray) else v for v in np.random.get_state()],
        "hooks": [list(vars(hooks)[name].items()) for name in sorted(vars(hooks)) if "_hooks" in name],
        "modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tracing": (sys.gettrace(), sys.getprofile()),
    }  # fmt: skip


class Remembers(nn.Module):
    """Everything a forward pass may do to its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.offset = nn.Parameter(torch.zeros(6))
        self.calls = 0
        self.log = {"calls": [], "shapes": set()}
        self.kept: list = [1]
        self.last = None
        self.average = torch.zeros(6)  # no buffer
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log["calls"].append(self.calls)
        self.log["shapes"].add(tuple(x.shape))
        self.kept = [*self.kept, x]
        self.last = x
        self.new = x.shape
        self.average.mul_(0.9).add_(x.mean(0))
        self.seen = self.seen + 1
        with torch.no_grad():
            self.scale.copy_(x.std(0))  # initialised by its data
            self.offset.data.view(2, 3)[0].add_(1)  # through a view, hidden from autograd
        self.offset.requires_grad_(False)
        self.train(not self.training)
        random.random(), np.random.rand(), torch.rand(1)
        return x + self.layer(x) * self.scale + self.offset


class MergesWeights(nn.Module):
    """A low-rank adapter that merges its weights when set to evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6)
        self.merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:
            update = self.up.weight.data @ self.down.weight.data
            self.base.weight.data += -update if mode else update
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return x + self.base(x) + (0 if self.merged else self.up(self.down(x)))


class SmallViT(torchvision.models.VisionTransformer):
    def __init__(self) -> None:
        super().__init__(
            image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1
        )


def spectral_net() -> nn.Module:
    old = torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 3, padding=1))
    new = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3, padding=1))
    return nn.Sequential(old, nn.BatchNorm2d(3), nn.ReLU(), new, nn.Dropout(0.5))


def nf_resnet() -> nn.Module:
    return create_model("nf_resnet50", num_classes=5, widths=(8, 8, 16, 16), depths=(1, 2, 1, 1))


IMAGE = (3, 32, 32)
MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5, zero_init_residual=True), IMAGE),
    "vit": (SmallViT, IMAGE),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "spectral norm": (spectral_net, IMAGE),
    "nf_resnet": (nf_resnet, IMAGE),
    "remembers": (Remembers, (6,)),
    "merges": (MergesWeights, (6,)),
}


def lived_in(build) -> nn.Module:
    """A model in the midst of training: mixed modes, frozen and trained parameters, gradients, hooks."""
    torch.manual_seed(0)
    model = build()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters[1::2]:
        parameter.grad = torch.randn_like(parameter)
    list(model.modules())[-1].eval()
    model.register_forward_hook(lambda *arguments: None)
    return model


@pytest.mark.parametrize("gradient", [False, True], ids=["values", "gradient"])
@pytest.mark.parametrize("mode", ["batch-statistics", "train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name, mode, gradient):
    build, shape = MODELS[name]
    model, x = lived_in(build), torch.randn(3, *shape)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    given = bits(x), x._version
    before, outside = state_of(model), state_of_process()
    spp(model, x, mode=mode, gradient=gradient)
    assert state_of_process() == outside
    assert state_of(model) == before
    assert bits(x) == given[0]


class Breaks(nn.Module):
    """Raises at the n-th call."""

    def __init__(self, module: nn.Module, at: int) -> None:
        super().__init__()
        self.module, self.at = module, at

    def forward(self, x):
        self.at -= 1
        if self.at <= 0:
            raise RuntimeError("this block is broken")
        return self.module(x)


@pytest.mark.parametrize("gradient", [False, True], ids=["first pass", "gradient pass"])
@pytest.mark.parametrize("mode", ["batch-statistics", "train", "eval"])
@pytest.mark.parametrize("name", ["resnet18", "nf_resnet"])
def test_nothing_is_left_behind_by_a_failure(name, mode, gradient):
    build, shape = MODELS[name]
    model = lived_in(build)
    blocks, place = (model.layer3, 1) if name == "resnet18" else (model.stages[2], 0)
    blocks[place] = breaks = Breaks(blocks[place], at=1000)
    x = torch.randn(3, *shape)
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, inputs: called.append(module))
    spp(model, x, mode=mode, gradient=False)
    handle.remove()
    breaks.at = called.count(breaks) + 1 if gradient else 1
    before, outside = state_of(model), state_of_process()
    where = "layer3.1" if name == "resnet18" else "stages.2.0"
    reason = rf"failed on an input of shape \[3, 3, 32, 32\] in {where}: RuntimeError"
    if gradient:
        assert re.search(reason, spp(model, x, mode=mode).configuration["gradient"])
    else:
        with pytest.raises(ValueError, match=reason):
            spp(model, x, mode=mode)
    assert state_of_process() == outside
    assert state_of(model) == before


def test_a_failing_iterable_and_a_refused_option_leave_nothing_behind():
    model = lived_in(MODELS["resnet18"][0])
    before, outside = state_of(model), state_of_process()

    def batches():
        yield torch.randn(2, *IMAGE)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        spp(model, batches())
    with pytest.raises(ValueError, match="expected_var"):
        spp(model, torch.randn(2, *IMAGE), expected_var=[1.0])
    assert state_of(model) == before
    random_state = state_of_process()
    random_state["torch"] = outside["torch"]  # the test itself drew its batch
    assert random_state == outside


@pytest.mark.parametrize("mode", ["batch-statistics", "eval", "train"])
def test_a_backward_pass_still_to_come_goes_through(mode):
    """Running statistics and woken gains are put back with their version, which autograd compares."""
    torch.manual_seed(0)
    model = nf_resnet()
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(nn.BatchNorm2d(3), normed, model)
    model.train(mode == "train")
    reference = copy.deepcopy(model)
    x = torch.randn(2, *IMAGE)
    torch.manual_seed(1)
    loss = model(x).square().mean()
    spp(model, x)
    loss.backward()
    torch.manual_seed(1)
    reference(x).square().mean().backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        x.sub_(1).mul_(2)
        x.view(-1)[0] = 7.0
        return x + self.layer(x)


def test_an_input_changed_in_place_is_put_back():
    x = torch.randn(4, 6)
    before = bits(x)
    model = InPlace()
    first = spp(model, x, gradient=True)
    assert bits(x) == before
    assert spp(model, x, gradient=True).to_dict() == first.to_dict()
    spp(model, (x,), points="layers")
    assert bits(x) == before


class Config(dict):
    pass


def test_containers_keep_their_kind_and_identity():
    model = nn.Sequential(nn.Linear(3, 3))
    model.config, model.shared = Config(a=[1]), [1]
    shared = model.shared

    def forward(x):
        model.config["a"].append(2)
        model.config["b"] = 3
        model.shared.append(2)
        model.shared = [*model.shared, 3]
        return nn.Sequential.forward(model, x)

    model.forward = forward
    spp(model, torch.randn(2, 3))
    assert type(model.config) is Config
    assert model.config == {"a": [1]}
    assert model.shared is shared
    assert shared == [1]


def test_a_parameter_given_other_memory_gets_its_own_back():
    model = nn.Sequential(nn.Linear(3, 3))
    weight, memory = model[0].weight, model[0].weight.data_ptr()

    def forward(x):
        weight.data = weight.data * 2
        return nn.Sequential.forward(model, x)

    model.forward = forward
    before = bits(weight)
    spp(model, torch.randn(2, 3))
    assert (weight.data_ptr(), bits(weight)) == (memory, before)
