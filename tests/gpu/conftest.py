"""Where the tests of this folder run: on a GPU, or, to rehearse them, on what NORMFREE_TEST_DEVICE names."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    named = os.environ.get("NORMFREE_TEST_DEVICE", "cuda")
    if named == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here (NORMFREE_TEST_DEVICE=cpu rehearses)")
    return torch.device(named)


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions and products of float32 in float32, not in TF32, so that devices can be compared."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value
