from __future__ import annotations

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from visionkd.config.schema import AugmentConfig
from visionkd.data.cache import CachedSource
from visionkd.data.loader import (
    default_workers,
    eval_loader,
    train_loader,
)
from visionkd.data.shapes import ShapesSource
from visionkd.data.transforms import EvalTransform, TrainTransform
from visionkd.errors import DataError, UnreadableImageError
from visionkd.types import InputSpec


class NoiseSource:
    """Random pictures, of which some cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), size: int = 8) -> None:
        self.count, self.bad, self.size = count, bad, size

    def __len__(self):
        return self.count

    def load(self, index):
        if index in self.bad:
            raise UnreadableImageError(f"cannot read '{index}'")
        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def target(self, index):
        return index % 3

    def name(self, index):
        return str(index)


class Both:
    """A transform that draws from both generators, as some of torchvision's do."""

    img_size = (1, 1)

    def __call__(self, image):
        return torch.tensor([random.randrange(256), *torch.randint(0, 256, (2,)).tolist()], dtype=torch.uint8).view(
            3, 1, 1
        )


TRANSFORM = TrainTransform(AugmentConfig(randaugment_ops=1, random_erasing=0.5), 8)
EVAL = EvalTransform(InputSpec(img_size=(8, 8), crop_pct=1.0))


def make(source, **options):
    options = {"batch_size": 4, "seed": 5, "workers": 0, "cache": "none"} | options
    return train_loader(source, options.pop("transform", TRANSFORM), **options)


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def epoch_of(loader, epoch: int) -> list[dict]:
    loader.set_epoch(epoch)
    return list(loader)


def test_lightning_finds_the_sampler():
    lightning = pytest.importorskip("lightning.fabric.utilities.data")
    loader = make(NoiseSource(10))
    lightning._set_sampler_epoch(loader, 4)
    assert loader.batch_sampler.epoch == 4
    pytorch = pytest.importorskip("lightning.fabric.utilities.types")
    assert isinstance(loader, pytorch._Stateful) and loader.state_dict() == {}
    loader.load_state_dict({})


# Training batches


def test_batch_contents():
    batch = next(iter(make(NoiseSource(20))))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.uint8
    for name in ("target", "index", "unreadable"):
        assert batch[name].shape == (4,) and batch[name].dtype == torch.int64
    assert torch.equal(batch["target"], batch["index"] % 3)
    assert set(batch) == {"image", "target", "index", "view", "unreadable"} and batch["unreadable"].tolist() == [-1] * 4
    assert next(iter(make(NoiseSource(20), views=2)))["view"].tolist() == [0] * 4


@pytest.mark.parametrize("transform", [TRANSFORM, Both()])
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_batches_do_not_depend_on_the_number_of_workers(transform, cache):
    source = NoiseSource(40, bad=(3, 4))
    loaders = [make(source, workers=workers, transform=transform, cache=cache) for workers in (0, 1, 3)]
    for epoch in (0, 1):  # the second one with the same, persistent processes
        alone, one, three = (epoch_of(loader, epoch) for loader in loaders)
        assert equal(alone, one) and equal(alone, three)


def test_cache_changes_nothing():
    source = NoiseSource(20, bad=(3,))
    cached = make(source, cache="ram")
    assert cached.cached and isinstance(cached.source, CachedSource)
    assert equal(epoch_of(make(source), 1), epoch_of(cached, 1))


