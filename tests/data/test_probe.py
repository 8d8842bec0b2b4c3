"""The images a model is listened to with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data import GaussianNoise, ImageFolder, Photographs, probe_named
from normfree.data.probe import SourceImages

SHAPE = (4, 3, 32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, mode in (("a.png", "RGB"), ("deep/b.JPG", "L"), ("deep/er/c.png", "RGBA")):
        channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
        pixels = generator.integers(0, 256, (40, 50, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("probe", [GaussianNoise(), Photographs()])
def test_batches_come_from_the_seed_alone(probe):
    state = torch.get_rng_state()
    first = list(probe.batches(SHAPE, count=2, seed=3))
    torch.manual_seed(99)
    again = list(probe.batches(SHAPE, count=2, seed=3))
    other = list(probe.batches(SHAPE, count=1, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    torch.set_rng_state(state)
    next(iter(probe.batches(SHAPE, count=1, seed=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_photographs_are_standardized_crops_of_both():
    batch = next(Photographs().batches((64, 3, 32, 32), count=1, seed=0))
    assert batch.shape == (64, 3, 32, 32)
    # ImageNet's own statistics are mean 0, deviation 1; two photographs are not all of it, but not far
    assert batch.mean().abs() < 1
    assert 0.3 < batch.std() < 2
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_a_folder_is_read_at_any_depth_and_colour(folder):
    probe = ImageFolder(folder)
    assert [file.name for file in probe.files] == ["a.png", "b.JPG", "c.png"]
    batches = list(probe.batches(SHAPE, count=2, seed=0))
    assert [batch.shape for batch in batches] == [torch.Size(SHAPE)] * 2
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert probe.describe() == {"kind": "folder", "folder": folder.name, "images": 3, **statistics}


def test_names(folder):
    assert isinstance(probe_named("gaussian"), GaussianNoise)
    assert isinstance(probe_named("photos"), Photographs)
    assert isinstance(probe_named(str(folder)), ImageFolder)


def test_a_source_of_training_images_is_standardized_as_in_training():
    probe = probe_named("digits")
    assert isinstance(probe, SourceImages) and probe.shape == (1, 8, 8)
    (everything,) = probe.batches((1442, 1, 8, 8), count=1, seed=0)
    assert everything.mean().abs() < 0.01
    assert everything.std() == pytest.approx(1, abs=0.01)
    first, again, other = (next(probe.batches((16, 1, 8, 8), count=1, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(list(probe.batches((1000, 1, 8, 8), count=3, seed=0))) == 3, "again from the start"
    half = next(probe.standardized([0.5], [1.0]).batches((1442, 1, 8, 8), count=1, seed=0))
    assert (float(half.min()), float(half.max())) == pytest.approx((-0.5, 0.5))
    assert probe.describe() == {"kind": "training images", "source": "digits"}
    statistics = {"mean": [0.5], "std": [1.0]}
    assert probe.standardized([0.5], [1.0]).describe() == {"kind": "training images", "source": "digits", **statistics}


@pytest.mark.parametrize("shape", [(2, 1, 8, 4), (2, 2, 8, 8), (2, 64), (2, 3, 8, 8)])
def test_a_source_fits_models_of_its_images_only(shape):
    with pytest.raises(ValueError, match=r"input='digits'.* images"):
        next(probe_named("digits").batches(shape, count=1, seed=0))


def test_no_such_source_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"input=.*no such folder.*digits.*or gaussian, photos"):
        probe_named(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"GIF89a"])
def test_a_damaged_image_is_named(folder, content):
    (folder / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png does not decode"):
        list(ImageFolder(folder).batches(SHAPE, count=2, seed=0))


def test_images_fit_models_of_images_only(folder):
    for shape in ((2, 2, 8, 8), (2, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match="gaussian"):
            next(ImageFolder(folder).batches(shape, count=1, seed=0))


def test_models_of_grey_images_get_grey_ones(folder):
    """Their mean over the colours, by the usual weights, standardized with the averages of the statistics."""
    colour = ImageFolder(folder).standardized((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    grey = next(colour.batches((3, 1, 8, 8), count=1, seed=0))
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    wanted = (next(colour.batches((3, 3, 8, 8), count=1, seed=0)) * weights).sum(1, keepdim=True)
    assert torch.allclose(grey, wanted, atol=0.02)
    usual = next(ImageFolder(folder).batches((3, 1, 8, 8), count=1, seed=0))
    assert torch.allclose(usual, (grey - 0.449) / 0.226, atol=1e-4)
    with pytest.raises(ValueError, match="3 channels"):
        next(ImageFolder(folder).standardized((0.5,), (0.5,)).batches((3, 3, 8, 8), count=1, seed=0))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    image = np.asarray(ImageFolder(tmp_path).load(0))
    assert image.shape == (64, 64, 3)
    # a ramp from black to white has its mean in the middle; clipped at 255 it would be white
    assert abs(image.mean() - 127.5) < 1


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 7, 64).reshape(8, 8).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff does not decode.*no known range"):
        ImageFolder(tmp_path).load(0)
