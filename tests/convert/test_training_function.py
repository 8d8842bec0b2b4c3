"""The pretrained start keeps the function in training with frozen statistics, and that of norms that did not run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convert.nets import randomise
from torch import nn

import normfree
from normfree.nn import ChannelAffine

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class DropPath(nn.Module):
    """Leaves out whole examples in training, by a mask."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) * 2 if self.training else x


class FunctionalDropout(nn.Module):
    """A convolution, a dropout of its own forward, and the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(F.dropout(self.conv(x), 0.5, self.training))


class ReadInTraining(FunctionalDropout):
    """What the layer gives is an output of its own in training."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y).relu() + y if self.training else self.norm(y).relu()


class WithTargets(nn.Module):
    """Wants something that the example does not have in training, as detectors do."""

    def __init__(self):
        super().__init__()
        self.body = between(nn.Dropout(0.5))

    def forward(self, x, target=None):
        if self.training and target is None:
            raise ValueError("no target")
        return self.body(x)


def between(module):
    return nn.Sequential(nn.Conv2d(3, 8, 3), module, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


CASES = {
    "dropout": (lambda: between(nn.Dropout(0.5)), {"2"}),
    "channel dropout": (lambda: between(nn.Dropout2d(0.5)), {"2"}),
    "alpha dropout": (lambda: between(nn.AlphaDropout(0.5)), {"2"}),
    "random slopes": (lambda: between(nn.RReLU()), {"2"}),
    "stochastic depth": (lambda: between(DropPath()), {"2"}),
    "a functional dropout": (FunctionalDropout, {"norm"}),
    "another reader": (ReadInTraining, {"norm"}),
    "wants targets": (WithTargets, {"body.2"}),
    "dropout behind the norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)),
        set(),
    ),
    "nothing": (lambda: between(nn.Identity()), set()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_that_of_training_with_frozen_statistics(name):
    build, affine = CASES[name]
    torch.manual_seed(0)
    model = randomise(build()).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert {n for n, module in converted.named_modules() if isinstance(module, ChannelAffine)} == affine
    given = (IMAGES, 1) if name == "wants targets" else (IMAGES,)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    outputs = []
    for each in (model, converted.train()):
        torch.manual_seed(1)
        outputs.append(each(*given))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_what_comes_between_is_said():
    model = randomise(between(nn.Dropout(0.5))).eval()
    reasons = {
        change.name: change.reason for change in normfree.convert(model, IMAGES, start="pretrained").conversion.changes
    }
    assert (
        reasons["2"].startswith("stays an affine map: in training ") and "in 1 comes between 0 and it" in reasons["2"]
    )


class Domains(nn.Module):
    """One convolution, a norm for each domain."""

    def __init__(self, norms=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = norms or nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x, domain=0):
        return self.tail(self.norms[domain](self.conv(x)).relu())


class TwoLists(nn.Module):
    """The norms of each domain in a list of their own."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.first = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.second = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x, domain=0):
        for conv, norm in zip(self.convs, self.second if domain else self.first, strict=True):
            x = norm(conv(x)).relu()
        return x


@pytest.mark.parametrize("build", [Domains, TwoLists])
def test_norms_of_other_domains_do_what_they_did(build):
    torch.manual_seed(0)
    model = randomise(build()).eval()
    with torch.no_grad():
        for number, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean += number  # the domains differ
    converted = normfree.convert(model, IMAGES, start="pretrained")
    for domain in (0, 1):
        torch.testing.assert_close(converted(IMAGES, domain), model(IMAGES, domain), rtol=1e-4, atol=1e-5)
    assert converted.conversion.norms_left, "the other domains' norms"


def test_a_head_that_did_not_run_leaves_the_others_folded():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.extra = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x, both=False):
            y = self.body(x)
            return y + self.extra(y) if both else y

    model = randomise(Headed()).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert not any(isinstance(module, ChannelAffine) for module in converted.modules())
    torch.testing.assert_close(converted(IMAGES, True), model(IMAGES, True), rtol=1e-4, atol=1e-5)
