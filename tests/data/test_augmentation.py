"""Batched augmentation against what it does to one image at a time, and the draws it makes."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms import v2

from normfree.data import Augmentation, AugmentationConfig, Standardization
from normfree.data.augmentation import (
    CentreCrop,
    TrainingCrop,
    cutmix,
    draw_boxes,
    flip,
    mixup,
    rand_augment,
    seed_of,
    shift,
    zoom,
)
from normfree.data.order import generator

PLAIN = AugmentationConfig(crop="none", flip=False)


def batch(count=6, size=10, channels=3):
    generator = torch.Generator().manual_seed(0)
    shape = (count, size, size, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def augmentation(config, classes=5, **options):
    return Augmentation(config, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), num_classes=classes, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shift_is_a_crop_of_the_padded_image(layout):
    images = batch().contiguous(memory_format=layout)
    offsets = torch.tensor([[0, 1, 2, 3, 4, 3], [4, 3, 2, 1, 0, 0]])
    moved = shift(images, offsets, 2)
    padded = functional.pad(images, (2, 2, 2, 2))
    for n, (row, column) in enumerate(offsets.T.tolist()):
        assert torch.equal(moved[n], padded[n, :, row : row + 10, column : column + 10])
    assert torch.equal(moved[2], images[2])


def test_a_flip_mirrors_the_chosen_ones():
    images = batch()
    which = torch.tensor([True, False, True, False, False, True])
    mirrored = flip(images, which)
    for n in range(6):
        assert torch.equal(mirrored[n], images[n].flip(2) if which[n] else images[n])
    assert torch.equal(images, batch())  # the caller's images are untouched


def test_standardization_is_torchvisions():
    images = batch()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    for given in (images, images / 255):
        assert torch.allclose(Standardization(mean, std)(given), wanted, atol=1e-5)


def test_a_box_is_zoomed_as_by_interpolation():
    """A box of whole pixels in the middle, against torch's own resize of it (borders of the box aside)."""
    images = batch(size=16) / 255
    found = zoom(images, torch.full((6, 2), 0.5), torch.full((6, 2), 0.5))
    wanted = functional.interpolate(images[:, :, 4:12, 4:12], size=16, mode="bilinear", align_corners=False)
    assert torch.allclose(found[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], atol=1e-5)
    whole = zoom(images, torch.full((6, 2), 0.5), torch.ones(6, 2))
    assert torch.allclose(whole, images, atol=1e-5)


def test_boxes_lie_inside_and_have_the_areas_asked_for():
    config = AugmentationConfig(area=(0.25, 0.81))
    centre, size = draw_boxes(torch.zeros(2000, 1, 20, 30), config, generator(1))
    assert ((centre - size / 2) >= -1e-6).all() and ((centre + size / 2) <= 1 + 1e-6).all()
    area = size.prod(1)
    assert area.max() <= 0.81 + 1e-6
    aspect = size[:, 0] * 30 / (size[:, 1] * 20)
    free = size.max(1).values < 1  # not narrowed to the image
    assert aspect[free].min() >= 3 / 4 - 1e-4 and aspect[free].max() <= 4 / 3 + 1e-4
    # areas are uniform, and few boxes are narrowed: mean 0.53, its standard error 0.16 / sqrt(2000) = 0.004
    assert abs(float(area.mean()) - 0.53) < 0.02


def test_mixup_blends_pairs_and_their_targets():
    images, targets = torch.rand(4, 3, 5, 5), torch.eye(4)
    share = torch.tensor([1.0, 0.75, 0.5, 0.0])
    mixed, soft = mixup(images, targets, share)
    for n in range(4):
        other = (n + 1) % 4
        assert torch.allclose(mixed[n], share[n] * images[n] + (1 - share[n]) * images[other], atol=1e-6)
        assert torch.allclose(soft[n], share[n] * targets[n] + (1 - share[n]) * targets[other])


