"""Arguments with choices: their type names the choices, and the check takes these and refuses any other.

The walk over all public functions, classes and their methods finds such arguments; each has its call below.
"""

import importlib
import inspect
import re
import typing
from functools import partial

import pytest
import torch
from torch import nn

import normfree
from normfree import benchmark, convert, data, models, optim, signal, train
from normfree.common.checks import choices_of
from normfree.models.registry import _COMMON, _VARIANTS, CENTRED
from normfree.nn import ACTIVATIONS, OFFICIAL_GAMMA, ActivationName, GammaName
from normfree.signal.propagation import BlockSignal

PACKAGES = ("signal", "nn", "models", "convert", "optim", "weights", "export", "data", "train", "benchmark")

RESULTS = {"BlockSignal", "Conversion", "Entry", "Finding", "SignalPropagation", "Summary"}
"""Made by this package alone."""


def public():
    """Every public function, class and method, by name."""
    found = {}
    for module in (normfree, *(importlib.import_module(f"normfree.{name}") for name in PACKAGES)):
        for name in module.__all__:
            item = getattr(module, name)
            if inspect.isfunction(item) or (isinstance(item, type) and not typing.is_typeddict(item)):
                found[name] = item
            for method, function in vars(item).items() if isinstance(item, type) else ():
                function = getattr(function, "__func__", function)  # of a class method
                if inspect.isfunction(function) and not method.startswith("_"):
                    found[f"{name}.{method}"] = function
    return {name: item for name, item in found.items() if item is not normfree.train.train}  # its hints need rich


def arguments(item):
    """The arguments of something that can be called, with their types."""
    holds_hints = item.__init__ if isinstance(item, type) and not hasattr(item, "__dataclass_fields__") else item
    hints = typing.get_type_hints(holds_hints)
    return {name: hints.get(name) for name in inspect.signature(item).parameters}


def choices(hint):
    """The choices that an argument may be one of, or hold, beside values of another kind."""
    return choices_of(hint) or tuple(choice for part in typing.get_args(hint) for choice in choices(part))


CHOSEN = {
    (name, argument): choices(hint)
    for name, item in public().items()
    if name not in RESULTS
    for argument, hint in arguments(item).items()
    if choices(hint)
}

NORMED = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
SMALL = {"depths": (1, 1, 1, 1), "num_classes": 2}
SIZED = {"width": 1, "base_widths": (8, 8, 8, 8), "drop_rate": 0.0, "train_size": 32, "test_size": 32, **SMALL}
PART = {"name": "p", "title": "t", "contenders": [benchmark.Contender("a")], "batch_size": 1, "image_size": 8}


class Residual(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)


PLOT = normfree.spp(Residual(2, 2), torch.eye(2))
CALLS = {
    "spp": partial(normfree.spp, Residual(2, 2), torch.eye(2)),
    "SignalMonitor": partial(normfree.SignalMonitor, Residual(2, 2)),
    "SignalPropagation.curve": PLOT.curve,
    "SignalPropagation.assert_healthy": lambda ignore: PLOT.assert_healthy(ignore=[ignore]),
    "create_model": partial(normfree.create_model, "nf_resnet50", width=0.5, **SMALL),
    "gamma": normfree.gamma,
    "build_activation": normfree.nn.build_activation,
    "convert": partial(convert.convert, NORMED, torch.randn(2, 3, 4, 4)),
    "MaxPool2d": partial(normfree.nn.MaxPool2d, 2, 2),
    "PaddedConv2d": partial(normfree.nn.PaddedConv2d, 2, 2, 1),
    "ScaledConv2d": partial(normfree.nn.ScaledConv2d, 2, 2, 1),
    "ScaledWSConv2d": partial(normfree.nn.ScaledWSConv2d, 2, 2, 1),
    **{name: partial(getattr(models, name), width=0.5, **SMALL) for name in ("NFResNet", "ResNet", "ResNetV2")},
    **{name: partial(getattr(models, name), width=0.5, **SMALL) for name in ("SkipInitResNet", "FixUpResNet")},
    **{name: partial(getattr(models, name), **SIZED) for name in ("NFRegNet", "BNRegNet", "NFNet")},
    "AugmentationConfig": data.AugmentationConfig,
    "DataConfig": data.DataConfig,
    "OptimizerConfig": train.OptimizerConfig,
    "TrainConfig": lambda **options: train.TrainConfig(
        name="n", model="nf_resnet50", **{name: (one,) if name == "log" else one for name, one in options.items()}
    ),
    "Contender": lambda steps: benchmark.Contender("a", steps=(steps,)),
    "Part": lambda **options: benchmark.Part(**{"task": "inference", **PART, **options}),
    "Target": partial(benchmark.Target, of="a", over="b", at_most=1.0),
}


