"""The gradient curve against autograd by hand: retain_grad at every point, the same projection."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from normfree.signal import spp


class Block(nn.Module):
    def __init__(self, channels: int, gain: float | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x):
        branch = self.last(torch.tanh(self.first(x)))
        return x + (branch if self.gain is None else self.gain * branch)


class Net(nn.Module):
    """A residual net; each sum may go through an in-place ReLU, which overwrites it."""

    def __init__(self, *, rectified: bool = False, gain: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block(6, gain) for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.rectified = rectified
        self.double()

    def forward(self, x, kept: list | None = None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if kept is not None:
                x.retain_grad()
                kept.append(x)
            if self.rectified:
                x = torch.relu(x) if kept is not None else torch.relu_(x)
        return self.head(x)


def batch() -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def by_hand(model: nn.Module, x: torch.Tensor, seed: int) -> list[float]:
    kept: list[torch.Tensor] = []
    output = model(x, kept)
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).double()
    (output * projection).sum().backward()
    model.zero_grad()
    return [activation.grad.square().mean().item() for activation in kept]


def measured(model: nn.Module, **options) -> list[float]:
    return spp(model, batch(), gradient=True, **options).curve("avg_sq_gradient")[1:]


@pytest.mark.parametrize("rectified", [False, True], ids=["plain", "in-place relu after the sum"])
@pytest.mark.parametrize("seed", [0, 5])
def test_against_autograd(rectified, seed):
    model = Net(rectified=rectified)
    expected = by_hand(model, batch(), seed)
    assert measured(model, seed=seed) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("rectified", [False, True])
def test_frozen_parameters_change_nothing(rectified):
    model = Net(rectified=rectified)
    expected = by_hand(model, batch(), 0)
    model.requires_grad_(False)
    assert measured(model) == pytest.approx(expected, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_grad_mode_outside():
    model = Net()
    expected = by_hand(model, batch(), 0)
    with torch.no_grad():
        assert measured(model) == pytest.approx(expected, rel=1e-12)


def test_the_first_batch_alone_is_taken():
    model = Net()
    result = spp(model, [batch(), 100 * batch()], gradient=True)
    assert result.curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(model, batch(), 0), rel=1e-12)


def test_the_gradient_flows_through_a_woken_gain():
    asleep, awake = Net(gain=0.0), Net(gain=1.0)
    expected = by_hand(awake, batch(), 0)
    assert measured(asleep) == pytest.approx(expected, rel=1e-12)
    # Left asleep, the gradient is the same at every point: shortcuts alone carry it.
    assert measured(asleep, wake=False) == pytest.approx([expected[-1]] * 3, rel=1e-12)
    assert measured(asleep) != pytest.approx([expected[-1]] * 3, rel=1e-3)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.double()

    def forward(self, x, kept: list | None = None):
        for layer in (self.a, self.b, self.c):
            x = layer(x)
            if kept is not None:
                x.retain_grad()
                kept.append(x)
            x = torch.relu(x) if kept is not None else torch.relu_(x)
        return x


def test_a_point_per_layer():
    model = Layers()
    assert measured(model) == pytest.approx(by_hand(model, batch(), 0), rel=1e-12)


def test_dropout_drops_what_it_dropped_in_the_first_pass():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return nn.functional.dropout(x + self.layer(x), 0.5, self.training) * 2

    # Where the output is d·2·(x + f(x)) with d ∈ {0, 2}, the gradient at the sum is 4·r on what was kept.
    model, x = Dropped(), torch.randn(64, 5)
    gradient = spp(model, x, mode="train", gradient=True, seed=2).blocks[0].avg_sq_gradient
    torch.manual_seed(2)
    kept = nn.functional.dropout(torch.ones(64, 5), 0.5) > 0
    projection = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    assert gradient == pytest.approx((4 * projection * kept).square().mean().item(), rel=1e-6)


def test_no_number_where_no_gradient_arrives():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            x = (x + self.a(x)).detach()
            return x + self.b(x)

    first, second = spp(Detached(), torch.randn(4, 5), gradient=True).curve("avg_sq_gradient")[1:]
    assert first is None
    assert second is not None


def test_no_curve_when_switched_off():
    result = spp(Net(), batch(), gradient=False)
    assert result.curve("avg_sq_gradient") == [None] * 4
    assert result.configuration["gradient"] is False


class Noted(nn.Module):
    """A residual net whose sums are noted out of place, for :func:`by_hand`; ``add`` and ``act`` are what varies."""

    def __init__(self, norm, add, act, *, convolution=nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(convolution(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.add, self.act = norm, add, act
        self.double()

    def forward(self, x, kept: list | None = None):
        for convolution in self.convolutions:
            branch = self.norm(convolution(x))
            if kept is None:
                x = self.act(self.add(branch, x))
            else:
                x = branch + x
                x.retain_grad()
                kept.append(x)
                x = nn.functional.leaky_relu(x, 0.01)
        return x


def added_to(branch, x):
    branch += x
    return branch


def added_in_half(branch, x):
    """In place through two views, of which neither is the whole sum; the first one is a sum of its own."""
    whole = branch.flatten(1)
    whole.add_(x.flatten(1))
    return branch


IN_PLACE = {
    "instance norm, a view": nn.InstanceNorm2d(4),
    "group norm": nn.GroupNorm(2, 4),
    "a view of two": nn.Flatten(1, 1),
    "transposed twice": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2)),
}


@pytest.mark.parametrize("norm", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("add", [added_to, added_in_half], ids=["itself", "through a view"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place activation"])
def test_sums_in_place(norm, add, in_place):
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Noted(norm, add, nn.LeakyReLU(0.01, inplace=in_place))
    expected = by_hand(model, x, 0)
    assert spp(model, x).curve("avg_sq_gradient")[1:] == pytest.approx(expected, rel=1e-12)


def test_a_sum_into_a_part_of_a_tensor():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.layer = nn.Linear(6, 6), nn.Linear(3, 3)

        def forward(self, x, kept: list | None = None):
            x = self.stem(x)
            left, right = x[:, :3], x[:, 3:]
            if kept is None:
                left += self.layer(left.relu())
                x.tanh_()
                return x
            left = left + self.layer(left.relu())
            left.retain_grad()
            kept.append(left)
            return torch.tanh(torch.cat([left, right], 1))

    model, x = Half().double(), torch.randn(5, 6, dtype=torch.float64)
    assert spp(model, x).curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(model, x, 0), rel=1e-12)


class Checkpointed(nn.Module):
    """Each block twice over in one checkpoint, the last two within another one if ``nested``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = Net(), how

    def again(self, index, x, kept):
        for _ in range(2):
            x = torch.tanh(self.net.blocks[index](x))
            if kept is not None:
                x.retain_grad()
                kept.append(x)
        return 1.5 * x

    def inner(self, index, x, kept):
        if self.how == "nested":
            return checkpoint(self.again, index, x, kept, use_reentrant=True)
        return self.again(index, x, kept)

    def outer(self, x, kept):
        return self.inner(2, self.inner(1, x, kept), kept)

    def forward(self, x):
        x = self.net.stem(x)
        if self.how == "plain":
            return self.net.head(self.outer(self.again(0, x, None), None))
        reentrant = self.how != "not re-entrant"
        x = checkpoint(self.again, 0, x, None, use_reentrant=reentrant)
        return self.net.head(checkpoint(self.outer, x, None, use_reentrant=reentrant))


