"""HARD: what its card says a faithful implementation must show. Numbers in names are the card's."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from PIL import Image

from tests.methods.contract import MethodContract, tiny_batch, tiny_network
from visionkd.config.schema import DistillConfig, HardAugmentConfig
from visionkd.methods._learned_augmentation import LearnedAugmentation, with_learned_augmentation
from visionkd.methods._optimizer import Budget
from visionkd.methods._turns import READ_EVERY, Turns
from visionkd.methods.hard import Divergence, Hard, HardOptions
from visionkd.methods.kd import KD, KDOptions
from visionkd.tasks.classification import ClassificationTask

TRANSLATION = {"augmentors": ("affine",), "affine": "translation"}


class TestHard(MethodContract):
    name = "hard"


class TestHardWhileItAugments(MethodContract):
    name = "hard"

    def build(self, **training):
        module = super().build(**training)
        module._turns.first = 0  # no warm-up
        return module


class TestKDWithLearnedAugmentation(TestHardWhileItAugments):
    name = "kd"

    @property
    def method(self):
        return with_learned_augmentation(KD)


class Trainer:
    """Stands for Lightning's Trainer."""

    current_epoch = global_rank = 0
    world_size = 1
    strategy = type("Strategy", (), {"all_gather": staticmethod(lambda tensor, **kwargs: tensor)})()

    def __init__(self, directory=None):
        self.default_root_dir = directory


def build(
    method=Hard, *, options=None, hard=None, seed=1, teacher=None, student=None, steps=40, directory=None, **training
):
    """A module with the game on from the first step."""
    config = DistillConfig(
        student={"name": "cifar_resnet8"},
        teachers=[{"name": "cifar_resnet8"}],
        augment={"hard": {**TRANSLATION, "warmup": 0.0, "cooldown": 0.0, **(hard or {})}},
        optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_epochs": 0},
        training={"seed": seed, **training},
    )
    module = method(
        student=student or tiny_network(seed=1),
        teachers=[teacher or tiny_network(seed=2)],
        task=ClassificationTask(num_classes=4),
        config=config,
        options=options or HardOptions(),
        budget=Budget(steps_per_epoch=steps, epochs=1),
    )
    module.trainer = Trainer(directory)
    module.on_train_start()
    module.train()
    module.test_optimizer = module.configure_optimizers()["optimizer"]
    return module


def run(module, steps, *, first=0):
    """Drive a module as Lightning does: the closure runs inside of optimizer_step."""
    batches = [module.on_after_batch_transfer(tiny_batch(seed=number, size=4), 0) for number in range(4)]
    accumulate = module.config.training.accumulate
    for step in range(first, first + steps):
        for number in range(accumulate):
            index = step * accumulate + number

            def closure(index=index, number=number):
                loss = module.training_step(batches[index % 4], index)
                if number == 0:
                    module.test_optimizer.zero_grad()
                loss.backward()
                return loss

            if number < accumulate - 1:
                closure()
            else:
                module.optimizer_step(0, index, module.test_optimizer, closure)


def at_identity(module):
    with torch.no_grad():
        for part in module.augmentor.parts.values():
            part.values.mean.zero_()
            part.values.log_std.fill_(-30.0)
    return module


def states(module):
    """Copies of everything but phi: student with its buffers, teachers."""
    return copy.deepcopy([module.student.state_dict(), *(teacher.state_dict() for teacher in module.teachers)])


