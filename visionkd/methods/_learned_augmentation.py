"""HARD's game around any method that learns from the teacher's logits: student and augmentor take turns.

In the student's turn its method's own loss is taken on clean and on augmented images x' (made without gradient). In the
augmentor's turn the augmentor's parameters phi alone are trained, to minimise
``-lambda_s * D(t(x'), s(x')) + lambda_t * D(t(x), t(x'))``. :mod:`._turns` decides whose turn it is.

The augmentor, its optimiser and the turns are no part of the module tree: no wrapper, optimiser or package sees them.
They are in the checkpoint, so that a resumed run is the same to the bit.

Nix, Burg and Sinz, "HARD: Hard Augmentations for Robust Distillation", 2023, arXiv 2305.14890; docs/methods/hard.md
says what of this is theirs and what is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.losses.disagreement import augmentor_loss
from visionkd.methods._augmentation_pictures import FOLDER, Pictures
from visionkd.methods._augmentors import Gaussians, build_augmentor
from visionkd.methods._base import DistillationModule
from visionkd.methods._optimizer import step_together
from visionkd.methods._turns import Turns
from visionkd.methods._vdvae import Pretraining, find_vae, save_vae
from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.types import Output

#: What the logs hold beside the method's terms: agreements as shares of the images, and the share of augmentor steps.
LOGGED = ("disagreement", "teacher_consistency", "agreement", "clean_agreement", "augmentor_steps")
_KEY = "learned_augmentation"
_STREAM = 7


class LearnedAugmentation(DistillationModule):
    """Mixin, to stand before a method: ``class Hard(LearnedAugmentation, SomeMethod)``."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        settings = self.config.augment.hard
        hidden = self.__dict__  # past nn.Module.__setattr__, which would register it as a submodule
        hidden["augmentor"] = build_augmentor(settings, seed=self.config.training.seed)
        self._phi = self.augmentor.learned()
        spreads = [part.log_std for part in self.augmentor.modules() if isinstance(part, Gaussians)]
        others = [p for p in self._phi if not any(p is spread for spread in spreads)]
        groups = [{"params": others}, {"params": spreads, "lr": settings.std_lr}]
        self._augmentor_optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=settings.lr)
        self._pretraining = Pretraining(self.augmentor, settings)
        self._turns = Turns(settings, self.budget.steps_per_epoch * self.budget.epochs)
        self._turns.waiting = self._pretraining.steps_left > 0
        self._agreements = Agreements(settings.decay)
        self._agreement: Tensor | None = None
        self._pictures = Pictures(self.budget)
        self._noise = torch.Generator()
        self._loaded: dict[str, Any] | None = None

    # What the method says about itself --------------------------------------------------------------------------------

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[Problem]:
        problems = super().check(student=student, teachers=teachers, config=config, options=options)
        more = ", ".join(sorted(cls.needs - {"probabilities", "gradients"}))
        if more:
            message = f"'hard' goes with methods that learn from the teacher's answers, and this one needs its {more}"
            problems.append(Problem("augment.learned", message, "Take --method kd, or leave the augmentation out."))
        if not teachers:
            problems.append(Problem("augment.learned", "'hard' needs a teacher", "Use it with 'visionkd distill'."))
        if config.compute.strategy == "fsdp":
            message = "fsdp does not go with a learned augmentation"
            problems.append(Problem("compute.strategy", message, "Use --strategy ddp."))
        return problems + find_vae(config.augment.hard)

    def loss_weights(self) -> Mapping[str, float]:
        return {**super().loss_weights(), **dict.fromkeys(LOGGED, 0.0)}

    # A step -----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._take_picture(batch["image"])
        if not self._turns.augmentor:
            loss = super().training_step(batch, batch_idx)
            if self._pretraining.steps_left:
                self._pretrain(batch["image"])
            return loss
        self._seed_step(batch_idx)
        image, _, teacher_probs = self.mixed(batch)
        _, part = self._parts(len(image))
        self._add_gradients(image[part], None if teacher_probs is None else teacher_probs[part])
        # DDP waits for a gradient of every parameter that trains, and none of them shall change
        return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        """The student's turn: the method's own terms on clean and on augmented images; labels count on clean ones."""
        if not self._turns.augments:
            return super().loss_terms(image, target, teacher_probs)
        clean, part = self._parts(len(image))
        with torch.no_grad():
            augmented = self.augmented(image[part])
        more = super().loss_terms(augmented, target[part])
        agreement, share = self._agreement, self.config.augment.hard.share
        terms, clean_agreement = more, torch.ones_like(agreement)
        if clean.stop:
            probs = None if teacher_probs is None else teacher_probs[clean]
            terms = super().loss_terms(image[clean], target[clean], probs)
            clean_agreement = self._agreement
        self._agreements.add(agreement, clean_agreement)
        merged = {name: (1.0 - share) * term + share * more[name] for name, term in terms.items()}
        if "task_loss" in terms:
            merged["task_loss"] = terms["task_loss"]
        steps = torch.zeros_like(agreement)
        return {**merged, "agreement": agreement, "clean_agreement": clean_agreement, "augmentor_steps": steps}

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        self._agreement = _agreement(student.logits, self.soft_label(teachers))
        return super().distill_loss(student=student, teachers=teachers, target=target)

    def augmented(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return x' for images in [0, 1], B x 3 x H x W, in float32 whatever the precision of the run."""
        with torch.autocast(image.device.type, enabled=False):
            return self.augmentor(image, generator or self._noise).to(memory_format=self.memory_format)

    def _parts(self, count: int) -> tuple[slice, slice]:
        """Return which images of a batch the student sees clean, and which augmented."""
        settings = self.config.augment.hard
        if settings.batch == "both":
            return slice(0, count if settings.share < 1.0 else 0), slice(0, count)
        kept = min(count - 1, round((1.0 - settings.share) * count))
        return slice(0, kept), slice(kept, count)

    def _add_gradients(self, image: Tensor, teacher_probs: Tensor | None) -> None:
        """The augmentor's turn: add to phi's gradients those of one batch, and leave everything else as it is."""
        settings, half = self.config.augment.hard, self.config.training.precision == "16"
        if teacher_probs is None:
            teacher_probs = self.soft_label(self.teacher_outputs(image))
        augmented = self.augmented(image)
        # float16 without loss scaling would lose small gradients
        with evaluating(self.student), torch.autocast(image.device.type, enabled=False) if half else nullcontext():
            student = self.student_output(augmented)
            teachers = self._teachers_with_gradient(augmented)
        found = augmentor_loss(
            student_logits=student.logits,
            teacher_logits=[teacher.logits for teacher in teachers],
            teacher_clean_probs=teacher_probs,
            temperature=self.teacher_temperature,
            disagreement_weight=settings.disagreement_weight,
            consistency_weight=settings.consistency_weight,
        )
        gradients = torch.autograd.grad(found.loss / self.config.training.accumulate, self._phi)
        for parameter, gradient in zip(self._phi, gradients, strict=True):
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)  # one image must not be the end of phi
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        agreement = _agreement(student.logits, self.soft_label(teachers))
        self._agreements.add(agreement)
        logged = {"disagreement": found.disagreement, "teacher_consistency": found.teacher_consistency}
        self._train_means.add({**logged, "agreement": agreement, "augmentor_steps": torch.ones_like(agreement)})

    def _teachers_with_gradient(self, image: Tensor) -> tuple[Output, ...]:
        """Run every teacher as :meth:`teacher_outputs` does, with gradient to the image; float16 becomes float32."""
        return self.frozen.run(image, ["32" if each == "16" else each for each in self.frozen.precisions])

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if not self._turns.augmentor:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            if optimizer_closure is not None:  # runs the step and leaves gradients of 0, which nobody applies
                optimizer_closure()
            self._step_augmentor()
        self._turns.after_step(lambda: self._agreements.read(self._mean_of_ranks))
        if self._turns.step == self._turns.total:
            self._take_picture(None)

    def _step_augmentor(self) -> None:
        step_together(
            self._augmentor_optimizer,
            self._phi,
            clip_grad_norm=self.config.augment.hard.clip_grad_norm,
            mean_of_ranks=self._mean_of_ranks,
        )
        self.augmentor.constrain()

    def _pretrain(self, image: Tensor) -> None:
        self._train_means.add({"vae_loss": self._pretraining.step(image, self._noise, self._mean_of_ranks)})
        if not self._pretraining.steps_left:
            self._turns.waiting = False
            directory = self._directory()
            if directory is not None:
                save_vae(self._pretraining.part.vae, directory / FOLDER / "vdvae.safetensors")

    def _mean_of_ranks(self, values: Tensor) -> Tensor:
        return values if self.trainer.world_size == 1 else self.all_gather(values).view(-1, len(values)).mean(0)

    def _seed_step(self, batch_idx: int) -> None:
        super()._seed_step(batch_idx)
        # a stream of its own, from the step's seed: the student's randomness is what it is without an augmentor
        self._noise.manual_seed(hash((torch.default_generator.initial_seed(), _STREAM)) & (2**63 - 1))

    # Pictures, checkpoints --------------------------------------------------------------------------------------------

    def _directory(self) -> Path | None:
        """Where this process writes; None where it does not."""
        directory = getattr(self.trainer, "default_root_dir", None)
        return Path(directory) if directory is not None and self.global_rank == 0 else None

    @torch.no_grad()
    def _take_picture(self, image: Tensor | None) -> None:
        """At some moments, keep what the augmentor does to the run's first images, and what the networks say to it."""
        directory, step = self._directory(), self._turns.step
        if step not in self._pictures.moments or directory is None:
            return
        if image is not None:
            self._pictures.keep(image)
        if self._pictures.images is None or self._pictures.path(directory, step).is_file():
            return
        shown = self._pictures.images.to(self.device).float() / 255.0
        augmented = self.augmented(shown, torch.Generator().manual_seed(0))
        # without autocast, which would remember weights that were cast without gradient
        with evaluating(self.student), torch.autocast(self.device.type, enabled=False):
            student = self.student(augmented)
        facts = {
            "parameters": self.augmentor.summary(),
            "student": student.logits.argmax(1).tolist(),
            "teacher": self.soft_label(self.teacher_outputs(augmented)).argmax(1).tolist(),
        }
        self._pictures.write(directory, step, augmented, facts)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.augmentor.to(self.device)
        if self._loaded is None:
            return
        state, self._loaded = self._loaded, None
        self.augmentor.load_state_dict(state["augmentor"])
        self._augmentor_optimizer.load_state_dict(state["optimizer"])
        self._pretraining.load_state_dict(state["pretraining"])
        self._turns.load_state_dict(state["turns"])
        self._agreements.load_state_dict(state["agreements"], self.device)
        self._pictures.images = state["images"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = {
            "augmentor": self.augmentor.state_dict(),
            "optimizer": self._augmentor_optimizer.state_dict(),
            "pretraining": self._pretraining.state_dict(),
            "turns": self._turns.state_dict(),
            "agreements": self._agreements.state_dict(),
            "images": self._pictures.images,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._loaded = checkpoint[_KEY]  # once everything lies on its device


class Agreements:
    """Running averages of how often student and teacher name the same class: on augmented and on clean images.

    They stay on the device until they are read.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._values: list[Tensor | None] = [None, None]
        self._counts = [0, 0]

    def add(self, augmented: Tensor, clean: Tensor | None = None) -> None:
        for number, value in enumerate((augmented, clean)):
            if value is None:
                continue
            value, before = value.detach(), self._values[number]
            kept = torch.zeros_like(value) if before is None else before
            self._values[number] = self.decay * kept + (1.0 - self.decay) * value
            self._counts[number] += 1

    def read(self, mean_of_ranks: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return both averages over all ranks, of augmented and of clean images; this waits for the device."""
        found = mean_of_ranks(torch.stack([value for value in self._values if value is not None])).tolist()
        return tuple(v / (1.0 - self.decay**n) for v, n in zip(found, self._counts, strict=True))  # type: ignore

    def state_dict(self) -> dict[str, Any]:
        return {"values": [None if v is None else v.item() for v in self._values], "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._values = [None if v is None else torch.tensor(v, device=device) for v in state["values"]]
        self._counts = list(state["counts"])


def with_learned_augmentation(method: type[DistillationModule]) -> type[DistillationModule]:
    """Return the method with HARD's game around it, for ``augment.learned: hard``; one that has it stays as it is."""
    if issubclass(method, LearnedAugmentation):
        return method
    members = {"needs": method.needs | {"gradients"}, "__module__": method.__module__, "__doc__": method.__doc__}
    return type(f"LearnedAugmentation{method.__name__}", (LearnedAugmentation, method), members)


@torch.no_grad()
def _agreement(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """Return the share of images of which both name the same class, a scalar."""
    return (student_logits.argmax(1) == teacher_probs.argmax(1)).float().mean()