@pytest.mark.parametrize("how", ["re-entrant", "nested", "not re-entrant"])
def test_checkpoints(how):
    expected = spp(Checkpointed("plain"), batch()).curve("avg_sq_gradient")[1:]
    assert len(set(expected)) == 6
    model = Checkpointed(how)
    leaf = model.net.blocks[0].first.weight
    leaf.grad = before = torch.ones_like(leaf)
    calls: list[str] = []
    handles = [
        leaf.register_hook(lambda _: calls.append("hook")),
        leaf.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated")),
    ]
    assert spp(model, batch()).curve("avg_sq_gradient")[1:] == pytest.approx(expected, rel=1e-12)
    assert leaf.grad is before
    assert torch.equal(before, torch.ones_like(leaf))
    assert not calls
    assert all(p.grad is None for p in model.parameters() if p is not leaf)
    model(batch().requires_grad_()).sum().backward()
    assert calls == ["hook", "accumulated"]
    for handle in handles:
        handle.remove()


class Reversible(torch.autograd.Function):
    """y = x + f(x), whose backward runs the forward again, as a reversible block does."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.save_for_backward(x)
        ctx.block = block
        return 1.0 * (block(x))

    @staticmethod
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(1.0 * ctx.block(x), gradients[0])
        return x.grad, None


class Swish(torch.autograd.Function):
    """A function with a backward of its own, which adds too."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate + gradient * (x * gate * (1 - gate))