def equal(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def phi(module):
    return torch.cat([p.detach().flatten() for p in module._phi]).clone()


def objective(module, image, **weights):
    """-(what the augmentor minimises), its divergence term and its consistency term, for the noise of seed 5."""
    from visionkd.losses.disagreement import augmentor_loss

    module.student.eval()
    with torch.no_grad():
        augmented = module.augmented(image, torch.Generator().manual_seed(5))
        found = augmentor_loss(
            student_logits=module.student(augmented).logits,
            teacher_logits=[t.logits for t in module.teacher_outputs(augmented)],
            teacher_clean_probs=module.soft_label(module.teacher_outputs(image)),
            **weights,
        )
    module.student.train()
    return -found.loss.item(), found.disagreement.item(), found.teacher_consistency.item()


def images(size=16):
    """Smooth pictures: noise has no shift that a network would notice less than another."""
    small = torch.rand(size, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(small, size=32, mode="bicubic").clamp(0, 1)


def test_1_at_identity_a_step_is_that_of_plain_distillation():
    module = at_identity(build(hard={"batch": "both", "augmentors": ("affine", "color")}))
    plain = build(Divergence)
    image = images()
    augmented = module.augmented(image)
    assert torch.allclose(augmented, image, atol=1e-4)
    assert objective(module, image)[2] < 1e-5
    for each in (module, plain):
        each.training_step({"image": image, "target": torch.zeros(16, dtype=torch.int64)}, 0).backward()
    for mine, other in zip(module.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-2, atol=1e-5)


def test_2_the_students_turn_leaves_phi_and_teacher_alone(monkeypatch):
    module = build()
    before, teacher, learned, seen = states(module), states(module)[1:], phi(module), []
    forward = module.student_output
    monkeypatch.setattr(module, "student_output", lambda image: seen.append(image) or forward(image))
    run(module, 1)
    assert not module._turns.augmentor and len(seen) == 2
    assert not any(image.requires_grad for image in seen)
    assert torch.equal(phi(module), learned) and equal(states(module)[1:], teacher)
    assert not equal(states(module)[:1], before[:1])


def test_3_the_augmentors_turn_moves_phi_alone():
    module = build(ema_decay=0.5)
    run(module, 2)
    module._turns.augmentor = True
    before, learned, averaged = states(module), phi(module), copy.deepcopy(module.ema.state_dict())
    run(module, 2, first=2)
    assert not torch.equal(phi(module), learned)
    assert equal(states(module), before) and equal([module.ema.state_dict()], [averaged])
    assert module.student.training and all(part.training for part in module.student.modules())
    assert all(p.grad is None for teacher in module.teachers for p in teacher.parameters())


def test_3_no_gradient_of_the_augmentors_turn_is_missing_or_other_than_zero():
    module = build()
    module._turns.augmentor = True
    batch = module.on_after_batch_transfer(tiny_batch(), 0)
    loss = module.training_step(batch, 0)
    loss.backward()  # DDP waits for one of every parameter
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 3.0), (1.0, 0.0), (0.0, 1.0)])
def test_3_a_small_step_raises_what_the_augmentor_wants(weights):
    names = ("disagreement_weight", "consistency_weight")
    settings = dict(zip(names, weights, strict=True))
    module, image = build(hard={**settings, "std": 0.1, "lr": 1e-3}), images()
    module._noise.manual_seed(5)
    before = objective(module, image, **settings)[0]
    module._add_gradients(image, None)
    module._step_augmentor()
    assert objective(module, image, **settings)[0] > before


def test_4_a_student_equal_to_its_teacher_gives_no_disagreement_and_no_gradient():
    for std, shift in ((0.02, 0.0), (0.2, 0.3)):
        module = build(
            hard={"consistency_weight": 0.0, "std": std}, teacher=tiny_network(seed=4), student=tiny_network(seed=4)
        )
        with torch.no_grad():
            module.augmentor.parts["affine"].values.mean.fill_(shift)
        module._add_gradients(images(), None)
        assert max(p.grad.abs().max().item() for p in module._phi) < 1e-4
        assert module.take_train_metrics()["train/disagreement"] == pytest.approx(0.0, abs=1e-5)


def test_5_what_each_weight_does_alone():
    found = {}
    for name, weights in (("calm", (0.0, 1.0)), ("attack", (1.0, 0.0))):
        settings = dict(zip(("disagreement_weight", "consistency_weight"), weights, strict=True))
        module, image = build(hard={**settings, "lr": 0.05, "max_shift": 0.8}), images(8)
        with torch.no_grad():
            module.augmentor.parts["affine"].values.mean.fill_(0.2)
        before = objective(module, image)[2]
        for _ in range(10):
            module._noise.manual_seed(5)
            module._add_gradients(image, None)
            module._step_augmentor()
        found[name] = objective(module, image)[2] / before
    assert found["calm"] < 0.7 and found["attack"] > 1.3