def test_cutmix_pastes_a_box_and_weighs_by_its_area():
    images, targets = torch.rand(64, 3, 20, 20), torch.eye(64)
    share, centre = torch.rand(64), torch.rand(64, 2)
    mixed, soft = cutmix(images, targets, share, centre)
    for n in range(64):
        other = (n + 1) % 64
        pasted = (mixed[n] == images[other]).all(0)
        kept = (mixed[n] == images[n]).all(0)
        assert (pasted ^ kept).all()
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        assert pasted.sum() == len(rows) * len(columns)  # a rectangle
        assert torch.isclose(soft[n, other], pasted.float().mean(), atol=1e-6)
        # clipped at the borders, it is never larger than asked for, but for the rounding of its four sides
        assert pasted.float().mean() <= ((1 - share[n]).sqrt() + 1 / 20) ** 2
    assert torch.allclose(soft.sum(1), torch.ones(64))


def test_mixup_takes_the_first_half_and_cutmix_the_second():
    images, targets = batch(8, 16), torch.arange(8) % 5
    plain, _ = augmentation(PLAIN)(images, targets, step=0)
    both, soft = augmentation(AugmentationConfig(crop="none", flip=False, mixup=1.0, cutmix=1.0))(
        images, targets, step=0
    )
    assert soft.shape == (8, 5) and torch.allclose(soft.sum(1), torch.ones(8))
    sources = (both == plain) | (both == plain.roll(-1, 0))
    assert not sources[:3].all(dim=(1, 2, 3)).any()  # blends
    assert sources[4:7].all()  # pixels of one image or the other
    only, _ = augmentation(AugmentationConfig(crop="none", flip=False, cutmix=1.0))(images, targets, step=0)
    assert ((only == plain) | (only == plain.roll(-1, 0))).all()
    assert not torch.equal(only[0], plain[0]) or not torch.equal(only[1], plain[1])


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_shares_are_drawn_from_the_beta_distribution(method, beta):
    """Of two classes in turn each partner is of the other, and a target says its share; CutMix's is what is kept."""
    count = 8000
    config = AugmentationConfig(crop="none", flip=False, **{method: beta})
    module = Augmentation(config, mean=(0.0,), std=(1.0,), num_classes=2)
    targets = torch.arange(count) % 2
    _, soft = module(torch.zeros(count, 1, 16, 16, dtype=torch.uint8), targets, step=0)
    share = soft[torch.arange(count), targets].double()
    if method == "mixup":
        variance = 1 / (4 * (2 * beta + 1))
        assert abs(float(share.mean()) - 0.5) < 5 * (variance / count) ** 0.5
        assert abs(float(share.var()) / variance - 1) < 0.05
    else:  # clipped at the borders, a box covers less than was asked for
        assert 0.5 < float(share.mean()) < 0.75 and float(share.min()) < 0.1 and float(share.max()) == 1


def test_randaugment_has_the_layers_and_strength_asked_for():
    chosen = rand_augment(AugmentationConfig(randaugment_layers=4, randaugment_magnitude=5))
    assert (chosen.num_ops, chosen.magnitude, chosen.num_magnitude_bins) == (4, 15, 31)  # the middle of the scale
    images, targets = batch(64, 16), torch.zeros(64, dtype=torch.int64)
    plain = augmentation(PLAIN)(images, targets, step=0)[0]
    changes = []
    for magnitude in (0, 5, 10):
        config = AugmentationConfig(crop="none", flip=False, randaugment_layers=2, randaugment_magnitude=magnitude)
        varied = augmentation(config)(images, targets, step=0)[0]
        changes.append(float((varied - plain).abs().mean()))
    assert changes[0] < changes[1] < changes[2]
    alike = images[:1].expand(64, -1, -1, -1)  # each image has a draw of its own
    assert len(torch.unique(augmentation(config)(alike, targets, step=0)[0].flatten(1), dim=0)) > 32