def test_functions_whose_backward_runs_the_forward_again():
    class Reversed(nn.Module):
        def __init__(self, *, reverse: bool) -> None:
            super().__init__()
            self.net, self.reverse = Net(), reverse

        def forward(self, x):
            x = self.net.stem(x)
            for block in self.net.blocks:
                x = Swish.apply(Reversible.apply(x, block) if self.reverse else 1.0 * block(x))
            return self.net.head(x)

    expected = spp(Reversed(reverse=False), batch()).curve("avg_sq_gradient")[1:]
    model = Reversed(reverse=True)
    assert spp(model, batch()).curve("avg_sq_gradient")[1:] == pytest.approx(expected, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


class Outputs(nn.Module):
    """Two heads, in whatever the model returns them."""

    def __init__(self, form) -> None:
        super().__init__()
        self.net, self.form = Net(), form

    def forward(self, x):
        return self.form(self.net(x), x)


FORMS = {
    "tuple": lambda y, x: (y, y.argmax(1)),
    "dict": lambda y, x: {"classes": y.argmax(1), "logits": y, "loss": None},
    "nested": lambda y, x: [{"y": (y,)}, 3],
    "the input too": lambda y, x: (y, x),
    "complex": lambda y, x: torch.view_as_complex(y[:, None].contiguous()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_whatever_the_model_returns(form):
    expected = by_hand(Net(), batch(), 0)
    assert spp(Outputs(form), batch()).curve("avg_sq_gradient")[1:] == pytest.approx(expected, rel=1e-12)


def test_through_complex_numbers():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6, dtype=torch.float64)
            self.factor = nn.Parameter(torch.randn(4, dtype=torch.complex128))

        def forward(self, x, kept=None):
            for _ in range(2):
                x = x + self.layer(x)
                if kept is not None:
                    x.retain_grad()
                    kept.append(x)
                x = torch.fft.irfft(torch.fft.rfft(x) * self.factor, n=6)
            return x

    model, x = Spectral(), torch.randn(5, 6, dtype=torch.float64)
    assert spp(model, x).curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(model, x, 0), rel=1e-12)


def test_one_tensor_used_twice():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x, kept=None):
            y = self.net(x, kept)
            return y + y

    model = Doubled()
    assert measured(model) == pytest.approx(by_hand(model, batch(), 0), rel=1e-12)


def test_from_token_numbers():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.net = nn.Embedding(9, 5).double(), Net()

        def forward(self, x, kept=None):
            return self.net(self.table(x), kept)

    model, x = Tokens(), torch.randint(9, (7, 3), generator=torch.Generator().manual_seed(0))
    assert spp(model, x).curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(model, x, 0), rel=1e-12)


class NoGradient(nn.Module):
    def __init__(self, context, *, last: bool) -> None:
        super().__init__()
        self.net, self.context, self.last = Net(), context, last

    def forward(self, x):
        with self.context():
            y = self.net.blocks[0](self.net.stem(x))
        return self.net.blocks[1](y) if self.last else y


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise LookupError("no derivative")


def wandering(x, net):
    for _ in range(1 + torch.is_grad_enabled()):
        x = net.blocks[0](x)
    return x


