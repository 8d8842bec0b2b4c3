"""The paper's recipes: named functions, each of which returns one frozen config.

The ResNets, NF-RegNets and NFNets are trained as their papers say; what a paper does not say is as in its
ResNets. ``cifar`` and ``digits`` are ours, for two cores and one accelerator: their branches start at gain 1
(docs/training.md tells why).

Sources: Brock, De, Smith, ICLR 2021 (arXiv 2101.08692), section 5 and appendix; Brock et al. 2021 (arXiv
2102.06171), appendix.
"""

from __future__ import annotations

from collections.abc import Callable

from normfree.data import AugmentationConfig, DataConfig
from normfree.models.nf_regnet import REGNET_SIZES
from normfree.models.nfnet import NFNET_SIZES
from normfree.train.config import OptimizerConfig, TrainConfig

IMAGENET = "hub:ILSVRC/imagenet-1k"
CIFAR10 = "hub:uoft-cs/cifar10"

IMAGENET_STEPS = 1000
"""Steps between checkpoints: a few minutes of one accelerator."""


def resnet_imagenet() -> TrainConfig:
    """ResNet-50 with BatchNorm on ImageNet, 90 epochs: the paper's baseline, unregularised."""
    return TrainConfig(
        name="resnet_imagenet",
        model="resnetv2_50",
        data=DataConfig(source=IMAGENET, image_size=224, workers=8),
        optimizer=OptimizerConfig(weight_decay=1e-4),
        checkpoint_every=IMAGENET_STEPS,
    )


def nf_resnet_imagenet() -> TrainConfig:
    """NF-ResNet-50 on ImageNet, 90 epochs, with the paper's dropout and stochastic depth."""
    return TrainConfig(
        name="nf_resnet_imagenet",
        model="nf_resnet50",
        data=DataConfig(source=IMAGENET, image_size=224, workers=8),
        optimizer=OptimizerConfig(weight_decay=5e-5),
        checkpoint_every=IMAGENET_STEPS,
    )


def nf_regnet_imagenet(level: int = 0) -> TrainConfig:
    """NF-RegNet-B0 on ImageNet, 360 epochs: MixUp, CutMix, weight averaging, a rate that ends at 0.001.

    Args:
        level: k of Bk, 0 to 8, which sets image sizes and weight decay.
    """
    *_, train_size, test_size, _ = REGNET_SIZES[level]
    return TrainConfig(
        name="nf_regnet_imagenet",
        model=f"nf_regnet_b{level}",
        data=DataConfig(
            source=IMAGENET,
            image_size=train_size,
            workers=8,
            augmentation=AugmentationConfig(mixup=0.2, cutmix=1.0),
        ),
        evaluation_size=test_size,
        optimizer=OptimizerConfig(
            learning_rate=0.4,
            reference_batch=None,
            final_learning_rate=0.001,
            weight_decay=round(5e-5 + 1e-5 * level, 6),
        ),
        epochs=360,
        average_decay=0.99999,
        checkpoint_every=IMAGENET_STEPS,
    )


def nfnet_imagenet(size: int = 0) -> TrainConfig:
    """NFNet-F0 on ImageNet, 360 epochs at batch 4096: adaptive gradient clipping, RandAugment, MixUp, CutMix.

    Args:
        size: k of Fk, 0 to 7, which sets image sizes and the strength of RandAugment.
    """
    train_size, test_size, _ = NFNET_SIZES[size]
    return TrainConfig(
        name="nfnet_imagenet",
        model=f"nfnet_f{size}",
        data=DataConfig(
            source=IMAGENET,
            image_size=train_size,
            workers=8,
            augmentation=AugmentationConfig(
                mixup=0.2, cutmix=1.0, randaugment_layers=4, randaugment_magnitude=5 if size == 0 else 10
            ),
        ),
        evaluation_size=test_size,
        optimizer=OptimizerConfig(weight_decay=2e-5, clip_factor=0.01),
        epochs=360,
        batch_size=4096,
        average_decay=0.99999,
        checkpoint_every=IMAGENET_STEPS,
    )


def cifar() -> TrainConfig:
    """NF-ResNet of 29 layers on CIFAR-10 (or any set of small images in memory), 30 epochs."""
    return TrainConfig(
        name="cifar",
        model="nf_resnet50:depths=(2,2,2,3),widths=(64,128,256,256),stem=cifar,alpha=0.5,skipinit_gain=1,"
        "drop_rate=0,stochdepth_rate=0",
        data=DataConfig(
            source=CIFAR10, batch_size=1024, augmentation=AugmentationConfig(crop="shift", shift=4, flip=True)
        ),
        optimizer=OptimizerConfig(
            learning_rate=0.2,
            reference_batch=128,
            weight_decay=5e-4,
            warmup_epochs=1,
            clip_norm=1.0,
            classifier_lr_scale=0.3,
        ),
        epochs=30,
        batch_size=128,
        label_smoothing=0.0,
    )


def digits() -> TrainConfig:
    """NF-ResNet of 14 layers on scikit-learn's 8x8 digits: no download, under a minute on two cores."""
    return TrainConfig(
        name="digits",
        model="nf_resnet50:depths=(1,1,1,1),widths=(64,128,256,256),stem=cifar,alpha=0.5,skipinit_gain=1,"
        "drop_rate=0,stochdepth_rate=0",
        data=DataConfig(
            source="digits", batch_size=1024, augmentation=AugmentationConfig(crop="shift", shift=1, flip=False)
        ),
        optimizer=OptimizerConfig(learning_rate=0.03, reference_batch=64, weight_decay=5e-4, warmup_epochs=2),
        epochs=30,
        batch_size=64,
        label_smoothing=0.0,
        evaluate_every=5,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (digits, cifar, resnet_imagenet, nf_resnet_imagenet, nf_regnet_imagenet, nfnet_imagenet)
}
"""By name, as ``normfree train`` knows them."""
