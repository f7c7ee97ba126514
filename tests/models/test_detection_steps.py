"""What can be seen of a detector's pass, and what a detector can take from another one."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.methods.detection_contract import CLASSES, SIZE, boxes_batch, detector
from visionkd.errors import RequestError
from visionkd.models.detection.steps import (
    is_two_stage,
    levels,
    look_at_anchors,
    look_at_boxes,
    matched_levels,
    stepwise,
    two_stage,
)
from visionkd.models.detection.transfer import take_neck_and_heads
from visionkd.models.features import extract, stages
from visionkd.models.fold import fold_batch_norm
from visionkd.models.plan import Stage

KINDS = ("fcos_test_resnet", "retinanet_test_resnet", "fasterrcnn_test_resnet")


def shown(*, seed: int = 0):
    batch = boxes_batch(seed=seed)
    return batch["image"].float() / 255, batch["target"]


@pytest.mark.parametrize("name", KINDS)
def test_a_pass_that_is_watched_is_the_plain_one(name: str) -> None:
    network, twin = detector(name, seed=0), detector(name, seed=0)
    image, target = shown()
    torch.manual_seed(1)
    expected = network(image, target).losses
    torch.manual_seed(1)
    output = extract(twin, image, [-1, 0], target=target)
    assert output.losses.keys() == expected.keys()
    assert all(torch.equal(output.losses[key], value) for key, value in expected.items())
    assert [tuple(each.shape[2:]) for each in output.features] == [stages(twin)[at].grid for at in (-1, 0)]
    assert output.image_size == SIZE and (output.two_stage is not None) == name.startswith("fasterrcnn")
    states = zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in states)
    assert not any(module._forward_hooks for module in twin.modules())


def test_in_eval_mode_only_the_pyramid_is_computed() -> None:
    network = detector("fasterrcnn_test_resnet", seed=0).eval()
    network.net.rpn.forward = None  # nobody may ask it
    image, _ = shown()
    output = stepwise(network, image)
    assert len(output.features) == len(levels(network)) and not output.boxes and output.two_stage is None


def test_the_steps_are_those_that_the_losses_were_computed_on() -> None:
    network = detector("fasterrcnn_test_resnet", seed=0)
    image, target = shown()
    losses, maps, steps = two_stage(network, image, target)
    labels = steps.labels
    assert len(labels) == sum(map(len, steps.proposals)) == len(steps.class_logits) == len(steps.box_deltas)
    assert set(labels.tolist()) <= {0, 1, 2, 3} and (labels > 0).any()  # class 3 has the crowd alone
    classified = torch.nn.functional.cross_entropy(steps.class_logits, labels)
    assert torch.allclose(classified, losses["loss_classifier"])
    truth = torch.tensor([4.0, 4, 30, 40])
    at = [place for place, box in enumerate(steps.proposals[0]) if torch.equal(box, truth)]
    assert at and labels[at[0]] == 1
    assert 0 < len(steps.sampled_anchors) <= 3 * 16 and len(steps.objectness) == len(steps.anchor_deltas)
    assert not any(each.requires_grad for each in steps.proposals)
    # a second look at the same anchors and boxes, with the same maps, answers the same
    objectness, deltas = look_at_anchors(network, maps)
    logits, box_deltas = look_at_boxes(network, maps, steps.proposals, steps.image_sizes)
    pairs = ((objectness, steps.objectness), (deltas, steps.anchor_deltas), (logits, steps.class_logits))
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in (*pairs, (box_deltas, steps.box_deltas)))


def test_samplers_and_hooks_are_put_back_where_a_pass_fails() -> None:
    network = detector("fasterrcnn_test_resnet", seed=0)
    samplers = [part.fg_bg_sampler for part in (network.net.rpn, network.net.roi_heads)]
    with pytest.raises(ValueError, match="needs the targets"):
        two_stage(network, shown()[0], None)
    assert [part.fg_bg_sampler for part in (network.net.rpn, network.net.roi_heads)] == samplers
    assert not any(module._forward_hooks for module in network.modules())


def test_levels_are_the_stages_of_a_detector_and_follow_the_size() -> None:
    network = detector("fcos_test_resnet", seed=0)
    found = stages(network)
    assert [stage.stride for stage in found[:3]] == [8, 16, 32]  # though 48 rows become two
    maps = network.eval().pyramid(torch.rand(1, 3, *SIZE))
    assert [stage.grid for stage in found] == [tuple(each.shape[2:]) for each in maps]
    larger = levels(network, (128, 192))
    assert [stage.grid for stage in larger[:3]] == [(16, 24), (8, 12), (4, 6)]
    assert levels(copy.deepcopy(network)) == found
    with pytest.raises(RequestError, match="has 5 levels, and no level 7"):
        extract(network.eval(), torch.rand(1, 3, *SIZE), [7])


def level(index: int, side: int, name: str = "") -> Stage:
    return Stage(index, name or str(index), 8, 512 // side, (side, side), "map")


def test_levels_of_one_size_belong_together() -> None:
    one_stage = [level(number, side) for number, side in enumerate((64, 32, 16, 8, 4))]
    two_stages = [*(level(number, side) for number, side in enumerate((128, 64, 32, 16))), level(4, 8, "pool")]
    assert matched_levels(one_stage, two_stages) == ((0, 1), (1, 2), (2, 3))
    assert matched_levels(two_stages, two_stages) == ((0, 0), (1, 1), (2, 2), (3, 3))
    repeated = [level(0, 16), level(1, 16), level(2, 8, "pool")]  # as torchvision's MobileNet has
    assert matched_levels(repeated, two_stages) == ((1, 3),)
    assert matched_levels(repeated, repeated) == ((0, 0), (1, 1))
    assert matched_levels([level(0, 5)], one_stage) == ()


def test_a_detector_is_folded_and_its_pyramid_stays() -> None:
    network = detector("fasterrcnn_test_resnet", seed=0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    network.eval()
    folded = fold_batch_norm(network)
    assert folded is not network
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.net.backbone.body.modules())
    image, _ = shown()
    with torch.no_grad():
        pairs = zip(folded.pyramid(image), network.pyramid(image), strict=True)
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-4) for one, two in pairs)


def test_neck_and_heads_are_taken_where_they_fit() -> None:
    student, teacher = detector("fcos_test_efficientnet", seed=0), detector("fcos_test_resnet", seed=1)
    before = {name: value.clone() for name, value in student.net.state_dict().items()}
    taken, count = take_neck_and_heads(student, teacher, same_levels=True)
    now, theirs = student.net.state_dict(), teacher.net.state_dict()
    equal = {name for name in now if name in theirs and torch.equal(now[name], theirs[name])}
    heads = {name for name in now if name.startswith("head.")}
    assert heads <= equal and "backbone.fpn.layer_blocks.0.0.weight" in equal
    assert torch.equal(now["backbone.fpn.inner_blocks.0.0.weight"], before["backbone.fpn.inner_blocks.0.0.weight"])
    assert all(torch.equal(now[name], value) for name, value in before.items() if name.startswith("backbone.body."))
    assert taken < count == len([name for name in now if name.startswith(("head.", "backbone.fpn."))])


def test_other_levels_and_other_classes_leave_neck_and_class_layers_alone() -> None:
    teacher = detector("fcos_test_resnet", seed=1, classes=CLASSES[::-1])
    student = detector("fcos_test_resnet", seed=0)
    before = {name: value.clone() for name, value in student.net.state_dict().items()}
    taken, _ = take_neck_and_heads(student, teacher, same_levels=False)
    changed = {name for name, value in student.net.state_dict().items() if not torch.equal(value, before[name])}
    assert taken and changed and all(name.startswith("head.") for name in changed)
    assert not any("cls_logits" in name for name in changed)


def test_two_stages_with_fixed_classes() -> None:
    assert [is_two_stage(detector(name, seed=0)) for name in KINDS] == [False, False, True]