def test_view_of_a_sample_depends_on_nothing_else():
    source = NoiseSource(24)

    def views(epoch=2, **options):
        batches = epoch_of(make(source, **options), epoch)
        return {int(i): image for batch in batches for i, image in zip(batch["index"], batch["image"], strict=True)}

    base = views()
    for other in (views(batch_size=8), views(batch_size=2, rank=1, world_size=3), views(views=5)):
        assert other and all(torch.equal(image, base[index]) for index, image in other.items())
    changed = views(epoch=3)
    assert not all(torch.equal(image, base[index]) for index, image in changed.items())
    reseeded = views(seed=6)
    assert not all(torch.equal(image, base[index]) for index, image in reseeded.items())
    again = views(epoch=7, views=5)
    assert all(torch.equal(image, base[index]) for index, image in again.items())


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_of_all_ranks_are_those_of_one_process(world_size):
    source = NoiseSource(50, bad=(7,))
    alone = epoch_of(make(source, batch_size=2 * world_size), 1)
    ranks = [epoch_of(make(source, batch_size=2, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    joined = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in zip(*ranks, strict=True)]
    assert equal(alone, joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_mid_epoch_gives_the_remaining_batches(workers):
    source = NoiseSource(40)
    straight = make(source, workers=workers)
    epochs = [epoch_of(straight, epoch) for epoch in range(3)]
    resumed = make(source, workers=workers)
    resumed.set_position(1, 6)
    assert len(resumed) == 10
    assert equal(list(resumed), epochs[1][6:])
    assert equal(epoch_of(resumed, 2), epochs[2])
    resumed.set_position(0, 9)  # and back, with the same processes
    assert equal(list(resumed), epochs[0][9:])


def test_leaving_an_epoch_early_does_not_disturb_the_next():
    source = NoiseSource(40)
    loader = make(source, workers=2)
    expected = epoch_of(make(source), 1)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert equal(epoch_of(loader, 1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_main_process_randomness_is_left_alone(workers):
    loader = make(NoiseSource(12), workers=workers, transform=Both())
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    list(loader)
    list(eval_loader(NoiseSource(12), EVAL, batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_randomness_is_restored_when_a_transform_fails():
    def fail(image):
        raise RuntimeError("broken transform")

    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken transform"):
        list(make(NoiseSource(8), transform=fail))
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_image_is_replaced_by_the_next_readable_one():
    source = NoiseSource(12, bad=(3, 4, 11))
    batches = epoch_of(make(source), 0)
    used = torch.cat([batch["index"] for batch in batches])
    bad = torch.cat([batch["unreadable"] for batch in batches])
    order = make(source).batch_sampler.order(0)
    for wanted, index, missing in zip(order.tolist(), used.tolist(), bad.tolist(), strict=True):
        assert index == {3: 5, 4: 5, 11: 0}.get(wanted, wanted)
        assert missing == (wanted if wanted in source.bad else -1)
    images = {int(i): image for b in batches for i, image in zip(b["index"], b["image"], strict=True)}
    targets = torch.cat([batch["target"] for batch in batches])
    assert torch.equal(targets, used % 3) and set(images) == set(range(12)) - {3, 4, 11}


def test_nothing_readable_is_an_error():
    with pytest.raises(DataError, match="no readable image among 5"):
        list(make(NoiseSource(5, bad=tuple(range(5)))))


def test_error_in_a_worker_arrives_as_it_was_raised():
    with pytest.raises(DataError) as caught:
        list(make(NoiseSource(5, bad=tuple(range(5))), workers=1))
    assert caught.value.message.startswith("no readable image") and "data check" in caught.value.hint
    assert "Traceback" not in str(caught.value)


def test_workers_leave_ctrl_c_to_the_main_process(capfd):
    loader = make(NoiseSource(40), workers=2)
    batches = iter(loader)
    expected = epoch_of(make(NoiseSource(40)), 0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert equal([first, *batches], expected)
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_auto_cache():
    source = NoiseSource(20)
    assert make(source, cache="auto").cached and make(source, cache="auto", epochs=3).cached
    assert not make(source, cache="auto", epochs=2).cached and not make(source, cache="none").cached
    assert make(source, cache="ram", epochs=1).cached


def test_auto_cache_leaves_large_data_alone(monkeypatch):
    from visionkd.data import cache

    monkeypatch.setattr(cache, "AUTO_LIMIT_BYTES", 20 * 8 * 8 * 3 - 1)
    assert not make(NoiseSource(20), cache="auto").cached
    assert make(NoiseSource(20), cache="ram").cached


def test_spawned_workers():
    source = ShapesSource(0, 16, 32)
    loader = make(source, workers=1, transform=TrainTransform(AugmentConfig(), 32), cache="ram")
    loader.multiprocessing_context = "spawn"
    plain = make(source, transform=TrainTransform(AugmentConfig(), 32))
    assert equal(epoch_of(loader, 1), epoch_of(plain, 1))


def test_default_workers(monkeypatch):
    from visionkd.data import loader

    for processors, world_size, expected in ((1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 8), (64, 8, 7), (2, 4, 1)):
        monkeypatch.setattr(loader, "_affinity", lambda count=processors: set(range(count)))
        assert default_workers(world_size) == expected


# Evaluation batches


def test_evaluation_sees_everything_once_and_in_order():
    batches = list(eval_loader(NoiseSource(10), EVAL, batch_size=4, workers=0))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert torch.equal(batches[0]["target"], torch.arange(4) % 3) and batches[0]["unreadable"].tolist() == []


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_unreadable_images_out(cache, workers):
    batches = list(eval_loader(NoiseSource(8, bad=(1, 4, 5, 6, 7)), EVAL, batch_size=4, workers=workers, cache=cache))
    assert [batch["index"].tolist() for batch in batches] == [[0, 2, 3], []]
    assert [batch["unreadable"].tolist() for batch in batches] == [[1], [4, 5, 6, 7]]
    assert batches[1]["image"].shape == (0, 3, 8, 8) and batches[1]["target"].dtype == torch.int64
