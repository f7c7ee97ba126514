from __future__ import annotations

import copy

import pytest
import torch

from tests.methods.contract import NUM_CLASSES, _NoTrainer, tiny_network
from tests.methods.dense_contract import SIZE, DenseContract, dense_batch, dense_network
from visionkd.config.schema import DistillConfig
from visionkd.errors import RequestError
from visionkd.hub.package import load_package, save_package
from visionkd.losses.lad import fixed_codes
from visionkd.methods._optimizer import Budget
from visionkd.methods._privileged import PrivilegedTeacher
from visionkd.methods.lad import LAD, LADOptions
from visionkd.models.label_input import sees_labels, with_label_input
from visionkd.tasks.segmentation import SegmentationTask

CONFIG = DistillConfig(
    student={"name": "s"}, teachers=[{"name": "t"}], method="lad",
    optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 0.0}, schedule={"name": "constant", "warmup_epochs": 0},
)  # fmt: skip


class TestLAD(DenseContract):
    name = "lad"

    def network(self, name, *, seed):
        return dense_network(name, seed=seed, aux=name.startswith("fpn"))

    def teacher(self, name, *, seed):
        return with_label_input(self.network(name, seed=seed), std=0.1, seed=seed)

    def test_buffers_of_the_teacher_stay_and_its_answer_depends_on_the_labels(self):
        module, batch = self.build(), dense_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        torch.manual_seed(0)
        logits = module.privileged_logits(image, batch["target"])
        torch.manual_seed(0)
        other = module.privileged_logits(image, batch["target"].flip(0))
        assert not logits.requires_grad and not torch.equal(logits, other)

    def test_the_auxiliary_head_learns_a_little(self):
        assert LADOptions().aux_weight == 0.02
        module = self.build()
        self.step(module, dense_batch()).backward()
        assert module.student.net.aux_head[-1].weight.grad.abs().max() > 0


@pytest.fixture
def training() -> PrivilegedTeacher:
    module = PrivilegedTeacher(
        student=with_label_input(dense_network("fpn_cifar_resnet8", seed=1, aux=True), std=0.1, seed=1),
        task=SegmentationTask(num_classes=NUM_CLASSES), config=CONFIG, options=LADOptions(),
        budget=Budget(steps_per_epoch=10, epochs=2),
    )  # fmt: skip
    module.trainer = _NoTrainer()
    return module.train()


def test_both_paths_of_the_teacher_are_recoded_and_learn(training):
    seen = []
    training.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    loss = training.training_step(training.on_after_batch_transfer(dense_batch(), 0), 0)
    loss.backward()
    assert len(seen) == 2 and torch.equal(seen[0][:, :3], seen[1][:, :3])
    assert (seen[0][:, 3] - seen[1][:, 3]).abs().mean() > 0.5
    assert (seen[0][0, 3] - seen[0][1, 3]).abs().mean() > 0.1  # images of a batch do not share their codes
    assert not [name for name, p in training.named_parameters() if p.requires_grad and p.grad is None]
    found = training.take_train_metrics()
    expected = found["train/task_loss"] + 5 * found["train/consistency_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_equal_recodings_are_consistent_in_eval_mode(training):
    training.eval()
    training.recoded = lambda target: torch.zeros(len(target), 1, *target.shape[1:])
    batch = training.on_after_batch_transfer(dense_batch(), 0)
    with torch.no_grad():
        terms = training.loss_terms(batch["image"], batch["target"])
    assert terms["consistency_loss"] == pytest.approx(0.0, abs=1e-5)


def test_validation_shows_the_labels_and_its_last_one_wrong_ones_too(training):
    seen = []
    training.log_dict = lambda *args, **kwargs: None
    training.all_gather = lambda tensor: tensor
    training.student.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 3].detach().clone()))
    training.eval()
    batch = training.on_after_batch_transfer(dense_batch(), 0)
    # maps at their own size, as a validation loader gives them
    batch["target"] = [each.repeat_interleave(2, 0).repeat_interleave(2, 1) for each in batch["target"]]
    with torch.no_grad():
        training.validation_step(batch, 0)
    assert len(seen) == 1 and set(training._diagnostics) == {"other_label", "no_label"}
    code = 1.75 * fixed_codes(NUM_CLASSES)
    small = dense_batch()["target"].long()
    assert torch.allclose(seen[0], code[torch.where(small == 255, NUM_CLASSES, small)])
    training.on_validation_epoch_end()
    assert set(training.epoch_metrics) == {"val/miou", "val/pixel_acc", "val/loss"}
    training.trainer.current_epoch = 1
    with torch.no_grad():
        training.validation_step(batch, 0)
    assert torch.equal(seen[2], seen[1].roll(1, 0)) and torch.equal(seen[3], torch.full_like(seen[3], code[-1]))
    training.on_validation_epoch_end()
    assert {"val/miou_other_label", "val/miou_no_label"} <= set(training.epoch_metrics)


