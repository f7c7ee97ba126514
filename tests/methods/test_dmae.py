"""DMAE: the card's properties, and what every method promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.contract import MethodContract, tiny_batch
from tests.methods.masked_nets import DECODER, tiny_config, tiny_vit
from visionkd.config.load import build_options
from visionkd.methods._masked_teacher import MaskedTeacher, three_quarters
from visionkd.methods._optimizer import Budget
from visionkd.methods.dmae import DMAE, DMAEOptions
from visionkd.models.masked import encode, masking


def build(student=None, teacher=None, **options):
    student, teacher = student or tiny_vit(seed=1), teacher or tiny_vit(seed=2, embed_dim=48, depth=4, num_heads=3)
    config = tiny_config("dmae")
    return DMAE(
        student=student, teachers=[teacher], config=config, options=build_options(DMAEOptions, {**DECODER, **options}),
        budget=Budget(steps_per_epoch=10, epochs=1),
    )  # fmt: skip


def image(size: int = 4) -> torch.Tensor:
    return torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def found(keep: int = 16, size: int = 4):
    return masking(torch.rand(size, 64, generator=torch.Generator().manual_seed(6)), keep)


class TestContract(MethodContract):
    name = "dmae"

    def build(self, **training):
        module = build(copy.deepcopy(tiny_vit(seed=1)))
        module.trainer = _trainer()
        return module.train()


def _trainer():
    from tests.methods.contract import _NoTrainer

    return _NoTrainer()


@pytest.mark.parametrize(("depth", "block"), [(24, 17), (12, 8), (6, 4), (4, 2), (3, 2), (2, 1), (1, 0)])
def test_the_layer_rule_is_three_quarters(depth, block):
    assert three_quarters(depth) == block


def test_the_cut_teacher_gives_the_same_bits_at_its_share_of_the_cost_without_a_decoder():
    whole = tiny_vit(seed=2, embed_dim=48, depth=4, num_heads=3).eval()
    masks = found()
    cut = MaskedTeacher(whole, blocks=(1,)).eval()
    with torch.no_grad():
        expected = encode(whole.net, whole.prepare(image()), masks.ids_keep, blocks=(1,)).features[0]
        with FlopCounterMode(display=False) as part:
            (ours,) = cut(image(), masks.ids_keep, masks.ids_restore)
        with FlopCounterMode(display=False) as full:
            encode(whole.net, whole.prepare(image()), masks.ids_keep)
    assert torch.equal(ours, expected) and ours.shape == (4, 17, 48)
    assert len(whole.net.blocks) == 4 and len(cut.network.net.blocks) == 2 and cut.decoder is None
    assert part.get_total_flops() / full.get_total_flops() == pytest.approx(0.5, abs=0.05)


def test_removed_pixels_reach_the_reconstruction_alone():
    module, masks = build(), found()
    side = torch.nn.functional.interpolate(masks.mask.view(4, 1, 8, 8), scale_factor=4)
    changed = torch.where(side.bool(), 1 - image(), image())
    with torch.no_grad():
        first, second = (module.masked_terms(each, masks) for each in (image(), changed))
        features = [module.teacher_features(each, masks)[0][0] for each in (image(), changed)]
    assert torch.equal(features[0], features[1])
    assert first["alignment_loss"] == second["alignment_loss"]
    assert first["reconstruction_loss"] != second["reconstruction_loss"]


def test_alignment_trains_the_aligned_blocks_and_the_projection_alone():
    module, masks = build(student_blocks=[0], teacher_blocks=[2]), found()
    module.masked_terms(image(), masks)["alignment_loss"].backward()
    named = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("student.net.blocks.0.") for name in named)
    assert any(name.startswith("projectors.projections.0.") for name in named)
    assert not any(name.startswith(("student.net.blocks.1.", "projectors.decoder.")) for name in named)
    assert all(p.grad is None for teacher in module.teachers for p in teacher.parameters())


def test_at_random_weights_alignment_is_that_of_unrelated_directions():
    module, masks = build(), found()
    with torch.no_grad():
        loss = float(module.masked_terms(image(), masks)["alignment_loss"])
    assert loss == pytest.approx(0.8 * (2 / 48) ** 0.5, rel=0.35)


@pytest.mark.parametrize(("ratio", "keep"), [(0.5, 32), (0.75, 16), (0.95, 3), (0.98, 1)])
def test_every_ratio_keeps_what_it_says(ratio, keep):
    module = build(mask_ratio=ratio)
    seen = []
    module.student.net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    module.teachers[0].network.net.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    terms = module.loss_terms(image())
    assert module.keep == keep and seen == [keep + 1, keep + 1]
    assert all(torch.isfinite(term) for term in terms.values())
    said = DMAE.settle(
        student=tiny_vit(seed=1), teachers=module_teachers(), config=tiny_config("dmae"), options=module.options
    )
    assert f"{keep} of 64 patches" in said[0]


def module_teachers():
    return [tiny_vit(seed=2, embed_dim=48, depth=4, num_heads=3)]


def test_another_patch_size_is_met_by_the_teachers_image_size():
    student, teacher = tiny_vit(seed=1), tiny_vit(seed=2, img_size=32, patch_size=8, embed_dim=48, num_heads=3)
    options = build_options(DMAEOptions, DECODER)
    given = {"student": student, "teachers": [teacher], "config": tiny_config("dmae"), "options": options}
    assert DMAE.check(**given) == []
    said = DMAE.settle(**given)
    assert teacher.input.img_size == (64, 64) and any("64 x 64" in text for text in said)
    module = build(student, teacher)
    assert torch.isfinite(module.loss_terms(image())["alignment_loss"])


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"mask_ratio": 0.99}, "options.mask_ratio", "keeps no patch of 64"),
        ({"visible_patches": 64}, "options.visible_patches", "keeps every patch"),
        ({"student_blocks": [2], "teacher_blocks": [1]}, "options.student_blocks", "has no block 2"),
        ({"teacher_blocks": [9]}, "options.teacher_blocks", "has no block 9"),
        ({"student_blocks": [0, 1]}, "options.teacher_blocks", "1 blocks for 2"),
        ({"projection": "none"}, "options.projection", "of the same width"),
        ({"decoder_heads": 3}, "options.decoder_width", "is not a multiple"),
    ],
)
def test_bad_options_are_told(options, key, text):
    problems = DMAE.check(
        student=tiny_vit(seed=1), teachers=module_teachers(), config=tiny_config("dmae"),
        options=build_options(DMAEOptions, {**DECODER, **options}),
    )  # fmt: skip
    assert [(p.key, text in p.message) for p in problems] == [(key, True)], problems


def test_a_teacher_that_is_no_plain_transformer_is_refused():
    from tests.methods.contract import tiny_network

    for teacher in (tiny_network(seed=0), tiny_network("deit_tiny_distilled_patch16_224", seed=0)):
        problems = DMAE.check(
            student=tiny_vit(seed=1), teachers=[teacher], config=tiny_config("dmae"),
            options=build_options(DMAEOptions, DECODER),
        )  # fmt: skip
        assert [p.key for p in problems] == ["--teacher"] and teacher.architecture in problems[0].message


def test_training_lowers_both_terms_on_a_batch():
    module = build(copy.deepcopy(tiny_vit(seed=1)))
    module.trainer = _trainer()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    batch = module.on_after_batch_transfer(tiny_batch(), 0)
    history = []
    for _ in range(25):
        module._seed_step(0)
        terms = module.loss_terms(batch["image"])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    assert all(history[-1][name] < 0.95 * history[0][name] for name in history[0])
