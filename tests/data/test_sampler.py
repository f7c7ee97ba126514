from __future__ import annotations

import itertools

import pytest

from visionkd.data.sampler import EvalBatchSampler, PositionedSampler, view_seed
from visionkd.errors import DataError


def sampled(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_what_one_process_sees(world_size):
    alone = PositionedSampler(53, 4 * world_size, seed=1)
    ranks = [PositionedSampler(53, 4, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in (0, 3):
        parts = [sampled(rank, epoch) for rank in ranks]
        joined = [sum(batches, []) for batches in zip(*parts, strict=True)]
        assert joined == sampled(alone, epoch)
        assert len(alone) == len(ranks[0]) == len(joined) == 53 // (4 * world_size)


def test_epoch_shows_each_sample_at_most_once_and_in_another_order():
    sampler = PositionedSampler(50, 8, seed=1)
    first, second = (sum(sampled(sampler, epoch), []) for epoch in (0, 1))
    assert len(first) == 48 == len({index for index, _ in first})
    assert {view for _, view in first} == {0} and {view for _, view in second} == {1}
    assert [index for index, _ in first] != [index for index, _ in second]
    assert first == sum(sampled(PositionedSampler(50, 8, seed=1), 0), [])
    assert first != sum(sampled(PositionedSampler(50, 8, seed=2), 0), [])


def test_views_are_taken_in_turn():
    sampler = PositionedSampler(8, 8, seed=0, views=3)
    assert [sampled(sampler, epoch)[0][0][1] for epoch in range(5)] == [0, 1, 2, 0, 1]


def test_fewer_samples_than_a_batch_are_repeated():
    (batch,) = sampled(PositionedSampler(3, 8, seed=0))
    assert len(batch) == 8 and {index for index, _ in batch} == {0, 1, 2}
    ranks = [sampled(PositionedSampler(3, 4, seed=0, rank=rank, world_size=2))[0] for rank in (0, 1)]
    assert ranks[0] + ranks[1] == batch


def test_position_survives_until_the_epoch_changes():
    sampler = PositionedSampler(40, 4, seed=0)
    whole = sampled(sampler, 2)
    sampler.set_position(2, 7)
    assert list(sampler) == whole[7:] and len(sampler) == 10
    sampler.set_epoch(2)  # what Lightning calls after a resume
    assert list(sampler) == whole[7:]
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10
    sampler.set_position(3, 10)
    assert list(sampler) == []
    for bad in (-1, 11):
        with pytest.raises(ValueError):
            sampler.set_position(0, bad)


def test_refused_arguments():
    with pytest.raises(DataError, match="empty"):
        PositionedSampler(0, 4, seed=0)
    for options in ({"batch_size": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError):
            PositionedSampler(5, **({"batch_size": 1, "seed": 0} | options))


def test_view_seeds_differ():
    seeds = {view_seed(*numbers) & 0xFFFFFFFF for numbers in itertools.product(range(10), repeat=3)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [5, 16, 17, 31, 32, 33])
def test_evaluation_ranks_share_all_samples_in_equally_many_steps(world_size, count):
    samplers = [EvalBatchSampler(count, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = sorted(index for sampler in samplers for batch in sampler for index in batch)
    assert seen == list(range(count))
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    assert all(1 <= len(batch) <= 4 for sampler in samplers for batch in sampler)