def script(turns, agreements):
    """Play a list of agreements (clean: 1), one a step; return whose turn each step was."""
    whose = []
    for value in agreements:
        whose.append(turns.augmentor)
        turns.after_step(lambda value=value: (value, 1.0))
    return whose


def make_turns(total, **hard):
    return Turns(HardAugmentConfig(**hard), total)


def test_6_turns_have_hysteresis():
    turns = make_turns(1000, warmup=0.1, max_step_share=0.5, upper=0.9, lower=0.7)
    whose = script(turns, [1.0] * 100)
    assert not any(whose) and turns.augments  # the warm-up
    script(turns, [0.8] * 20)
    assert not turns.augmentor  # between the thresholds the student goes on
    script(turns, [0.95] * READ_EVERY)
    assert turns.augmentor
    script(turns, [0.8] * 20)
    assert turns.augmentor  # and so does the augmentor
    script(turns, [0.6] * READ_EVERY)
    assert not turns.augmentor
    ended = [(who, share >= 0.9) for who, _, share in turns.ended]
    assert ended == [("student", True), ("augmentor", False)]


def test_6_an_augmentor_that_achieves_nothing_is_stopped_and_kept_within_its_share():
    turns = make_turns(2000, warmup=0.0, cooldown=0.1, max_steps=30, max_step_share=0.25)
    whose = script(turns, [1.0] * 2000)
    lengths = [len(part) for part in "".join("a" if w else "s" for w in whose).split("s") if part]
    assert max(lengths) == 30
    assert sum(whose) / 2000 == pytest.approx(0.25, abs=0.05)
    assert not any(whose[1800:])  # the cool-down


def test_6_all_ranks_decide_from_the_mean_of_all():
    module = build()
    module._agreements.add(torch.tensor(0.2), torch.tensor(0.5))
    read = module._agreements.read(lambda own: (own + torch.tensor([0.06, 0.05])) / 2)  # another rank's beside ours
    assert read == pytest.approx(((0.02 + 0.06) / 2 / 0.1, (0.05 + 0.05) / 2 / 0.1))


def test_8_runs_repeat_and_their_students_know_no_augmentor():
    runs = []
    for noise in (1, 2):
        module = build(hard={"augmentors": ("affine", "color", "mix")})
        torch.manual_seed(noise)
        run(module, 3)
        module._turns.augmentor = True
        run(module, 3, first=3)
        runs.append(module)
    assert equal(states(runs[0]), states(runs[1])) and torch.equal(phi(runs[0]), phi(runs[1]))
    assert runs[0].student.state_dict().keys() == tiny_network(seed=1).state_dict().keys()
    owned = {id(p) for p in runs[0].parameters()}
    assert not owned & {id(p) for p in runs[0].augmentor.parameters()}


@pytest.mark.parametrize(("augmentors", "accumulate"), [(("affine", "color"), 2), (("vdvae",), 1)])
def test_a_resumed_run_is_the_same_to_the_bit(accumulate, augmentors):
    settings = {
        "hard": {"augmentors": augmentors, "vae_steps": 2, "upper": 0.05, "lower": 0.01, "max_steps": 4, "lr": 0.02},
        "accumulate": accumulate,
        "batch_size": 8 * accumulate,
    }
    whole = build(**settings)
    run(whole, 16)
    assert whole._turns.augmentor_steps > 0
    killed = build(**settings)
    for stop, first in ((1, 0), (12, 1)):  # in the training of the autoencoder, and in a turn of the augmentor
        run(killed, stop, first=first)
        checkpoint = {"weights": killed.state_dict(), "sgd": killed.test_optimizer.state_dict()}
        killed.on_save_checkpoint(checkpoint)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        killed = build(**settings)
        killed.load_state_dict(loaded["weights"])
        killed.test_optimizer.load_state_dict(loaded["sgd"])
        killed.on_load_checkpoint(loaded)
        killed.on_train_start()
    run(killed, 3, first=13)
    assert killed._turns.state_dict() == whole._turns.state_dict()
    assert equal(states(killed), states(whole)) and torch.equal(phi(killed), phi(whole))


