"""CIFAR-10 and a thousand ImageNet images, where they lie beside the repository."""

from pathlib import Path

import pytest
import torch

from normfree.data import AugmentationConfig, DataConfig, open_evaluation, open_training

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def beside(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in the folder ../shared/data beside the repository")
    return str(DATA / name)


def test_cifar():
    """Only the test file is decoded: the training file takes seconds."""
    source = beside("cifar10") + "/test.parquet"
    data = open_evaluation(DataConfig(source=source, evaluation_split="test", mean=(0.5,) * 3, std=(0.2,) * 3))
    assert data.examples == 10_000 and data.class_names[:3] == ("airplane", "automobile", "bird")
    targets = torch.cat([targets for _, targets in data])
    assert torch.bincount(targets).tolist() == [1000] * 10
    images, _ = next(iter(data))
    assert images.shape == (128, 3, 32, 32)


def test_a_thousand_imagenet_images():
    source = beside("imagenet-sample")
    config = DataConfig(
        source=source, evaluation_split="train", batch_size=16, workers=2, augmentation=AugmentationConfig(mixup=0.2)
    )
    data = open_training(config)
    assert data.examples == data.num_classes == 1000
    assert data.image_shape == (3, 224, 224)
    images, targets = next(iter(data))
    assert images.shape == (16, 3, 224, 224) and images.dtype == torch.uint8
    images, soft = data.augmentation()(images, targets, step=0)
    assert images.mean().abs() < 0.6 and 0.7 < images.std() < 1.5  # standardized, of few images
    assert soft.shape == (16, 1000)
    images, _ = next(iter(open_evaluation(data.config)))
    assert images.shape == (16, 3, 224, 224)