def test_a_new_label_plane_keeps_the_image_and_what_the_network_makes_of_it():
    plain = dense_network("fpn_cifar_resnet8", seed=0).eval()
    image = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = plain(image).logits
        wide = with_label_input(copy.deepcopy(plain), std=0.1, seed=3)
        blind = wide(torch.cat([image, torch.zeros(2, 1, *SIZE)], 1)).logits
        assert torch.allclose(blind, expected, rtol=1e-4, atol=1e-5)
        shown = wide(torch.cat([image, torch.ones(2, 1, *SIZE)], 1)).logits
    assert (shown - expected).abs().max() > 1e-3
    assert sees_labels(wide) and not sees_labels(plain)
    again = with_label_input(copy.deepcopy(plain), std=0.1, seed=3)
    assert all(torch.equal(one, two) for one, two in zip(wide.parameters(), again.parameters(), strict=True))


def test_a_teacher_that_sees_labels_survives_its_package(tmp_path):
    wide = with_label_input(dense_network("fpn_cifar_resnet8", seed=0), std=0.1, seed=3).eval()
    save_package(wide, tmp_path / "teacher", task="segmentation", classes=None, metrics={}, origin={})
    loaded, _ = load_package(tmp_path / "teacher")
    image = torch.rand(2, 4, *SIZE)
    assert sees_labels(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(image).logits, wide(image).logits)


def test_a_network_that_begins_otherwise_is_refused():
    wide = with_label_input(dense_network("fpn_cifar_resnet8", seed=0), std=0.1, seed=3)
    with pytest.raises(RequestError, match="three channels"):
        with_label_input(wide, std=0.1, seed=3)


def problems(options: LADOptions, *, teachers=1, wide=False) -> str:
    student = dense_network("fpn_cifar_resnet8", seed=0)
    teacher = dense_network("fcn_cifar_resnet8", seed=1)
    if wide:
        with_label_input(teacher, std=0.1, seed=0)
    found = LAD.check(student=student, teachers=[teacher] * teachers, config=CONFIG, options=options)
    return " ".join(f"{each.key} {each.message}" for each in found)


def test_what_cannot_work_is_told_before_the_training():
    assert "--teacher lad trains one teacher, and 2 are named" in problems(LADOptions(), teachers=2)
    assert "options.teacher_epochs 0 takes the teacher as it is" in problems(LADOptions(teacher_epochs=0))
    assert problems(LADOptions(teacher_epochs=0), wide=True) == "" == problems(LADOptions())
    classifier = tiny_network(seed=0)
    found = LAD.check(student=classifier, teachers=[classifier], config=CONFIG, options=LADOptions())
    assert "names images" in found[0].message


def test_the_teacher_is_trained_first_with_settings_of_its_own():
    first, second = LAD.stages(CONFIG, LADOptions(teacher_epochs=7, teacher_lr=0.5))
    assert (first.trains, first.epochs, first.settings) == ("teacher", 7, {"optimizer.lr": 0.5})
    assert (second.name, second.trains) == ("distill", "student")
    assert LAD.module_of(first, LADOptions()) is PrivilegedTeacher and LAD.module_of(second, LADOptions()) is LAD
    plain = dense_network("fpn_cifar_resnet8", seed=0)
    assert LAD.prepare_student(plain, second, CONFIG, LADOptions()) is plain and not sees_labels(plain)
    assert sees_labels(LAD.prepare_student(plain, first, CONFIG, LADOptions()))


def scenes(size: int, *, seed: int) -> dict[str, torch.Tensor]:
    """Rectangles of three classes on a background, under noise in which a pixel says little."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(size, *SIZE, dtype=torch.uint8)
    for image in target:
        for value in (1, 2, 3):
            top, left = torch.randint(0, 20, (2,), generator=generator).tolist()
            image[top : top + 12, left : left + 16] = value
    colours = torch.tensor([[90.0, 90, 90], [170, 90, 90], [90, 170, 90], [90, 90, 170]])
    image = colours[target.long()].permute(0, 3, 1, 2) + 300 * torch.randn(size, 3, *SIZE, generator=generator)
    return {"image": image.clamp(0, 255).to(torch.uint8), "target": target}


@pytest.mark.slow
@pytest.mark.parametrize("std", [1.0, 0.1])
def test_a_teacher_looks_at_labels_and_image_where_the_label_channel_begins_strong(training, std):
    optimizer = training.configure_optimizers()["optimizer"]
    with_label_input(plain := dense_network("fpn_cifar_resnet8", seed=1), std=std, seed=1)
    training.student.load_state_dict(plain.state_dict(), strict=False)
    training.log_dict = lambda *args, **kwargs: None
    training.all_gather = lambda tensor: tensor
    for step in range(300):
        torch.manual_seed(step)
        batch = training.on_after_batch_transfer(scenes(8, seed=100 + step), 0)
        loss = training.total(training.loss_terms(batch["image"], batch["target"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.trainer.current_epoch = 1
    training.eval()
    with torch.no_grad():
        training.validation_step(training.on_after_batch_transfer(scenes(32, seed=1), 0), 0)
    training.on_validation_epoch_end()
    found = training.epoch_metrics
    gains = [found["val/miou"] - found[f"val/miou_{name}"] for name in ("other_label", "no_label")]
    assert min(gains) > 8.0 if std == 1.0 else max(map(abs, gains)) < 3.0, found
