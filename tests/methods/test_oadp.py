"""OADP: what it learns from which region, what a view does to regions, and what follows from its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.methods.contract import NUM_CLASSES, _NoTrainer
from tests.methods.detection_contract import CLASSES, DetectionContract, boxes_batch, detector
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig
from visionkd.losses.oadp import WEIGHTS
from visionkd.methods._oadp_regions import CachedRegions
from visionkd.methods._optimizer import Budget
from visionkd.methods.oadp import OADP, BaseBoxes, OADPOptions
from visionkd.models.detection.open_heads import OpenVocabulary
from visionkd.models.detection.open_network import open_vocabulary
from visionkd.tasks.detection import DetectionTask
from visionkd.teachers.embedding_cache import EmbeddingCache, ImageRegions, open_cache
from visionkd.teachers.pseudo_labels import PseudoLabels

DIM = 8
#: The second class is novel.
BASE = (True, False, True, True)
FEW = {"head_convs": 1, "head_dim": 16, "boxes": (20, 10), "rois": 16}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def unit(count: int, *, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def texts() -> torch.Tensor:
    return unit(NUM_CLASSES, seed=3)


def boxes(count: int, *, seed: int) -> torch.Tensor:
    corners, sides = rand(count, 2, seed=seed) * 30, 8 + rand(count, 2, seed=seed + 1) * 15
    return torch.cat([corners, corners + sides], 1)


def regions(index: int) -> ImageRegions:
    number = 2 + index
    return ImageRegions(
        unit(1, seed=index)[0], boxes(2, seed=10 + index), unit(2, seed=20 + index), boxes(number, seed=30 + index),
        unit(number, seed=40 + index), rand(number, seed=50 + index),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> EmbeddingCache:
    made = open_cache({"a": 1}, num_samples=5, dim=DIM, directory=tmp_path_factory.mktemp("cache"), shard_images=2)
    for shard in range(made.num_shards):
        made.write(shard, [regions(index) for index in made.images_of(shard)])
    return made


def batch() -> dict:
    """A batch of three views: as the picture is, shrunk, and flipped."""
    found = boxes_batch()
    kept = [target["labels"] != 1 for target in found["target"]]  # novel boxes are none of training
    target = [
        {name: value[keep] for name, value in each.items()} for each, keep in zip(found["target"], kept, strict=True)
    ]
    geometry = torch.tensor([[1.0, 0, 1, 0], [0.5, 0, 0.5, 0], [-1.0, 64, 1, 0]])
    return {**found, "target": target, "geometry": geometry, "view": torch.zeros(3, dtype=torch.int64)}


def build(cache: EmbeddingCache | None, kind: type[OADP] = OADP, **options) -> OADP:
    network = detector("fasterrcnn_test_resnet", seed=1)
    chosen = build_options(OADPOptions, {**FEW, **options})
    spec = OpenVocabulary(
        dim=DIM, base=BASE, head_convs=chosen.head_convs, head_dim=chosen.head_dim, proposals=chosen.boxes,
        rois=chosen.rois,
    )  # fmt: skip
    torch.manual_seed(4)
    student = open_vocabulary(network, spec, names=CLASSES, texts=texts())
    config = DistillConfig(
        student={"name": "fasterrcnn_test_resnet"}, teachers=[{"name": "encoder"}], method="oadp",
        optimizer={"name": "sgd", "lr": 0.001, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_epochs": 0}, training={"seed": 1},
    )  # fmt: skip
    module = kind(
        student=student, teachers=(), task=DetectionTask(num_classes=NUM_CLASSES), config=config, options=chosen,
        regions=None if cache is None else CachedRegions(cache, torch.arange(5)),
        budget=Budget(steps_per_epoch=10, epochs=1),
    )  # fmt: skip
    module.trainer = _NoTrainer()
    return module.train()


def terms_of(module: OADP) -> dict[str, torch.Tensor]:
    module._seed_step(0)
    prepared = module.on_after_batch_transfer(module.on_before_batch_transfer(batch(), 0), 0)
    return module.region_terms(prepared)


class TestContract(DetectionContract):
    name = "oadp"

    @pytest.fixture(autouse=True)
    def _given(self, cache) -> None:
        self.cache = cache

    def build(self, **training) -> OADP:
        module = build(self.cache)
        if "ema_decay" not in training:
            return module
        config = module.config.model_copy(deep=True)
        config.training.ema_decay = training["ema_decay"]
        found = OADP(
            student=module.student, teachers=(), task=module.task, config=config, options=module.options,
            regions=module.regions, budget=module.budget,
        )  # fmt: skip
        found.trainer = _NoTrainer()
        return found.train()

    def batch(self) -> dict:
        return batch()


def test_every_level_of_the_pyramid_has_its_terms_and_weights(cache) -> None:
    module = build(cache)
    found = terms_of(module)
    assert set(found) == {"task_loss", *WEIGHTS} and all(value.isfinite() for value in found.values())
    for step, reached in ((1, 1 / 200), (200, 1.0), (9000, 1.0)):
        module._step_number = step
        weights = module.loss_weights()
        assert weights["task_loss"] == 1 and weights["object_loss"] == pytest.approx(256 * reached)
        assert weights["block_label_loss"] == pytest.approx(16 * min(1, step / 1000))
    released = build(cache, loss_schedule="released", warmup_scale=0.5)
    released._step_number = 9000
    assert released.loss_weights()["block_label_loss"] == pytest.approx(16 / 500)
    assert released.loss_weights()["object_loss"] == 256


def test_the_step_number_follows_from_the_place_in_the_training(cache) -> None:
    module = build(cache)
    prepared = module.on_after_batch_transfer(module.on_before_batch_transfer(batch(), 0), 0)
    module.trainer.current_epoch = 2
    try:
        module.training_step(prepared, 3)
    finally:
        del module.trainer.current_epoch
    assert module._step_number == 2 * 10 + 3 + 1


def test_a_row_without_distillation_needs_no_cache_and_no_head_beside(cache) -> None:
    none = {f"{name}_weight": 0.0 for name in WEIGHTS}
    module = build(None, **none)
    assert not module.options.distills and set(terms_of(module)) == {"task_loss"} and not len(module.projectors)
    assert module.student.spec.base_power is None  # the other head never learnt anything
    heads = module.student.second_stage
    assert not any(p.requires_grad for p in (*heads.object_head.parameters(), *heads.object_embed.parameters()))
    only = build(cache, **{**none, "object_loss_weight": 256.0})
    assert set(terms_of(only)) == {"task_loss", "object_loss"} and only.student.spec.base_power == 2 / 3
    first = build(cache, BaseBoxes, pseudo_labels=True)
    assert set(terms_of(first)) == {"task_loss"} and first.student.spec.base_power is None


def test_objects_learn_from_the_embedding_of_their_own_region(cache) -> None:
    module = build(cache)
    prepared = module.on_before_batch_transfer(batch(), 0)
    own = prepared["regions"]
    assert torch.allclose(own["objects"], torch.cat([cache.read(i).objects for i in range(3)]))
    _, maps = module.student.learn(module.on_after_batch_transfer(prepared, 0)["image"], prepared["target"])
    found = module.student.second_stage.object_embeddings(maps, own["object_boxes"])
    expected = (found - own["objects"]).abs().mean()
    assert terms_of(module)["object_loss"].item() == pytest.approx(expected.item(), rel=0.2)  # batch norm saw more
    assert found.shape == (2 + 3 + 4, DIM)


def test_boxes_go_with_the_picture_and_embeddings_stay(cache) -> None:
    found = CachedRegions(cache, torch.arange(5)).look_up(batch())["regions"]
    first, second, third = (cache.read(index) for index in range(3))
    assert torch.equal(found["object_boxes"][0], first.object_boxes)
    assert torch.allclose(found["object_boxes"][1], second.object_boxes / 2)
    left, top, right, bottom = third.block_boxes.unbind(1)
    assert torch.allclose(found["block_boxes"][2], torch.stack([64 - right, top, 64 - left, bottom], 1))
    assert torch.equal(found["whole"], torch.stack([first.whole, second.whole, third.whole]))
    assert torch.equal(found["blocks"], torch.cat([first.blocks, second.blocks, third.blocks]))


def test_images_that_were_left_out_move_those_behind_them(cache) -> None:
    found = CachedRegions(cache, torch.tensor([0, 3, 4])).look_up(batch())["regions"]
    assert torch.equal(found["whole"][1], cache.read(3).whole)


def test_some_objects_are_drawn_the_same_way_for_the_same_view(cache) -> None:
    some = CachedRegions(cache, torch.arange(5), objects=2)
    given = {**batch(), "view": torch.tensor([4, 4, 4])}
    one, again, other = some.look_up(given), some.look_up(given), some.look_up(batch())
    assert [len(each) for each in one["regions"]["object_boxes"]] == [2, 2, 2]
    assert torch.equal(one["regions"]["objects"], again["regions"]["objects"])
    assert not torch.equal(one["regions"]["objects"], other["regions"]["objects"])
    for index, found in enumerate(one["regions"]["objects"].split(2)):
        assert all((cache.read(index).objects == vector).all(1).any() for vector in found)  # with their own embedding


def test_the_released_box_of_the_first_block_is_an_option(cache) -> None:
    own = cache.read(0).block_boxes
    found = CachedRegions(cache, torch.arange(5), released_block=True).look_up(batch())["regions"]["block_boxes"][0]
    left, top, side = own[0, 0], own[0, 1], own[0, 2] - own[0, 0]
    assert torch.allclose(found[0], torch.stack([min(left, side), top, max(left, side), side]))
    assert torch.equal(found[1:], own[1:])


def test_pseudo_boxes_join_the_targets_of_their_view(cache) -> None:
    box = torch.tensor([[4.0, 8, 20, 30]])
    pseudo = [PseudoLabels(box[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * 5
    pseudo[2] = PseudoLabels(box, torch.tensor([1]), torch.tensor([0.8]))
    module = build(cache, pseudo_labels=True)
    module.regions.pseudo = pseudo
    given = batch()
    target = module.on_before_batch_transfer(given, 0)["target"]
    assert target[2]["boxes"].tolist() == [[44, 8, 60, 30]] and target[2]["labels"].tolist() == [1]
    assert torch.equal(target[0]["boxes"], given["target"][0]["boxes"])
    found = terms_of(module)
    assert all(value.isfinite() for value in found.values())  # novel columns are there to be learnt
    assert module.student.second_stage.num_base == 3


def test_no_term_depends_on_novel_texts(cache) -> None:
    found = []
    for seed in (0, 9):
        module = build(cache)
        changed = texts()
        changed[1] = unit(1, seed=seed)[0]
        module.student.set_classes(CLASSES, changed, base=BASE)
        module.projectors["labels"].set_classes(changed[[0, 2, 3, 1]], num_base=3)
        terms = terms_of(module)
        torch.stack(list(terms.values())).sum().backward()
        grads = [float(p.grad.sum()) for p in module.parameters() if p.grad is not None]
        found.append([value.item() for value in terms.values()] + grads)
    assert found[0] == found[1]


def test_label_losses_name_the_classes_that_regions_show(cache, monkeypatch) -> None:
    module, seen = build(cache), []
    monkeypatch.setattr(
        "visionkd.methods.oadp.asymmetric_loss", lambda **given: seen.append(given["target"]) or torch.zeros(())
    )
    found = module.on_before_batch_transfer(batch(), 0)
    terms_of(module)
    blocks, whole = seen
    assert blocks.shape == (6, NUM_CLASSES) and whole.shape == (3, NUM_CLASSES)
    # classes stand base first: 0, 2, 3, then the novel 1
    assert whole.tolist() == [
        [any(label == column for label in target["labels"].tolist()) for column in (0, 2, 3, 1)]
        for target in found["target"]
    ]
    block, target = found["regions"]["block_boxes"][0][0], found["target"][0]
    overlaps = [
        bool((torch.maximum(block[:2], box[:2]) < torch.minimum(block[2:], box[2:])).all()) for box in target["boxes"]
    ]
    shown = {label for label, over in zip(target["labels"].tolist(), overlaps, strict=True) if over}
    assert blocks[0].tolist() == [column in shown for column in (0, 2, 3, 1)]


def test_what_does_not_go_together_is_told_before_the_training(cache) -> None:
    module = build(cache)
    config = module.config.model_copy(deep=True)
    config.detection.scale, config.detection.iou_crop, config.training.compile = (0.5, 1.5), 0.5, True
    options = build_options(OADPOptions, {"crop": "constant"})
    fcos = detector("fcos_test_resnet", seed=0)
    problems = OADP.check(student=fcos, teachers=(), config=config, options=options)
    assert {problem.key for problem in problems} == {
        "--student", "options.crop_side", "detection.scale", "detection.iou_crop", "training.compile",
    }  # fmt: skip
    assert not OADP.check(student=module.student, teachers=(), config=module.config, options=module.options)


def test_stages_follow_from_who_proposes() -> None:
    def names(**options) -> list[tuple[str, int | None]]:
        config = DistillConfig(student={"name": "x"}, teachers=[{"name": "y"}], training={"epochs": 12})
        return [(each.name, each.epochs) for each in OADP.stages(config, build_options(OADPOptions, options))]

    assert names() == [("base", 3), ("distill", None)]
    assert names(base_epochs=5) == [("base", 5), ("distill", None)]
    assert names(proposals="runs/base") == [("distill", None)]
    assert names(**{f"{name}_weight": 0.0 for name in WEIGHTS}) == [("distill", None)]
