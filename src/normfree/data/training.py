"""Batches to train on: an endless order of epochs that can be left and taken up again at any step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from normfree.common.checks import invalid
from normfree.data.augmentation import Augmentation
from normfree.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from normfree.data.feeds import Feed, MemoryFeed, StreamFeed, TableFeed
from normfree.data.memory import Pixels, check_failures, decoded, digits
from normfree.data.opened import open_split, resolved
from normfree.data.order import Share, check_rank


class TrainingData:
    """Batches of one rank, epoch after epoch.

    Iterating gives the rest of the current epoch, ``(images, targets)``: uint8 [N, C, H, W], channels last in
    memory, and int64 [N], both on the CPU; :meth:`augmentation` takes them further. Then the next epoch begins.
    Order and augmentation depend on (seed, epoch, number of the example) alone: neither the number of workers
    nor a restart changes a bit.

    Args:
        feed: where batches come from.
        share: this rank's part.
        config: resolved.
        class_names: of the targets.
    """

    def __init__(self, feed: Feed, share: Share, config: DataConfig, class_names: tuple[str, ...]) -> None:
        self.feed, self.share, self.config, self.class_names = feed, share, config, class_names
        self.epoch, self.step = 0, 0
        self.bad_images: dict[str, str] = {}
        """Reason by name of each damaged image met so far."""
        self._place: Any = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """1 or 3."""
        return self.config.channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.channels, self.config.size, self.config.size

    @property
    def examples(self) -> int:
        """Examples of an epoch before the incomplete last step is dropped, over all ranks."""
        return self.share.examples

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for each rank."""
        return self.share.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, place in self.feed.batches(self.epoch, self.step, self._place):
            check_failures(batch, self.config)
            self.bad_images.update(batch.failures)
            if not len(batch.images):
                rule = f"none of the {len(batch.failures)} images of a batch decodes, {batch.failures[0][0]} first"
                raise invalid("source", self.config.source, rule, "mend the files")
            self.step, self._place = self.step + 1, place
            yield batch.images, batch.targets
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.step, self._place = epoch, 0, None

    def augmentation(self) -> Augmentation:
        """What is left to do to a batch, on any device."""
        config, (mean, std) = self.config.augmentation, self.config.statistics
        if not isinstance(self.feed, MemoryFeed):  # the workers have done their part
            config = replace(config, crop="none" if config.crop == "inception" else config.crop, randaugment_layers=0)
        return Augmentation(
            config,
            mean=mean,
            std=std,
            num_classes=self.num_classes,
            seed=self.config.seed,
            rank=self.share.rank,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, after the last one that was given out."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "place": self._place,
            "share": asdict(self.share),
            "bad_images": dict(self.bad_images),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a :meth:`state_dict` was taken, with any number of workers.

        Raises:
            ValueError: if examples, batch size, seed or ranks are others than they were.
        """
        for name, value in asdict(self.share).items():
            own = name != "rank" or state["place"] is not None  # a place in a stream is its rank's alone
            if own and state["share"][name] != value:
                rule = f"the saved run had {state['share'][name]!r}, and its order cannot go on with another"
                raise invalid(name, value, rule, f"pass {name}={state['share'][name]!r}, or start anew")
        self.epoch, self.step, self._place = state["epoch"], state["step"], state["place"]
        self.bad_images = dict(state["bad_images"])


def open_training(config: DataConfig, *, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Open the training split of a config's source.

    Args:
        config: what to open.
        rank: of this process.
        world_size: number of processes; each gets as many batches as every other.

    Raises:
        ValueError: if there is no such source, split or column; if labels are missing; if the examples do not
            fill one batch of each rank; or naming the first damaged image of a set that is held in memory.
    """
    check_rank(rank, world_size)
    if config.source == "digits":
        pixels = digits(training=True)
        return _in_memory(pixels, with_digits(config), rank, world_size)
    opened = open_split(config, training=True)
    config = resolved(config, opened)
    if config.in_memory:
        pixels = decoded(opened.records() if opened.streamed else opened.table(), opened.class_names, config)
        return _in_memory(pixels, config, rank, world_size)
    if opened.examples is None:
        raise invalid("examples", None, "the streamed data do not say how many there are", "pass it")
    config = with_statistics(config, None)
    share = _share(opened.examples, config, rank, world_size)
    feed = (StreamFeed if opened.streamed else TableFeed)(opened, share, config)
    return TrainingData(feed, share, config, opened.class_names)


def with_digits(config: DataConfig) -> DataConfig:
    """The config with what the digits are; a ValueError where it asks for something else."""
    for name, value in (("image_size", 8), ("in_channels", 1), ("num_classes", 10)):
        if getattr(config, name) not in (None, value):
            raise invalid(name, getattr(config, name), f"the digits have {value}", "leave it out")
    return replace(config, image_size=8, in_channels=1, num_classes=10, in_memory=True)


def with_statistics(config: DataConfig, pixels: Pixels | None) -> DataConfig:
    """The config with means and deviations: given, of the pixels, or ImageNet's (its averages for grey)."""
    if config.mean is not None:
        return config
    if pixels is not None:
        mean, std = pixels.statistics()
    elif config.in_channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    return replace(config, mean=mean, std=std)


def _in_memory(pixels: Pixels, config: DataConfig, rank: int, world_size: int) -> TrainingData:
    config = with_statistics(config, pixels)
    share = _share(len(pixels), config, rank, world_size)
    data = TrainingData(MemoryFeed(pixels, share), share, config, pixels.class_names)
    data.bad_images.update(pixels.failures)
    return data


def _share(examples: int, config: DataConfig, rank: int, world_size: int) -> Share:
    return Share(examples=examples, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)
