"""The cache of embeddings: what it gives back, what it was made from, and what becomes of it when a process dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.teachers.oadp_help import DIM, write_encoder
from visionkd.data.boxes import ShapesBoxes
from visionkd.errors import DataError, RequestError, UnreadableImageError
from visionkd.teachers import embed
from visionkd.teachers.crops import object_crops
from visionkd.teachers.embed import RegionOptions, fill
from visionkd.teachers.embedding_cache import EmbeddingCache, ImageRegions, Proposals, cache_path, open_cache
from visionkd.teachers.encoders import TwoTowers, open_encoder
from visionkd.teachers.regions import block_boxes

SIZE, IMAGES = 48, 11
KEY = {"encoder": {"weights": "ab", "resolution": [32, 32]}, "data": "f00d", "regions": {"area_ratio": 8.0}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TwoTowers:
    return open_encoder(str(write_encoder(tmp_path_factory.mktemp("encoder") / "model")))


@pytest.fixture
def source() -> ShapesBoxes:
    return ShapesBoxes(0, IMAGES, SIZE)


def proposals_of(source: ShapesBoxes, index: int) -> Proposals:
    boxes = torch.from_numpy(source.target(index)["boxes"])
    return Proposals(boxes, torch.linspace(0.9, 0.1, len(boxes)))


def opened(directory: Path, source: ShapesBoxes, *, key=KEY, count: int = IMAGES) -> EmbeddingCache:
    """A cache whose proposals are the true boxes."""
    cache = open_cache(key, num_samples=count, dim=DIM, directory=directory, shard_images=4)
    for shard in cache.missing("proposals"):
        cache.write_proposals(shard, [proposals_of(source, index) for index in cache.images_of(shard)])
    return cache


def everything(cache: EmbeddingCache) -> list[torch.Tensor]:
    return [value for index in range(cache.num_samples) for value in vars(cache.read(index)).values()]


def test_each_image_comes_back_with_its_regions(tmp_path, source, encoder) -> None:
    cache = opened(tmp_path, source)
    told = []
    fill(cache, source, encoder, RegionOptions(), workers=2, progress=lambda *given: told.append(given))
    assert cache.missing() == [] and told[-1][:2] == (IMAGES, IMAGES)
    for index in range(IMAGES):
        found, image = cache.read(index), source.load(index)
        assert torch.equal(found.object_boxes, torch.from_numpy(source.target(index)["boxes"]))
        assert torch.equal(found.block_boxes, block_boxes((SIZE, SIZE), block=32, max_stride=16))
        for vectors in (found.whole[None], found.blocks, found.objects):
            assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)
        cut = object_crops(image, found.object_boxes, size=32, grid=8, interpolation=encoder.interpolation)
        expected = encoder.encode_crops(cut.crops.float() / 255, cut.outside)
        assert torch.allclose(found.objects, expected, atol=2e-3)  # half precision
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert torch.allclose(found.whole, encoder.encode_image(pixels)[0], atol=2e-3)
        assert found.objectness[0] == pytest.approx(0.9)


def test_boxes_of_large_images_keep_their_fractions(tmp_path) -> None:
    cache = open_cache(KEY, num_samples=1, dim=DIM, directory=tmp_path)
    box = torch.tensor([[3000.25, 4000.5, 5000.75, 6000.125]])
    unit = torch.nn.functional.normalize(torch.ones(1, DIM))
    cache.write(0, [ImageRegions(unit[0], box, unit, box, unit, torch.ones(1))])
    assert torch.equal(cache.read(0).object_boxes, box) and torch.equal(cache.read(0).block_boxes, box)


def test_images_without_proposals_and_those_that_cannot_be_read(tmp_path, source, encoder, monkeypatch) -> None:
    cache = open_cache(KEY, num_samples=3, dim=DIM, directory=tmp_path)
    cache.write_proposals(0, [Proposals.none(), proposals_of(source, 1), Proposals.none()])

    def load(index: int) -> Image.Image:
        if index == 1:
            raise UnreadableImageError("broken")
        return ShapesBoxes(0, IMAGES, SIZE).load(index)

    monkeypatch.setattr(source, "load", load)
    fill(cache, source, encoder, RegionOptions())
    assert [len(cache.read(index).objects) for index in range(3)] == [0, 0, 0]
    blocks = len(block_boxes((SIZE, SIZE), block=32, max_stride=16))
    assert [len(cache.read(index).blocks) for index in range(3)] == [blocks, 0, blocks]
    assert cache.read(1).whole.norm() == 0


def test_an_encoder_without_masks_sees_crops_as_they_are(tmp_path, source) -> None:
    plain = open_encoder(str(write_encoder(tmp_path / "model", name="cifar_resnet8")))
    assert plain.grid is None
    cache = opened(tmp_path / "cache", source, count=4)
    fill(cache, source, plain, RegionOptions())
    found = cache.read(2)
    cut = object_crops(source.load(2), found.object_boxes, size=32, grid=1, interpolation=plain.interpolation)
    assert torch.allclose(found.objects, plain.encode_crops(cut.crops.float() / 255), atol=2e-3)


def test_a_killed_process_loses_no_more_than_its_shard(tmp_path, source, encoder, monkeypatch) -> None:
    whole = opened(tmp_path / "whole", source)
    fill(whole, source, encoder, RegionOptions())
    killed = opened(tmp_path / "killed", source)
    child = os.fork()
    if not child:
        original = embed._embed

        def dies(images, given):
            if (killed.directory / "regions-00001.safetensors").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(images, given)

        embed._embed = dies
        torch.set_num_threads(1)
        with killed.building():
            fill(killed, source, encoder, RegionOptions())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (killed.directory / ".regions-00002.safetensors.x.tmp").write_bytes(b"half of it")
    again = opened(killed.directory, source)
    assert again.missing() == [2]  # what was complete is not computed again
    before = (killed.directory / "regions-00000.safetensors").stat().st_mtime_ns
    with again.building():
        fill(again, source, encoder, RegionOptions())
    assert (killed.directory / "regions-00000.safetensors").stat().st_mtime_ns == before
    assert not list(killed.directory.glob(".*.tmp"))
    assert all(torch.equal(mine, other) for mine, other in zip(everything(again), everything(whole), strict=True))


def test_damage_is_seen_whatever_it_is(tmp_path, source, encoder) -> None:
    cache = opened(tmp_path, source)
    fill(cache, source, encoder, RegionOptions())
    first, second, third = sorted(tmp_path.glob("regions-*"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-10])
    third.unlink()
    again = opened(tmp_path, source)
    with pytest.raises(DataError, match=r"regions-00000.*checksum.*\n.*Delete it"):
        again.read(0)
    with pytest.raises(DataError, match="has lost"):
        again.read(9)
    assert again.missing() == [1, 2] and not second.exists()  # one that is cut off is known by its header


def test_a_cache_of_something_else_is_refused_by_the_parts_that_differ(tmp_path, source) -> None:
    opened(tmp_path, source)
    other = {**KEY, "encoder": {"weights": "cd", "resolution": [32, 32]}, "regions": {"area_ratio": 4.0}}
    with pytest.raises(RequestError) as caught:
        opened(tmp_path, source, key=other)
    said = str(caught.value)
    assert "encoder.weights: the store has ab, this run cd" in said
    assert "regions.area_ratio: the store has 8.0, this run 4.0" in said
    assert "encoder.resolution" not in said and "data" not in [problem.key for problem in caught.value.problems]
    with pytest.raises(RequestError, match="num_samples"):
        opened(tmp_path, source, count=5)


def test_every_part_of_the_key_has_a_place_of_its_own(encoder, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path))
    keys = [
        RegionOptions().key(encoder),
        RegionOptions(area_ratio=4).key(encoder),
        RegionOptions(mode="constant", side=64).key(encoder),
        RegionOptions(cover=True).key(encoder),
        {**RegionOptions().key(encoder), "data": "other"},
    ]
    assert len({cache_path(key) for key in keys}) == len(keys)
    assert cache_path(keys[0]).parent == tmp_path / "embeddings"
    json.dumps(keys)


def test_what_is_no_cache_is_told(tmp_path, source) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is no embedding cache"):
        opened(tmp_path, source)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path, source)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "visionkd embedding cache", "version": 9, "key": {}}))
    with pytest.raises(DataError, match="format 9"):
        opened(tmp_path, source)


def test_images_are_looked_at_at_their_own_size_within_limits() -> None:
    image = Image.new("RGB", (400, 100))
    assert embed._fitting(image, 8, 1333) is image
    assert embed._fitting(image, 8, 200).size == (200, 50)
    assert embed._fitting(Image.new("RGB", (40, 4)), 8, 1333).size == (80, 8)
