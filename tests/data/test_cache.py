from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionkd.data.cache import build_cache, estimate_bytes
from visionkd.errors import UnreadableImageError


class Ragged:
    """Pictures of many sizes; every seventh cannot be read."""

    def __init__(self, count: int, most: int = 40) -> None:
        self.count, self.most = count, most

    def __len__(self):
        return self.count

    def load(self, index):
        if index % 7 == 6:
            raise UnreadableImageError("bad")
        rng = np.random.default_rng(index)
        height, width = rng.integers(1, self.most, 2)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def target(self, index):
        return index % 2

    def name(self, index):
        return f"n{index}"


def test_cache_holds_every_image_of_any_size():
    source = Ragged(300)
    steps = []
    cached = build_cache(source, progress=lambda done, total: steps.append((done, total)))
    assert len(cached) == 300 and steps[-1] == (300, 300) and steps == sorted(steps)
    total = 0
    for index in range(300):
        if index % 7 == 6:
            with pytest.raises(UnreadableImageError, match=f"n{index}"):
                cached.load(index)
        else:
            expected = np.asarray(source.load(index))
            np.testing.assert_array_equal(cached.load(index).permute(1, 2, 0).numpy(), expected)
            total += expected.size
        assert cached.target(index) == index % 2
    assert cached.nbytes == total


def test_estimate():
    source = Ragged(500)
    true = sum(np.asarray(source.load(index)).size for index in range(500) if index % 7 != 6) * 7 / 6
    assert 0.4 * true < estimate_bytes(source) < 2.5 * true
    assert estimate_bytes(Ragged(0)) == 0


def test_limit_holds_even_where_the_estimate_was_too_low(monkeypatch):
    source = Ragged(300)
    true = build_cache(source).nbytes
    assert build_cache(source, limit_bytes=true // 3) is None
    from visionkd.data import cache

    monkeypatch.setattr(cache, "estimate_bytes", lambda source: true // 10)
    assert build_cache(source, limit_bytes=true // 2) is None
    assert build_cache(source, limit_bytes=true).nbytes == true