def test_turns_change_only_between_optimiser_steps():
    module = build(hard={"upper": 0.05, "lower": 0.01}, accumulate=3, batch_size=24)
    seen = []
    step = module.training_step
    module.training_step = lambda batch, index: seen.append((index // 3, module._turns.augmentor)) or step(batch, index)
    run(module, 12)
    assert {turn for _, turn in seen} == {True, False}
    assert len(set(seen)) == 12  # one turn for each optimiser step


def test_stored_answers_stand_for_those_on_clean_images_only():
    module, image = build(hard={"batch": "both"}), images(8)
    target = torch.zeros(8, dtype=torch.int64)
    probs = module.soft_label(module.teacher_outputs(image))
    asked = []
    forward = module.frozen.forwards[0]
    module.frozen.forwards[0] = lambda seen: asked.append(seen) or forward(seen)
    module._noise.manual_seed(0)
    stored = module.loss_terms(image, target, probs)
    assert len(asked) == 1 and not torch.equal(asked[0], image)
    module._noise.manual_seed(0)
    assert torch.allclose(module.loss_terms(image, target)["kd_loss"], stored["kd_loss"], rtol=1e-5)
    asked.clear()
    module._add_gradients(image, probs)
    assert len(asked) == 1


def test_labels_count_on_clean_images_at_full_weight():
    module = at_identity(build(with_learned_augmentation(KD), options=KDOptions(), hard={"batch": "both"}))
    plain = build(KD, options=KDOptions())
    image, target = images(8), torch.arange(8) % 4
    mine, theirs = module.loss_terms(image, target), plain.loss_terms(image, target)
    assert mine["task_loss"].item() == pytest.approx(theirs["task_loss"].item(), rel=1e-5)
    assert mine["kd_loss"].item() == pytest.approx(theirs["kd_loss"].item(), rel=1e-3)


def test_the_augmentation_goes_around_other_methods_but_not_around_features():
    made = with_learned_augmentation(KD)
    assert issubclass(made, KD) and issubclass(made, LearnedAugmentation)
    assert made.needs == {"probabilities", "gradients"} and with_learned_augmentation(Hard) is Hard

    class Maps(KD):
        needs = frozenset({"probabilities", "features"})

    config = build().config
    given = {"student": tiny_network(seed=1), "config": config, "options": KDOptions()}
    assert made.check(teachers=[tiny_network(seed=2)], **given) == []
    found = with_learned_augmentation(Maps).check(teachers=[tiny_network(seed=2)], **given)
    assert [problem.key for problem in found] == ["augment.learned"] and "features" in found[0].message
    assert [problem.key for problem in made.check(teachers=[], **given)] == ["augment.learned"]
    sharded = config.model_copy(update={"compute": config.compute.model_copy(update={"strategy": "fsdp"})})
    found = made.check(teachers=[tiny_network(seed=2)], **{**given, "config": sharded})
    assert [problem.key for problem in found] == ["compute.strategy"]


def test_unlabelled_images_go_with_it_unless_labels_are_asked_for():
    config = build().config
    config.data.unlabeled = "somewhere"
    given = {"student": None, "teachers": [None], "config": config}
    assert not Hard.uses_labels and Hard.check(options=HardOptions(), **given) == []
    found = Hard.check(options=HardOptions(task_loss_weight=0.5), **given)
    assert [problem.key for problem in found] == ["options.task_loss_weight"]


def test_pictures_are_kept_over_the_training(tmp_path):
    module = build(steps=8, directory=tmp_path)
    run(module, 8)
    files = sorted((tmp_path / "augmentations").iterdir())
    assert [file.name for file in files] == [f"step_{step:07d}.png" for step in range(9)]
    first, last = (json.loads(Image.open(files[index]).text["augmentation"]) for index in (0, -1))
    assert Image.open(files[0]).size == (4 * 32, 2 * 32)
    assert first["step"] == 0 and last["epoch"] == 1.0
    assert len(last["student"]) == len(last["teacher"]) == last["images"] == 4
    assert last["parameters"]["shift across, % of width"]["std"] == pytest.approx(2.5, rel=1e-3)
