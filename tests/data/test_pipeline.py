"""The order of training: left and taken up again at any step, with any workers, not a bit changes."""

import gc
import itertools
import json
import multiprocessing
import re
import time
from dataclasses import replace

import pytest
import torch
from image_sets import encoded, write_parquet

from normfree.data import AugmentationConfig, DataConfig, open_evaluation, open_training

VARIED = AugmentationConfig(crop="inception", randaugment_layers=2, mixup=0.2, cutmix=1.0)


@pytest.fixture
def config(request, folder, parquet, shards):
    """A config of each way to read."""
    return {
        "memory": DataConfig(source=str(parquet), batch_size=4, augmentation=VARIED),
        "table": DataConfig(source=str(folder), batch_size=3, image_size=8, augmentation=VARIED),
        "stream": DataConfig(source=shards, batch_size=2, in_memory=False, shuffle_block=5, augmentation=VARIED),
        "parquet stream": DataConfig(
            source=str(parquet), batch_size=3, streaming=True, shuffle_block=4, augmentation=VARIED
        ),
        "folder stream": DataConfig(
            source=str(folder), batch_size=3, streaming=True, shuffle_block=3, image_size=8, augmentation=VARIED
        ),
    }[request.param]


ways = pytest.mark.parametrize(
    "config", ["memory", "table", "stream", "parquet stream", "folder stream"], indirect=True
)


def run(data, steps):
    """The next steps, as a training loop takes them: augmented batches, over the ends of epochs."""
    augmentation, found = data.augmentation(), []
    while len(found) < steps:
        for images, targets in data:
            step = data.epoch * data.steps_per_epoch + data.step
            found.append(augmentation(images, targets, step=step))
            if len(found) == steps:
                break
    return found


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