def test_every_argument_with_choices_is_tried_here():
    assert {name for name, _ in CHOSEN} == set(CALLS)


@pytest.mark.parametrize(("name", "argument"), CHOSEN)
def test_each_choice_is_taken(name, argument):
    for choice in CHOSEN[name, argument]:
        CALLS[name](**{argument: choice})


@pytest.mark.parametrize(("name", "argument"), CHOSEN)
def test_any_other_is_refused(name, argument):
    with pytest.raises(ValueError, match=f"^{argument}") as caught:
        CALLS[name](**{argument: "none-such"})
    assert any(str(choice) in str(caught.value) for choice in CHOSEN[name, argument])
    assert "none-such" in str(caught.value)


def test_no_argument_that_is_a_string_has_choices_in_words_alone():
    for name, item in public().items():
        for argument, hint in arguments(item).items():
            if hint not in (str, str | None):
                continue
            told = re.search(rf"^( +)[\w, ]*\b{argument}\b[\w, ]*: (.*(?:\n\1 +.*)*)", item.__doc__ or "", re.MULTILINE)
            quoted = re.findall(r'"[\w-]+"', told[2]) if told else []
            assert len(quoted) < 2, f"{name}: {argument} has choices {quoted}; its type should be a Literal of them"


def test_a_group_of_parameters_has_a_rule_of_the_optimizer():
    weights = [nn.Parameter(torch.eye(2))]
    for rule in choices_of(optim.Rule):
        optim.Muon([{"params": weights, "rule": rule}])
    with pytest.raises(ValueError, match=r"^rule='none-such'.*'muon', 'sgd'"):
        optim.Muon([{"params": weights, "rule": "none-such"}])


def test_tables_hold_what_their_types_name():
    assert set(choices_of(ActivationName)) == set(ACTIVATIONS)
    assert set(choices_of(GammaName)) == {*OFFICIAL_GAMMA, *ACTIVATIONS}
    numbers = {name for name, hint in typing.get_type_hints(BlockSignal).items() if hint in (float, float | None)}
    assert set(choices_of(signal.Curve)) == numbers - {"weight_gain"}  # of the weight, not of the signal


def test_overrides_are_the_arguments_of_the_families():
    overrides, known = typing.get_type_hints(models.Overrides), set()
    for variant in _VARIANTS.values():
        for name, hint in arguments(variant.family).items():
            if name not in (*_COMMON, "self"):
                assert overrides[name] == hint, (variant.family, name)
                known.add(name)
    assert set(overrides) == {*known, CENTRED}


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (typing.Literal["a", "b"], ("a", "b")),
        (typing.Literal[1, 3] | None, (1, 3, None)),
        (typing.Literal["auto"] | bool, ("auto", True, False)),
        (typing.Literal["a"] | typing.Literal["b"], ("a", "b")),
        (typing.Literal["a"] | int, ()),
        (bool, ()),
        (bool | None, ()),
        (str, ()),
    ],
)
def test_choices_of_a_type(hint, expected):
    assert choices_of(hint) == expected
