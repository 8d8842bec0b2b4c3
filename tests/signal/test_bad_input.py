"""What a user can get wrong: one line that names the argument, the value, the rule and the remedy."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normfree.signal import spp


class ReturnsNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        self.layer(x)


class Wanders(nn.Module):
    """Skips a block for batches of positive mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        x = x + self.layer(x)
        return x if x.mean() > 0 else x + self.layer(x)


def linear(*values: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        for i, value in enumerate(values):
            model[0].weight[0, i] = value
    return model


def with_hole(value: float) -> torch.Tensor:
    x = torch.randn(2, 3)
    x[1, 2] = value
    return x


X = torch.randn(2, 3)
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Linear(5, 4)))

CASES = {
    "no module": (lambda: spp(torch.relu, X), "model: builtin_function_or_method is no torch.nn.Module"),
    "a class": (lambda: spp(nn.Linear, X), "model: type is no torch.nn.Module"),
    "unknown mode": (
        lambda: spp(linear(), X, mode="training"),
        "mode='training': unknown choice; choose one of 'batch-statistics', 'train', 'eval'",
    ),
    "unknown points": (
        lambda: spp(linear(), X, points="blocks"),
        "points='blocks': unknown choice; choose one of 'auto', 'residual', 'layers'",
    ),
    "no addition": (
        lambda: spp(linear(), X, points="residual"),
        "points: 'residual' leaves nothing to plot, for no residual addition was recorded in the forward pass of "
        'Sequential; choose points="layers"',
    ),
    "no layer": (
        lambda: spp(nn.ReLU(), X),
        "points: 'layers' leaves nothing to plot, for no weighted operation was recorded in the forward pass of ReLU; "
        "a model needs a convolution",
    ),
    "seed": (
        lambda: spp(linear(), X, seed="x"),
        "seed='x': must be an integer from 0 to 2**63 - 1; give one such as 0",
    ),
    "NaN parameter": (
        lambda: spp(linear(math.nan, math.inf), X),
        "model: parameter '0.weight' has 2 of 6 values that are not finite; initialise it, or load a sound checkpoint",
    ),
    "lazy": (
        lambda: spp(nn.Sequential(nn.LazyLinear(2)), X),
        "model: parameter '0.weight' is not initialised yet; run one batch through the lazy model",
    ),
    "meta": (
        lambda: spp(nn.Linear(3, 2, device="meta"), X),
        "model: parameter 'weight' is on the meta device, without values; initialise it first",
    ),
    "NaN input": (
        lambda: spp(linear(), with_hole(math.nan)),
        "batch: 1 of 6 input values are not finite; clean the input first",
    ),
    "infinite input in a dict": (
        lambda: spp(linear(), {"input": with_hole(-math.inf)}),
        "batch: 1 of 6 input values are not finite; clean the input first",
    ),
    "empty batch": (
        lambda: spp(linear(), torch.empty(0, 3)),
        "batch: a tensor of shape (0, 3) is empty; give at least one example",
    ),
    "a nested batch": (
        lambda: spp(linear(), torch.nested.nested_tensor([X, X[:1]])),
        "batch: a tensor is nested, but the examples of a batch must be of one shape; give tensor.to_padded_tensor",
    ),
    "a ragged batch": (
        lambda: spp(linear(), torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged)),
        "batch: a tensor is nested, but the examples of a batch must be of one shape; give tensor.to_padded_tensor",
    ),
    "no batches": (lambda: spp(linear(), []), "batch: the iterable gave no batch; give at least one"),
    "empty loader": (
        lambda: spp(linear(), DataLoader(TensorDataset(X), batch_size=4, drop_last=True)),
        "batch: the iterable gave no batch; give at least one",
    ),
    "no tensor": (
        lambda: spp(linear(), ("a", 1)),
        "batch: it holds no tensor; give a tensor, a tuple or a dict of tensors",
    ),
    "no batch": (lambda: spp(linear(), 5), "batch: int is no batch; give a tensor, a tuple of positional"),
    "items of no use": (
        lambda: spp(linear(), [1, 2]),
        "batch: an item of the iterable is of type int; each must be a tensor, a tuple",
    ),
    "a NumPy array": (
        lambda: spp(linear(), X.numpy()),
        "batch: it is a NumPy array; give torch.from_numpy(array), with .float() where",
    ),
    "a tuple of NumPy arrays": (
        lambda: spp(linear(), (X.numpy(),)),
        "batch: it holds no tensor; give a tensor, a tuple or a dict of tensors; give torch.from_numpy(array)",
    ),
    "a list of NumPy arrays": (
        lambda: spp(linear(), [X.numpy()]),
        "batch: an item of the iterable is of type ndarray; each must be a tensor, a tuple of positional or a dict of "
        "keyword arguments; give torch.from_numpy(array)",
    ),
    "wrong number of channels": (
        lambda: spp(NET, torch.randn(2, 4, 8, 8)),
        "model: Sequential failed on an input of shape [2, 4, 8, 8] in 0: RuntimeError: ",
    ),
    "wrong size deep inside": (
        lambda: spp(NET, torch.randn(2, 3, 8, 8)),
        "model: Sequential failed on an input of shape [2, 3, 8, 8] in 1.1: RuntimeError: ",
    ),
    "too many arguments": (
        lambda: spp(linear(), (X, X)),
        "model: Sequential failed on an input of shape [2, 3], [2, 3]: TypeError: ",
    ),
    "unknown keyword": (
        lambda: spp(linear(), {"image": X}),
        "model: Sequential failed on an input of shape [2, 3]: TypeError: ",
    ),
    "integers": (
        lambda: spp(linear(), torch.ones(2, 3, dtype=torch.long)),
        "model: Sequential failed on an input of shape [2, 3] in 0: RuntimeError: ",
    ),
    "one example for batch norm": (
        lambda: spp(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), X[:1]),
        "in 1: ValueError: Expected more than 1 value per channel when training, got input size torch.Size([1, 2]); "
        'give a batch of two examples or more, or choose mode="eval"',
    ),
    "no output": (
        lambda: spp(ReturnsNothing(), X),
        "model: ReturnsNothing returned NoneType, which holds no tensor; its forward must return what it computes",
    ),
    "no shape to guess": (
        lambda: spp(nn.ReLU()),
        "batch: the input shape of this model cannot be inferred; give a batch",
    ),
    "too few predictions": (
        lambda: spp(linear(), X, expected_var=[1.0, 2.0]),
        "expected_var: 2 predictions for 1 measured points; give one a point",
    ),
    "a prediction for all": (
        lambda: spp(linear(), X, expected_var=1.0),
        "expected_var: 1.0 is no sequence of numbers; give one a point",
    ),
    "channels that change": (
        lambda: spp(nn.Conv2d(1, 1, 1), [torch.randn(2, 1, 4, 4), torch.randn(2, 3, 4, 4)]),
        "model: Conv2d failed on an input of shape [2, 3, 4, 4]",
    ),
    "ways that change": (
        lambda: spp(Wanders(), [X + 100, X - 100]),
        "batch: the model took another way through its blocks (1 points in the first batch, 2 in a later one); "
        "average only over batches that take the same way",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(case):
    act, message = CASES[case]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        act()
    assert "\n" not in str(caught.value)