@ways
def test_every_step_can_be_taken_up_again(config):
    data = open_training(config)
    total = 2 * data.steps_per_epoch
    whole = run(data, total)
    assert not same(whole[: total // 2], whole[total // 2 :])
    for left_at in range(0, total, 3):
        first = open_training(config)
        run(first, left_at)
        state = json.loads(json.dumps(first.state_dict()))  # plain numbers, words and lists
        second = open_training(config)
        second.load_state_dict(state)
        assert same(run(second, total - left_at), whole[left_at:]), left_at


@ways
def test_workers_change_nothing(config):
    data = open_training(config)
    steps = data.steps_per_epoch + 2
    whole = run(data, steps)
    first = open_training(replace(config, workers=2))
    torch.manual_seed(5)
    assert same(run(first, 3), whole[:3])
    state = first.state_dict()
    second = open_training(replace(config, workers=1))
    second.load_state_dict(state)
    assert same(run(second, steps - 3), whole[3:])


@ways
def test_the_global_generator_is_neither_read_nor_moved(config):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = run(open_training(config), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(one, run(open_training(config), 4))


@ways
def test_a_seed_is_another_order(config):
    one = [targets for _, targets in open_training(config)]
    other = [targets for _, targets in open_training(replace(config, seed=7))]
    assert len(one) == len(other)
    assert not torch.equal(torch.cat(one), torch.cat(other))


@ways
def test_epochs_are_set_and_go_on_by_themselves(config):
    data = open_training(config)
    assert (data.epoch, data.step) == (0, 0)
    first = [targets for _, targets in data]
    assert (data.epoch, data.step) == (1, 0)
    second = [targets for _, targets in data]
    again = open_training(config)
    again.set_epoch(1)
    assert torch.equal(torch.cat([targets for _, targets in again]), torch.cat(second))
    data.set_epoch(0)
    next(iter(data))
    data.set_epoch(0)  # the current one: it stays where it is
    assert data.step == 1
    data.set_epoch(1)
    assert data.step == 0
    assert len(first) == len(second) == data.steps_per_epoch


def colours(images):
    """The red of each image, which is its number."""
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize("streaming", ["auto", True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_as_many_steps_and_different_images(parquet, shards, streaming, world_size):
    for source in (str(parquet), shards):
        config = DataConfig(source=source, batch_size=3, streaming=streaming, shuffle_block=4, image_size=12)
        ranks = [open_training(config, rank=rank, world_size=world_size) for rank in range(world_size)]
        seen = [[number for images, _ in data for number in colours(images)] for data in ranks]
        assert len({len(numbers) for numbers in seen}) == 1
        assert len(seen[0]) == 3 * ranks[0].steps_per_epoch
        if ranks[0].config.in_memory or world_size == 3:  # where a rank's shards give all its steps
            numbers = list(itertools.chain.from_iterable(seen))
            assert len(set(numbers)) == len(numbers)


def test_a_stream_sees_every_image_once_a_pass(shards):
    config = DataConfig(source=shards, batch_size=3, in_memory=False, shuffle_block=5)
    data = open_training(config)
    for _ in range(2):
        numbers = [number for images, _ in data for number in colours(images)]
        assert sorted(numbers) == list(range(21))
        assert numbers != sorted(numbers)


def test_a_run_of_another_shape_is_not_taken_up(parquet, shards):
    config = DataConfig(source=str(parquet), batch_size=4)
    state = open_training(config).state_dict()
    for changed in ({"batch_size": 2}, {"seed": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}=.*the saved run had"):
            open_training(replace(config, **changed)).load_state_dict(state)
    with pytest.raises(ValueError, match="world_size"):
        open_training(config, world_size=2).load_state_dict(state)
    open_training(replace(config, workers=1)).load_state_dict(state)
    two = open_training(replace(config, batch_size=2), world_size=2)
    open_training(replace(config, batch_size=2), rank=1, world_size=2).load_state_dict(two.state_dict())
    streamed = replace(config, source=shards, in_memory=False, batch_size=2)
    one = open_training(streamed, world_size=2)
    next(iter(one))
    with pytest.raises(ValueError, match="rank=1"):
        open_training(streamed, rank=1, world_size=2).load_state_dict(one.state_dict())


def test_evaluation_gives_every_image_once_over_ranks(folder, parquet, shards):
    for source in (str(folder), str(parquet), shards):
        for workers in (0, 2):
            config = DataConfig(
                source=source, evaluation_split="train", batch_size=4, image_size=12, workers=workers, in_memory=False
            )
            seen = []
            for rank in range(3):
                data = open_evaluation(config, rank=rank, world_size=3)
                once = [number for images, _ in data for number in colours(images)]
                assert once == [number for images, _ in data for number in colours(images)]
                seen += once
            assert sorted(seen) == list(range(len(seen))) and len(seen) in (20, 21, 26)


def told(run):
    """What the ValueError says; the error itself is let go, for its frames hold data workers."""
    try:
        run()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


DAMAGE = {3: b"", 8: encoded(8)[:60], 9: b"no image", 20: encoded(20, kind="GIF")[:20]}


@pytest.fixture
def damaged(tmp_path):
    """A parquet file of 26 images of which four are damaged."""
    images = [DAMAGE.get(number, encoded(number)) for number in range(26)]
    write_parquet(tmp_path / "damaged" / "train.parquet", images, [n % 3 for n in range(26)])
    return str(tmp_path / "damaged")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", [{"in_memory": True}, {"in_memory": False}, {"streaming": True}])
def test_a_damaged_image_stops_training_and_is_named(damaged, workers, way):
    config = DataConfig(source=damaged, batch_size=13, workers=workers, image_size=12, **way)
    message = told(lambda: list(open_training(config)))
    assert re.search(r"train\.parquet row \d+ \(\d+\.png\) does not decode as an image", message)
    assert "\n" not in message
    message = told(lambda: list(open_evaluation(replace(config, evaluation_split="train"))))
    assert re.search(r"row 3 \(3\.png\).*it is empty.*on_bad_image='skip'", message)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", [{"in_memory": True}, {"in_memory": False}, {"streaming": True}])
def test_damaged_images_are_skipped_counted_and_named(damaged, workers, way):
    config = DataConfig(source=damaged, batch_size=2, workers=workers, image_size=12, on_bad_image="skip", **way)
    config = replace(config, batch_size=11 if way.get("in_memory") else 13)
    data = open_training(config)
    batches = list(data)
    assert [len(images) for images, _ in batches] == [config.batch_size] * 2
    good = [number for images, targets in batches for number in colours(images)]
    assert not set(good) & set(DAMAGE) and set(good) == set(range(26)) - set(DAMAGE)
    labels = torch.cat([targets for _, targets in batches]).tolist()
    assert labels == [number % 3 for number in good]
    assert len(data.bad_images) == 4
    assert {name.split("row ")[1].split(" ")[0] for name in data.bad_images} == {"3", "8", "9", "20"}
    evaluated = open_evaluation(replace(config, evaluation_split="train"))
    assert sum(len(targets) for _, targets in evaluated) == 22
    assert len(evaluated.bad_images) == 4
    resumed = open_training(config)
    resumed.load_state_dict(data.state_dict())
    assert len(resumed.bad_images) == 4


def test_a_batch_with_nothing_in_it_is_an_error(tmp_path):
    write_parquet(tmp_path / "train.parquet", [b""] * 4, [0] * 4)
    config = DataConfig(source=str(tmp_path), batch_size=2, in_memory=False, on_bad_image="skip")
    with pytest.raises(ValueError, match="none of the 2 images of a batch decodes"):
        next(iter(open_training(config)))
    with pytest.raises(ValueError, match="no image that decodes"):
        open_training(DataConfig(source=str(tmp_path), batch_size=2, in_memory=True, on_bad_image="skip"))


@pytest.mark.parametrize("opened", [open_training, open_evaluation])
@pytest.mark.parametrize("config", ["table", "stream"], indirect=True)
def test_workers_end_at_once_in_a_reference_cycle(config, opened):
    """Left in the middle of an epoch, in a cycle that only the collector finds: torch alone takes 5 s a worker."""
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9.0) >= 4:  # a busy machine may be slow once
        gc.collect()
        before = set(multiprocessing.active_children())
        data = opened(replace(config, workers=2, evaluation_split="train"))
        held = [data, iter(data)]
        next(held[1])
        held.append(held)
        assert len(set(multiprocessing.active_children()) - before) == 2
        del data, held
        start = time.perf_counter()
        gc.collect()
        seconds.append(time.perf_counter() - start)
        assert not set(multiprocessing.active_children()) - before
    assert min(seconds) < 4


def test_each_evaluation_ends_its_workers(folder):
    config = DataConfig(source=str(folder), evaluation_split="train", batch_size=4, image_size=8, workers=2)
    data = open_evaluation(config)
    before = set(multiprocessing.active_children())
    for _ in range(2):
        assert sum(len(targets) for _, targets in data) == 20
        assert not set(multiprocessing.active_children()) - before


def test_evaluation_in_memory_takes_the_centre_that_decoding_on_the_fly_takes(folder):
    """Images of 16 x 12 pixels, of which a centre of 8 x 8 is evaluated."""
    for ratio in (0.5, 0.875, 1.0):
        config = DataConfig(source=str(folder), evaluation_split="train", image_size=8, crop_ratio=ratio, batch_size=20)
        (held,), (decoded,) = (list(open_evaluation(replace(config, in_memory=way))) for way in (True, False))
        assert torch.equal(held[0], decoded[0]) and torch.equal(held[1], decoded[1])
        if ratio == 0.5:
            other = next(iter(open_evaluation(replace(config, in_memory=True, crop_ratio=1.0))))
            assert not torch.equal(held[0], other[0])


@pytest.mark.parametrize("way", [{"in_memory": True}, {"in_memory": False}, {"streaming": True}])
def test_images_to_evaluate_on_that_are_all_damaged_are_an_error(tmp_path, way):
    write_parquet(tmp_path / "test.parquet", [b"no image"] * 3, [0, 1, 2])
    config = DataConfig(source=str(tmp_path), image_size=8, on_bad_image="skip", **way)
    with pytest.raises(ValueError, match=r"source=.*holds no image .*; mend the files"):
        next(iter(open_evaluation(config)))


def test_a_set_is_told_by_the_names_and_sizes_of_its_files(folder, parquet, shards, tmp_path):
    for source in (str(folder), str(parquet), shards):
        config = DataConfig(source=source, batch_size=2, image_size=8)
        identity = open_training(config).identity()
        assert identity == open_training(replace(config, workers=1, seed=4)).identity()
        assert identity["bytes"] > 0
        assert identity["files"] == {str(folder): 20, str(parquet): 2, shards: 3}[source]
    file = next(folder.rglob("*.png"))
    before = open_training(DataConfig(source=str(folder), batch_size=2, image_size=8)).identity()
    file.write_bytes(file.read_bytes() + b"more")
    after = open_training(DataConfig(source=str(folder), batch_size=2, image_size=8)).identity()
    assert after["bytes"] == before["bytes"] + 4 and after["sha256"] != before["sha256"]
    assert open_training(DataConfig()).identity() == {"examples": 1442}
