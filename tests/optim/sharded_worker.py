"""One of two ranks that clip and step one network, sharded and whole; run by ``test_sharding.py``."""

import copy
import os
import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from normfree.optim import AdaptiveGradientClipping, WeightAverage, clip_grad_adaptive_, muon_sgd


def network():
    """Sizes that two ranks cannot share evenly, a bias that one rank has none of, and a transposed convolution."""
    torch.manual_seed(0)
    layers = [
        nn.Conv1d(3, 5, 3, padding=1),
        nn.Conv1d(5, 1, 1),
        nn.ConvTranspose1d(1, 3, 3),
        nn.ConvTranspose1d(3, 2, 3),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 7))


def backward(model):
    torch.manual_seed(1)
    model(torch.randn(4, 3, 8)).square().sum().backward()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(sharded, plain, what):
    for (name, first), second in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        first, second = (first.grad, second.grad) if what == "grad" else (first, second)
        torch.testing.assert_close(whole(first), second, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def shard(model):
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def check_fully_shard():
    plain, sharded = network(), shard(network())
    backward(plain), backward(sharded)
    unclipped = copy.deepcopy(plain[0].weight.grad)
    factor = 0.3  # some units of the network are longer, some are not
    fractions = clip_grad_adaptive_(plain, factor).item(), clip_grad_adaptive_(sharded, factor).item()
    assert 0 < fractions[0] < 1 and abs(fractions[0] - fractions[1]) < 1e-6, fractions
    assert not torch.equal(unclipped, plain[0].weight.grad)
    assert_same(sharded, plain, "grad")
    averages = []
    for model in (plain, sharded):
        averages.append(WeightAverage(model, 0.5, module=shard(network()) if model is sharded else None))
        AdaptiveGradientClipping(torch.optim.SGD(model.parameters(), 0.1), model, 0.1).step()
        averages[-1].update()
    assert_same(sharded, plain, "weight")
    assert_same(averages[1].module, averages[0].module, "weight")
    with averages[1].applied():
        assert_same(sharded, averages[0].module, "weight")
    assert_same(sharded, plain, "weight")
    refused(lambda: WeightAverage(sharded), "pass module=")


def check_muon():
    """Ranks that divide the matrices among them take the step that one takes alone, whole or sharded."""
    plain, divided, sharded = network(), network(), shard(network())
    group = dist.group.WORLD
    optimizers = [muon_sgd(plain, 0.1), muon_sgd(divided, 0.1, process_group=group)]
    optimizers.append(muon_sgd(sharded, 0.1, process_group=group))
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    for _ in range(3):
        for model, optimizer in zip((plain, divided, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, plain.parameters(), strict=True))
    assert_same(divided, plain, "weight")
    assert_same(sharded, plain, "weight")


def check_placements(mesh):
    """Linear weights sharded over their inputs (units cut through), their outputs, and not at all."""
    for placement in (Shard(0), Shard(1), Shard(-1), Replicate()):
        torch.manual_seed(2)
        plain = nn.Linear(5, 3, bias=False)
        plain.weight.grad = torch.randn(3, 5) * torch.tensor([[0.1], [0.001], [1.0]])
        sharded = nn.Linear(5, 3, bias=False)
        sharded.weight = nn.Parameter(distribute_tensor(plain.weight.detach(), mesh, [placement]))
        sharded.weight.grad = distribute_tensor(plain.weight.grad.clone(), mesh, [placement])
        fractions = [clip_grad_adaptive_(model, 0.02, exclude=()).item() for model in (sharded, plain)]
        assert abs(fractions[0] - fractions[1]) < 1e-6 and 0 < fractions[0] < 1, (placement, fractions)
        assert_same(sharded, plain, "grad")


def check_refusals(mesh):
    layer = nn.ConvTranspose1d(4, 4, 3, groups=2, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    layer.weight.grad = layer.weight.detach().clone()
    refused(lambda: clip_grad_adaptive_(layer, exclude=()), "cut through its units")
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    linear.weight.grad = linear.weight.detach().redistribute(placements=[Replicate()])
    refused(lambda: clip_grad_adaptive_(linear, exclude=()), "sharded otherwise")


def refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    check_fully_shard()
    check_muon()
    check_placements(mesh)
    check_refusals(mesh)
    dist.destroy_process_group()