@pytest.mark.parametrize("crop", ["inception", "shift", "none"])
@pytest.mark.parametrize("count", [1, 7])
def test_every_form_of_batch(crop, count):
    config = AugmentationConfig(crop=crop, mixup=0.2, cutmix=1.0, randaugment_layers=1)
    images = batch(count)
    found, soft = augmentation(config)(images, torch.zeros(count, dtype=torch.int64), step=3)
    assert found.shape == (count, 3, 10, 10) and found.dtype == torch.float32
    assert found.isfinite().all() and torch.allclose(soft.sum(1), torch.ones(count))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_draws_come_from_seed_rank_and_step_alone():
    config = AugmentationConfig(crop="shift", mixup=0.2, cutmix=1.0, randaugment_layers=2)
    images, targets = batch(), torch.arange(6) % 5
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = augmentation(config, seed=3)(images, targets, step=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = augmentation(config, seed=3)(images, targets, step=7)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for options, step in (({"seed": 3}, 8), ({"seed": 4}, 7), ({"seed": 3, "rank": 1}, 7)):
        assert not torch.equal(augmentation(config, **options)(images, targets, step=step)[0], one[0])


def test_half_of_the_images_are_flipped_and_shifts_are_uniform():
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 0] = 255
    config = AugmentationConfig(crop="none")
    found, _ = Augmentation(config, mean=(0.0,), std=(1.0,), num_classes=2)(images, torch.zeros(4000).long(), step=0)
    share = float((found[:, 0, 1, 2] == 1).float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    config = AugmentationConfig(crop="shift", shift=2, flip=False)
    found, _ = Augmentation(config, mean=(0.0,), std=(1.0,), num_classes=2)(images, torch.zeros(4000).long(), step=0)
    where = found[:, 0].mean(0)
    assert (where[2:7, 2:7] - 1 / 25).abs().max() < 5 * (0.04 * 0.96 / 4000) ** 0.5
    assert abs(float(where[2:7, 2:7].sum()) - 1) < 1e-4


def test_a_centre_crop_is_the_middle_of_the_shorter_side():
    from PIL import Image

    ramp = np.tile(np.arange(256, dtype=np.uint8), (128, 1))
    image = Image.fromarray(np.stack([ramp] * 3, 2))
    found = np.asarray(CentreCrop(112, 0.875)(image))  # 128 → 128, then the middle 112
    assert np.array_equal(found, np.asarray(image)[8:120, 72:184])
    assert CentreCrop(56, 0.875)(image).size == (56, 56)
    small = image.crop((0, 0, 32, 32))
    assert CentreCrop(32, 0.875)(small) is small


def test_an_images_crop_comes_from_its_key_alone():
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    crop = TrainingCrop(16, AugmentationConfig(randaugment_layers=2))
    with torch.random.fork_rng(devices=[]):
        one, other, again = (np.asarray(crop(image, key)) for key in ((0, 0, 5), (0, 1, 5), (0, 0, 5)))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_a_seed_is_of_the_numbers_alone():
    keys = [(0,), (0, 1), (1, 0), (0, 1, 0), (2**32,), (2**63 - 1, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(np.int64(0), np.int64(1)) == seed_of(0, 1)
    assert seed_of(0) == 0x4E04DFC298310056  # runs made today resume tomorrow


def test_a_single_image_is_no_batch():
    with pytest.raises(ValueError, match=r"images=\(3, 10, 10\).*unsqueeze"):
        augmentation(PLAIN)(batch()[0], torch.zeros(1), step=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop", "random"),
        ("area", (0.5, 0.1)),
        ("area", (0.5, 1.5)),
        ("aspect", (0.0, 1.0)),
        ("shift", -1),
        ("randaugment_magnitude", 15),
        ("mixup", -0.2),
        ("flip", 1),
    ],
)
def test_the_config_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentationConfig(**{field: value})
