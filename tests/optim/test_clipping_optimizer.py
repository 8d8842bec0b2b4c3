"""The clipping wrapper stands in for any optimizer: schedulers, closures, scalers, checkpoints, Fabric."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from normfree.optim import AdaptiveGradientClipping, clip_grad_adaptive_, nesterov_sgd, warmup_cosine

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def data(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.arange(count) % 3


def loss_of(model, images, labels):
    return F.cross_entropy(model(images), labels)


def assert_same(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_clipping_by_hand_before_each_step(kind):
    wrapped, by_hand = net(), net()
    clipping = AdaptiveGradientClipping(OPTIMIZERS[kind](wrapped.parameters()), wrapped)
    plain = OPTIMIZERS[kind](by_hand.parameters())
    images, labels = data()

    def closure(model, clip):
        model.zero_grad()
        loss = loss_of(model, images, labels)
        loss.backward()
        if clip:
            clip_grad_adaptive_(model)
        return loss

    for _ in range(3):
        losses = clipping.step(lambda: closure(wrapped, False)), plain.step(lambda: closure(by_hand, True))
        assert losses[0] == losses[1]
    if kind != "lbfgs":
        closure(wrapped, False), closure(by_hand, True)
        clipping.step(), plain.step()
    assert_same(wrapped, by_hand)
    assert 0 < clipping.clip_fraction <= 1


def test_micro_batches_are_clipped_once_on_their_sum():
    whole, split = net(), net()
    images, labels = data()
    first = AdaptiveGradientClipping(torch.optim.SGD(whole.parameters(), 0.1), whole)
    second = AdaptiveGradientClipping(torch.optim.SGD(split.parameters(), 0.1), split)
    loss_of(whole, images, labels).backward()
    for start in range(0, 8, 2):
        (loss_of(split, images[start : start + 2], labels[start : start + 2]) / 4).backward()
    first.step(), second.step()
    assert first.clip_fraction == second.clip_fraction > 0
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["sgd", "adamw fused"])
def test_a_gradient_scaler_unscales_before_the_clipping(kind):
    scaled, plain = net(), net()
    images, labels = data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AdaptiveGradientClipping(OPTIMIZERS[kind](scaled.parameters()), scaled)
    scaler.scale(loss_of(scaled, images, labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    other = AdaptiveGradientClipping(OPTIMIZERS[kind](plain.parameters()), plain)
    loss_of(plain, images, labels).backward()
    other.step()
    assert optimizer.clip_fraction == other.clip_fraction
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    before = copy.deepcopy(scaled)
    optimizer.zero_grad()
    scaler.scale(loss_of(scaled, images * torch.inf, labels)).backward()
    scaler.step(optimizer)  # finds what is not finite, and does not step
    assert_same(scaled, before)


def test_schedulers_and_hooks():
    model = net()
    optimizer = AdaptiveGradientClipping(nesterov_sgd(model, 1.0), model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = warmup_cosine(optimizer, steps=4, warmup_steps=2)
    assert isinstance(schedule, LambdaLR)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(optimizer.param_groups[0]["lr"]))
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert called == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.0
    ReduceLROnPlateau(optimizer).step(1.0)


def test_state_round_trip_is_exact_and_that_of_the_wrapped_optimizer():
    model, images, labels = net(), *data()
    optimizer = AdaptiveGradientClipping(OPTIMIZERS["sgd"](model.parameters()), model)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, images, labels).backward()
            optimizer.step()

    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = net(seed=5)
    resumed.load_state_dict(saved["model"])
    other = AdaptiveGradientClipping(OPTIMIZERS["sgd"](resumed.parameters()), resumed)
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3), train(resumed, other, 3)
    assert_same(model, resumed)
    OPTIMIZERS["sgd"](resumed.parameters()).load_state_dict(saved["optimizer"])  # a run may stop clipping


def test_it_copies_with_its_model():
    model, images, labels = net(), *data()
    optimizer = AdaptiveGradientClipping(OPTIMIZERS["sgd"](model.parameters()), model)
    twin, other = copy.deepcopy((model, optimizer))
    for one, stepping in ((model, optimizer), (twin, other)):
        loss_of(one, images, labels).backward()
        stepping.step()
    assert_same(model, twin)
    assert "clip_factor=0.01" in repr(other) and "SGD" in repr(other)


def test_only_what_the_optimizer_steps_is_clipped_also_what_is_added_later():
    model, images, labels = net(), *data()
    optimizer = AdaptiveGradientClipping(torch.optim.SGD(model[0].parameters(), 0.0), model, clip_factor=1e-6)
    loss_of(model, images, labels).backward()
    kept = model[3].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[3].weight.grad, kept)
    optimizer.add_param_group({"params": [model[3].weight]})
    optimizer.step()
    assert not torch.equal(model[3].weight.grad, kept)


def test_a_parameter_that_takes_another_ones_place_is_clipped():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = AdaptiveGradientClipping(torch.optim.SGD(model.parameters(), 1.0), model, 0.01)
    fresh = nn.Parameter(torch.ones(4, 4))
    optimizer.param_groups[0]["params"][0] = fresh
    model[0].weight = fresh
    fresh.grad = torch.full((4, 4), 1e6)
    optimizer.step()
    torch.testing.assert_close((1 - fresh).norm(dim=1), torch.full((4,), 0.01 * 2))


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"SGD.*6 parameters that the model does not have"):
        AdaptiveGradientClipping(torch.optim.SGD(net().parameters(), 0.1), net())


def test_fabric_takes_it():
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model, twin, images, labels = net(), net(), *data()
    plain = AdaptiveGradientClipping(OPTIMIZERS["sgd"](twin.parameters()), twin)
    inner = AdaptiveGradientClipping(OPTIMIZERS["sgd"](model.parameters()), model)
    wrapped, optimizer = fabric.setup(model, inner)
    schedule = warmup_cosine(optimizer, steps=4)
    for _ in range(2):
        optimizer.zero_grad(), plain.zero_grad()
        fabric.backward(loss_of(wrapped, images, labels))
        loss_of(twin, images, labels).backward()
        optimizer.step(), plain.step()
        assert optimizer.clip_fraction == plain.clip_fraction
    schedule.step()
    assert inner.optimizer.param_groups[0]["lr"] < 0.1
    assert_same(model, twin)
    optimizer.load_state_dict(optimizer.state_dict())
