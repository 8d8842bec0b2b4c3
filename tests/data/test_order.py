"""Index arithmetic: every example once an epoch, divided among ranks, from any step on."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.data.order import Share, evaluation_indices, generator


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def epoch_of(share, epoch, start=0):
    return list(share.indices(epoch, start))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**63), st.integers(0, 5))
def test_ranks_together_are_one_process(examples, batch_size, world_size, seed, epoch):
    if examples < batch_size * world_size:
        with pytest.raises(ValueError, match="batch_size"):
            Share(examples=examples, batch_size=batch_size, world_size=world_size)
        return
    whole = epoch_of(Share(examples=examples, batch_size=batch_size * world_size, seed=seed), epoch)
    shares = [
        Share(examples=examples, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    parts = [epoch_of(share, epoch) for share in shares]
    assert [joined(step) for step in zip(*parts, strict=True)] == whole
    assert len(whole) == shares[0].steps_per_epoch == examples // (batch_size * world_size)
    seen = joined(whole)
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(examples))
    for start in range(len(whole) + 1):
        assert epoch_of(shares[0], epoch, start) == parts[0][start:]


def test_epochs_and_seeds_differ():
    share = Share(examples=50, batch_size=50)
    assert epoch_of(share, 0) != epoch_of(share, 1)
    assert epoch_of(share, 0) != epoch_of(Share(examples=50, batch_size=50, seed=1), 0)


def test_keys_do_not_run_into_each_other():
    draws = {generator(*key).integers(2**63) for key in [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (1,), (2**40,)]}
    assert len(draws) == 6


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 4))
def test_evaluation_sees_every_example_once(examples, batch_size, world_size):
    batches = [list(evaluation_indices(examples, batch_size, rank, world_size)) for rank in range(world_size)]
    assert sorted(joined(joined(batches))) == list(range(examples))
    assert all(len(batch) == batch_size for rank in batches for batch in rank[:-1])


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 1), (0, 0), (0.0, 1)])
def test_ranks_are_checked(rank, world_size):
    with pytest.raises(ValueError, match=r"rank|world_size"):
        Share(examples=10, batch_size=1, rank=rank, world_size=world_size)
