"""G2SD: the card's properties of both stages, and what every method promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.methods.contract import MethodContract, _NoTrainer, tiny_batch
from tests.methods.masked_nets import DECODER, tiny_config, tiny_vit, whole_autoencoder
from visionkd.config.load import build_options
from visionkd.methods._optimizer import Budget
from visionkd.methods._specific import SpecificStage
from visionkd.methods.g2sd import G2SD, G2SDOptions
from visionkd.models.masked import encode, masking
from visionkd.tasks.classification import ClassificationTask

BUDGET = Budget(steps_per_epoch=10, epochs=1)


def options(**given) -> G2SDOptions:
    return build_options(G2SDOptions, {**DECODER, **given})


def teachers():
    return [whole_autoencoder(seed=2, embed_dim=48, num_heads=3), tiny_vit(seed=3, global_pool="avg").eval()]


def generic(student=None, **given) -> G2SD:
    return G2SD(
        student=student or tiny_vit(seed=1), teachers=teachers(), config=tiny_config("g2sd", teachers=2),
        options=options(**given), budget=BUDGET,
    )  # fmt: skip


def specific(**given) -> SpecificStage:
    chosen, config = options(**given), tiny_config("g2sd", teachers=2)
    stage = G2SD.stages(config, chosen)[-1]
    student = G2SD.prepare_student(tiny_vit(seed=1), stage, config, chosen)
    assert G2SD.module_of(stage, chosen) is SpecificStage
    return SpecificStage(
        student=student, teachers=teachers(), config=config, options=chosen, budget=BUDGET,
        task=ClassificationTask(num_classes=4),
    )  # fmt: skip


def image(size: int = 4) -> torch.Tensor:
    return torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def found(keep: int = 16, size: int = 4):
    return masking(torch.rand(size, 64, generator=torch.Generator().manual_seed(6)), keep)


class TestGeneric(MethodContract):
    name = "g2sd"

    def build(self, **training):
        module = generic()
        module.trainer = _NoTrainer()
        return module.train()


class TestSpecific(MethodContract):
    name = "g2sd"

    def build(self, **training):
        module = specific()
        module.trainer = _NoTrainer()
        return module.train()

    def test_state_survives_a_checkpoint(self):
        module, other = self.build(), self.build()
        other.load_state_dict(module.state_dict())


def test_teacher_and_student_keep_the_same_patches_and_hidden_features_are_standardised():
    module, masks, seen = generic(), found(), {}
    module.student.net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0]))
    teacher = module.teachers[0]
    teacher.network.net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0]))
    ((hidden,),) = module.teacher_features(image(), masks)
    module.masked_terms(image(), masks)
    assert seen["student"].shape[:2] == seen["teacher"].shape[:2] == (4, 17) and hidden.shape == (4, 65, 24)
    assert torch.equal(masks.mask.sum(1), torch.full((4,), 48.0))
    assert len(teacher.decoder.blocks) == 2 and teacher.decoder.pred is None  # the middle one of four, and no head


def test_what_the_teacher_says_of_a_removed_patch_does_not_depend_on_its_pixels():
    module, masks = generic(), found()
    side = torch.nn.functional.interpolate(masks.mask.view(4, 1, 8, 8), scale_factor=4)
    changed = torch.where(side.bool(), 1 - image(), image())
    first, second = (module.teacher_features(each, masks)[0][0] for each in (image(), changed))
    assert torch.equal(first, second)


def test_the_generic_loss_is_about_class_kept_and_removed_tokens():
    module, masks = generic(), found()
    grads = {}

    def keep(_, __, output):
        output.register_hook(lambda gradient: grads.update(pred=gradient))

    module.projectors["feature_head"].register_forward_hook(keep)
    module.masked_terms(image(), masks)["generic_loss"].backward()
    per_token = grads["pred"].abs().sum(-1)
    assert per_token.shape == (4, 65) and (per_token > 0).all()
    assert module.projectors["decoder"].norm is None and module.projectors["decoder"].pred is None


def test_at_the_specific_stage_eval_answers_the_mean_of_both_heads():
    module = specific()
    net = module.student.net
    module.train()
    own, distilled = net(module.student.prepare(image()))
    module.eval()
    assert torch.allclose(module.student(image()).logits, (own + distilled) / 2, atol=1e-5)
    assert float(own.detach().abs().max()) < 1e-2  # the class head is as good as silent, so its loss is that of chance
    loss = module.train().loss_terms(image(), torch.arange(4))["task_loss"]
    assert float(loss) == pytest.approx(math.log(4), abs=0.01)


def test_the_token_has_no_place_and_its_order_does_not_matter():
    """The network equals the encoder with the token at the end of its sequence, without a position."""
    student = tiny_vit(seed=1).eval()
    config, chosen = tiny_config("g2sd", teachers=2), options(stages="specific")
    made = G2SD.prepare_student(student, G2SD.stages(config, chosen)[0], config, chosen).eval()
    plain, net = student.net, made.net
    prepared = student.prepare(image())
    tokens = plain._pos_embed(plain.patch_embed(prepared))
    at_end = torch.cat([tokens, net.dist_token.expand(4, -1, -1)], dim=1)
    expected = plain.norm(plain.blocks(at_end))
    ours = net.forward_features(prepared)
    assert torch.allclose(ours[:, 0], expected[:, 0], atol=1e-5)
    assert torch.allclose(ours[:, 1], expected[:, -1], atol=1e-5)
    assert not net.pos_embed[:, 1].any()


def test_training_leaves_the_token_without_a_place():
    module = specific()
    module.trainer = _NoTrainer()
    module.train()
    optimizer = module.configure_optimizers()["optimizer"]
    before = module.student.net.pos_embed.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        sum(module.loss_terms(image(), torch.arange(4)).values()).backward()
        optimizer.step()
    after = module.student.net.pos_embed
    assert not after[:, 1].any() and not torch.equal(after[:, 2:], before[:, 2:])


def test_only_the_teachers_first_class_counts():
    module = specific().train()
    terms = module.loss_terms(image(), torch.arange(4))
    logits = module.teacher_outputs(image())[0].logits
    order = torch.argsort(logits, dim=1, descending=True)
    shuffled = torch.zeros_like(logits).scatter(1, order, torch.tensor([9.0, 1.0, 3.0, 2.0]).expand(4, 4))
    module.teacher_outputs = lambda _: (type("Output", (), {"logits": shuffled})(),)
    assert module.loss_terms(image(), torch.arange(4))["hard_label_loss"] == terms["hard_label_loss"]


def test_nkd_takes_no_token():
    module = specific(specific_loss="nkd")
    assert not hasattr(module.student.net, "dist_token")
    loss = module.train().loss_terms(image(), torch.arange(4))
    assert loss.keys() == {"nkd_loss"} and torch.isfinite(loss["nkd_loss"])


def test_the_stages_have_settings_of_their_own():
    config = tiny_config("g2sd", teachers=2, augment={"mixup_alpha": 0.8})
    first, last = G2SD.stages(config, options(generic_epochs=7, generic_lr=0.5))
    assert (first.name, first.kind, first.epochs) == ("generic", "generic", 7) and last.kind == "specific"
    assert first.settings["augment.mixup_alpha"] == 0.0 and first.settings["optimizer.lr"] == 0.5
    assert [stage.kind for stage in G2SD.stages(config, options(stages="generic"))] == ["generic"]
    assert G2SD.pretrains(options(stages="generic")) and not G2SD.pretrains(options())
    asked = [G2SD.asks(teacher, options()) for teacher in teachers()]
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("given", "chosen", "key", "text"),
    [
        (lambda: teachers()[1:], {}, "--teacher", "without the decoder"),
        (lambda: teachers()[:1], {}, "--teacher", "there is none"),
        (teachers, {"teacher_decoder_block": 5}, "options.teacher_decoder_block", "has no block 5"),
    ],
)
def test_teachers_that_do_not_serve_are_told(given, chosen, key, text):
    problems = G2SD.check(
        student=tiny_vit(seed=1), teachers=given(), config=tiny_config("g2sd", teachers=2), options=options(**chosen)
    )
    assert [(p.key, text in p.message) for p in problems] == [(key, True)], problems


def test_a_student_that_averages_its_patches_takes_no_token():
    student = tiny_vit(seed=1, global_pool="avg")
    given = {"student": student, "teachers": teachers(), "config": tiny_config("g2sd", teachers=2)}
    assert "pools its tokens" in G2SD.check(**given, options=options())[0].message
    assert G2SD.check(**given, options=options(specific_loss="nkd")) == []


def test_on_a_batch_the_loss_falls_below_that_of_saying_nothing():
    module = generic(copy.deepcopy(tiny_vit(seed=1)))
    module.trainer = _NoTrainer()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    batch = module.on_after_batch_transfer(tiny_batch(), 0)["image"]
    for _ in range(60):
        module._seed_step(0)
        loss = module.loss_terms(batch)["generic_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * 0.247  # the mean of the loss where the prediction is zero


def test_a_grid_of_another_size_rebuilds_the_decoders_positions():
    student, teacher = tiny_vit(seed=1), whole_autoencoder(seed=2, patch_size=8)
    chosen = options(stages="generic")
    given = {"student": student, "teachers": [teacher], "config": tiny_config("g2sd"), "options": chosen}
    assert G2SD.check(**given) == []
    G2SD.settle(**given)
    module = G2SD(**given, budget=BUDGET)
    assert module.teachers[0].decoder.pos_embed.shape == (1, 65, 24)
    assert encode(teacher.net, teacher.prepare(image()), found().ids_keep).tokens.shape == (4, 17, 32)
