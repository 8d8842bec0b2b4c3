"""Measured in threads, every model gives what it gives alone, and the process's random states are exact."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import normfree
from normfree.signal import spp


class Noisy(nn.Module):
    """Draws from every generator, and counts."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm, self.calls, self.cache = nn.BatchNorm1d(6), 0, []

    def forward(self, x):
        self.calls += 1
        self.cache.append(x)
        for layer in self.layers:
            time.sleep(0.001)  # another thread's turn, if there were no order
            x = x + layer(self.norm(x)) * (1 + 0.5 * random.random() + np.random.rand()) + 0.1 * torch.randn(6)
        return x


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def measured(model):
    return spp(model, torch.ones(8, 6).cumsum(0).cumsum(1), mode="train", seed=3).to_dict()


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_in_two_threads_as_alone(shared):
    models = [Noisy(0), Noisy(0 if shared else 1)]
    alone = [measured(model) for model in models]
    models = [models[0]] * 2 if shared else models
    before = states()
    start = threading.Barrier(4)

    def work(model):
        start.wait(10)
        return measured(model)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, models * 2))
    assert found == alone * 2
    assert states() == before
    for model in models:
        assert (model.calls, model.cache, model.training) == (0, [], True)
        assert model.norm.num_batches_tracked == 0


def test_a_failure_in_one_thread_leaves_the_other_alone():
    model, alone, narrow = Noisy(0), measured(Noisy(0)), nn.Linear(5, 5)
    before = states()

    def fail(_):
        with pytest.raises(ValueError, match="failed on an input"):
            spp(narrow, torch.ones(2, 6))

    with ThreadPoolExecutor(4) as pool:
        failing = [pool.submit(fail, number) for number in range(6)]
        assert pool.submit(measured, model).result() == alone
        assert [one.result() for one in failing] == [None] * 6
    assert states() == before


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_conversions_in_two_threads_as_alone(start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def convert(seed):
        converted = normfree.convert(model, IMAGES, start=start, seed=seed)
        return {name: tensor.tolist() for name, tensor in converted.state_dict().items()}

    alone, before = [convert(seed) for seed in range(4)], states()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(convert, range(4))) == alone
    assert states() == before


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Asks(nn.Module):
    """A forward that measures a model."""

    def __init__(self, other=None):
        super().__init__()
        self.layer, self.other, self.answers = nn.Linear(6, 6), [other], []

    def forward(self, x):
        self.answers.append(spp(self.other[0] or self, torch.ones(2, 6)).to_dict())
        return x + self.layer(x)


def test_a_model_that_measures_itself_is_told():
    with pytest.raises(ValueError, match="Asks is being measured already"):
        spp(Asks(), torch.ones(2, 6))
    hooked = nn.Sequential(nn.Linear(6, 6))
    hooked.register_forward_hook(lambda module, inputs, output: spp(module, torch.ones(2, 6)) and None)
    with pytest.raises(ValueError, match="Sequential is being measured already"):
        spp(hooked, torch.ones(2, 6))
    assert len(spp(nn.Linear(6, 6), torch.ones(2, 6)).blocks) == 1, "the next is measured"


def test_another_model_may_be_measured_meanwhile():
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    alone = spp(other, torch.ones(2, 6)).to_dict()
    asks, seen = Asks(other), []
    asks.register_forward_hook(lambda module, inputs, output: seen.append(module.answers[-1]))
    asks(torch.ones(2, 6))  # not measured itself
    assert seen == [alone]
    assert spp(asks, torch.ones(2, 6), gradient=False).blocks
    assert (seen, asks.answers) == ([alone], [alone]), "what the measured forward noted is gone"


class Measures(Dataset):
    """A data set whose items take a turn of their own, in the workers."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((6,), normfree.gamma(nn.Softsign()) + index)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_take_a_turn_do_not_wait_for_the_measurement(workers):
    result = spp(nn.Linear(6, 6), DataLoader(Measures(), batch_size=2, num_workers=workers))
    assert result.input["batches"] == 2