def out_of_memory(x, net):
    if torch.is_grad_enabled():
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")
    return net.blocks[0](x)


class Called(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.net, self.function = Net(), function

    def forward(self, x):
        return self.function(self.net.stem(x), self.net)


def zero_head_behind_a_checkpoint() -> nn.Module:
    model = Checkpointed("re-entrant")
    nn.init.zeros_(model.net.head.weight)
    return model


UNMEASURED = {
    "zero head": (zero_head_behind_a_checkpoint(), "does not change with any point"),
    "no_grad": (NoGradient(torch.no_grad, last=False), "torch.no_grad"),
    "inference_mode": (NoGradient(torch.inference_mode, last=True), "inference"),
    "no derivative": (Called(lambda x, net: Broken.apply(net.blocks[0](x))), "LookupError: no derivative"),
    "integers alone": (Called(lambda x, net: net.blocks[0](x).argmax(1)), "integers alone"),
    "another way": (Called(wandering), "(1 points, then 2)"),
    "memory": (Called(out_of_memory), "does not fit into memory (tried to allocate 3 GiB)"),
}


@pytest.mark.parametrize(("model", "reason"), UNMEASURED.values(), ids=UNMEASURED)
def test_the_reason_why_there_is_none(model, reason):
    result = spp(model, batch())
    assert set(result.curve("avg_sq_gradient")) == {None}
    note = result.configuration["gradient"]
    assert note.startswith("not measured: ")
    assert reason in note
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_zero_head_is_looked_past():
    model, headless = Net(), Net()
    headless.head = nn.Identity()
    nn.init.zeros_(model.head.weight)
    result = spp(model, batch())
    assert result.configuration["gradient"].startswith("of the last point")
    assert result.curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(headless, batch(), 0), rel=1e-12)


def test_a_part_without_gradients_has_none_and_the_rest_has():
    curve = spp(NoGradient(torch.no_grad, last=True), batch()).curve("avg_sq_gradient")
    assert curve[1] is None
    assert curve[2] is not None


def test_under_inference_mode_outside():
    model = Net()
    expected = by_hand(model, batch(), 0)
    with torch.inference_mode():
        assert measured(model) == pytest.approx(expected, rel=1e-12)


def test_too_little_memory_is_seen_before_it_is_full(monkeypatch):
    from normfree.signal import gradients as implementation

    monkeypatch.setattr(implementation, "CHECK_EVERY", 1)
    monkeypatch.setattr(implementation, "available_memory", lambda: 500)
    assert "does not fit into memory" in spp(Net(), batch()).configuration["gradient"]
    monkeypatch.setattr(implementation, "available_memory", lambda: 2000)
    assert spp(Net(), batch()).configuration["gradient"] is True


def test_leaves_that_are_no_parameters_keep_their_gradients():
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Checkpointed("re-entrant")
            self.prompt = torch.ones(5, dtype=torch.float64, requires_grad=True)

        def forward(self, x):
            return self.inner(x * self.prompt)

    model = Prompted()
    model.prompt.grad = before = torch.full((5,), 2.0, dtype=torch.float64)
    state = copy.deepcopy(model.inner.state_dict())
    assert spp(model, batch()).configuration["gradient"] is True
    assert model.prompt.grad is before
    assert torch.equal(before, torch.full((5,), 2.0, dtype=torch.float64))
    assert all(torch.equal(value, state[name]) for name, value in model.inner.state_dict().items())


def test_where_no_gradient_arrives_it_is_said():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
            self.back = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x):
            return self.back(self.front(x).detach())

    whole, cut = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), Cut()
    x = torch.randn(64, 16)
    assert not [f for f in spp(whole, x).findings if "no gradient arrives" in f.message]
    found = [f for f in spp(cut, x).findings if "no gradient arrives" in f.message]
    assert [(f.kind, f.severity) for f in found] == [("gradient_vanishing", "info")]
    assert "front.0" in found[0].message and "back.0" in found[0].message
    assert not [f for f in spp(cut, x, gradient=False).findings if "no gradient arrives" in f.message]
