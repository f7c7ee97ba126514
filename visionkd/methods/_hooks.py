"""What a method says about itself: each has a default, and a method overrides few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.methods._stage import TrainingStage
from visionkd.models.fold import fold_batch_norm
from visionkd.models.network import Network
from visionkd.types import Output


class Hooks:
    """Declarations of a method; :class:`visionkd.methods._base.DistillationModule` trains by them."""

    #: Tasks that the method supports.
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    #: What it needs of each teacher: ``probabilities``, ``features``, ``gradients``.
    needs: ClassVar[frozenset[str]] = frozenset({"probabilities"})
    #: Whether it trains its teacher itself, in its first stage. Such a teacher is created with the data's classes, is
    #: the student's architecture where none is named, and is neither fitted nor compared with the student.
    trains_teacher: ClassVar[bool] = False
    #: Whether its teacher is an image-text encoder, which names no classes. It is not created as a network, and the
    #: embeddings that it gave of the training images stand for it.
    takes_encoder: ClassVar[bool] = False
    #: By task, the values of options that are not given, where they are not those of the options' own class.
    task_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Whether it looks at labels; a method that does not trains on unlabelled images (target -1) as well.
    uses_labels: ClassVar[bool] = True
    #: Weight decay where none is given; None takes the optimiser's usual one.
    default_weight_decay: ClassVar[float | None] = None
    #: Its frozen options dataclass.
    Options: ClassVar[type]
    options: Any

    def build_modules(self) -> nn.Module:
        """Return what trains beside the student and is dropped at the end; empty by default."""
        return nn.ModuleDict()

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        """Return named, unweighted scalars; their names appear in the logs as ``train/<name>``."""
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """Return the weight of each term of :meth:`distill_loss`, and of ``task_loss``."""
        return {"task_loss": 1.0}

    def student_stages(self) -> Sequence[int]:
        """Return the stages whose maps the student's output is to carry; see :mod:`visionkd.models.features`."""
        return ()

    def teacher_stages(self) -> Sequence[int]:
        """Return the stages whose maps the teachers' outputs are to carry; a label store holds none."""
        return ()

    @classmethod
    def label_temperature(cls, options: Any) -> float:
        """Return the temperature of the probabilities that ``soft_label`` averages and a label store holds."""
        return 1.0

    @property
    def teacher_temperature(self) -> float:
        """That of the options it has."""
        return self.label_temperature(self.options)

    @property
    def projector_lr_ratio(self) -> float:
        """Learning rate of what trains beside the student, as a share of the student's."""
        return 1.0

    def prepare_teacher(self, teacher: Network) -> Network:
        """Return the teacher as it is to run: in eval mode, batch norms folded into the convolutions before them."""
        return fold_batch_norm(teacher.eval()).eval()

    @classmethod
    def can_store_labels(cls, options: Any) -> bool:
        """Whether stored probabilities can stand for the teachers."""
        return cls.needs == {"probabilities"}

    @classmethod
    def stages(cls, config: RunConfig, options: Any) -> tuple[TrainingStage, ...]:
        """Return the trainings that the method consists of."""
        return (TrainingStage("distill", "Distil"),)

    @classmethod
    def module_of(cls, training: TrainingStage, options: Any) -> type[Any]:
        """Return the class that trains one of the stages."""
        return cls

    @classmethod
    def prepare_student(cls, student: Network, training: TrainingStage, config: RunConfig, options: Any) -> Network:
        """Return the student as a stage is to train it; the same each time it is asked, on a resumed run too."""
        return student

    @classmethod
    def pretrains(cls, options: Any) -> bool:
        """Whether the outcome is an encoder without a classifier, so that no accuracy is to be had."""
        return False

    @classmethod
    def asks(cls, teacher: Network, options: Any) -> bool:
        """Whether a teacher's classes matter, so that it must know the data's."""
        return True

    @classmethod
    def settle(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[str]:
        """Change what the networks need changed before they work together, and return what to say about it."""
        return []

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[Problem]:
        """Return what would fail later and is known before the training."""
        return []

    @classmethod
    def warnings(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[str]:
        """Return what the user should hear before the training."""
        return []
