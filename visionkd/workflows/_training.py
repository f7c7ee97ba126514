"""One training stage: loaders, Trainer, fit, resume."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from visionkd.config.schema import ComputeConfig, LabelStoreConfig, RunConfig
from visionkd.data.loader import default_workers, eval_loader, train_loader
from visionkd.data.views import eval_view, train_view
from visionkd.errors import InterruptedRunError, Problem, WorkError
from visionkd.methods._base import DistillationModule
from visionkd.methods._optimizer import Budget
from visionkd.models.factory import Network
from visionkd.types import DataSet, Listener
from visionkd.workflows._callbacks import AtomicCheckpointIO, Checkpoints, Metrics
from visionkd.workflows._labels import FillLabels, Labels
from visionkd.workflows._rundir import RunDirectory

_TRAINER_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_USUAL_LR = {"adamw": 1e-3, "sgd": 0.1}  # for a batch of 256
_USUAL_WEIGHT_DECAY = {"adamw": 0.05, "sgd": 5e-4}


def world_size(compute: ComputeConfig) -> int:
    """Number of processes that a run takes."""
    return num_devices(compute) * compute.nodes


def num_devices(compute: ComputeConfig) -> int:
    """Number of devices on this node; ``auto`` takes all GPUs, or one CPU process."""
    if compute.devices != "auto":
        return int(compute.devices)
    return torch.cuda.device_count() if uses_gpu(compute) else 1


def uses_gpu(compute: ComputeConfig) -> bool:
    return compute.accelerator == "gpu" or (compute.accelerator == "auto" and torch.cuda.is_available())


def torch_device(compute: ComputeConfig) -> torch.device:
    """Device for work outside of training, on the first process."""
    return torch.device("cuda" if uses_gpu(compute) else "cpu")


def check_compute(config: RunConfig) -> list[Problem]:
    """Return what this machine cannot do of what was asked."""
    compute, problems = config.compute, []
    if compute.accelerator == "gpu" and not torch.cuda.is_available():
        problems.append(
            Problem(
                "compute.accelerator",
                "no GPU is usable here",
                "Use --accelerator cpu; 'visionkd doctor' says what is missing.",
            )
        )
    elif uses_gpu(compute) and num_devices(compute) > torch.cuda.device_count():
        problems.append(
            Problem("compute.devices", f"{compute.devices} asked for, {torch.cuda.device_count()} GPUs here")
        )
    if not uses_gpu(compute):
        if compute.strategy == "fsdp":
            problems.append(Problem("compute.strategy", "fsdp needs GPUs", "Use --strategy ddp."))
        if config.training.precision == "16":
            problems.append(Problem("training.precision", "16 needs a GPU", "Use --precision bf16 or 32."))
    parts = world_size(compute) * config.training.accumulate
    if config.training.batch_size % max(1, parts):
        problems.append(
            Problem(
                "training.batch_size",
                f"{config.training.batch_size} is not a multiple of devices x nodes x accumulate = {parts}",
            )
        )
    return problems


def resolve_training(config: RunConfig, *, img_size: int, weight_decay: float | None = None) -> None:
    """Fill in every value that was left to decide, so that ``config.yaml`` says what was run.

    Args:
        config: What to fill in.
        img_size: Largest side of the training views in pixels.
        weight_decay: The method's own default; None takes the optimiser's.
    """
    optimizer, training = config.optimizer, config.training
    if optimizer.lr is None:
        share = training.batch_size / 256
        optimizer.lr = _USUAL_LR[optimizer.name] * (share if optimizer.name == "sgd" else math.sqrt(share))
    if optimizer.weight_decay is None:
        optimizer.weight_decay = _USUAL_WEIGHT_DECAY[optimizer.name] if weight_decay is None else weight_decay
    if config.augment.crop is None:
        config.augment.crop = "padded" if img_size <= 64 else "resized"
    if config.augment.padding is None:
        config.augment.padding = max(1, img_size // 8)
    if config.data.workers is None:
        config.data.workers = default_workers()


def budget_text(config: RunConfig, data: DataSet) -> str:
    """Say in a few words what will be trained for how long."""
    training, optimizer = config.training, config.optimizer
    return (
        f"{training.epochs} epoch{'s' if training.epochs > 1 else ''} of {len(data.splits['train'])} images,"
        f" batch {training.batch_size}, {optimizer.name} at lr {optimizer.lr:.3g}"
    )


def fit(
    build: Callable[[Budget], DistillationModule],
    *,
    data: DataSet,
    config: RunConfig,
    student: Network,
    img_size: tuple[int, int],
    run: RunDirectory,
    stage: str,
    listener: Listener,
    epochs: int | None = None,
    views: LabelStoreConfig | None = None,
    labels: Labels | None = None,
    callbacks: Sequence[Callback] = (),
) -> DistillationModule:
    """Train until the budget is spent, from the last checkpoint where there is one.

    Args:
        build: Makes the module for a budget.
        data: With splits ``train`` and ``val``.
        config: Fully resolved.
        student: The network that trains; validation images are prepared as it wants them.
        img_size: Height and width in pixels of the training views.
        stage: Names the stage's checkpoints and metrics.
        epochs: Epochs, where they are not those of the configuration.
        views: Which views to take, where not every epoch draws new ones.
        labels: An open store that stands for the teachers.
        callbacks: Further ones.

    Raises:
        InterruptedRunError: On Ctrl-C or SIGTERM, after a checkpoint was written.
        WorkError: If the loss becomes NaN; the last good checkpoint is kept.
    """
    training, epochs = config.training, epochs or config.training.epochs
    main = stage in ("train", "distill")
    directory = run.checkpoints if main else run.checkpoints / stage
    checkpoints = Checkpoints(run, directory, every_s=training.checkpoint_every_s, check_every=training.log_every)
    metrics = Metrics(
        run,
        listener,
        stage=stage,
        file="metrics.csv" if main else f"metrics.{stage}.csv",
        log_every=training.log_every,
        max_unreadable=config.data.max_unreadable,
        num_train=len(data.splits["train"]),
        last_checkpoint=checkpoints.last_path,
    )
    with _quiet_lightning():
        trainer = _trainer(config, run, epochs=epochs, callbacks=[*callbacks, metrics, checkpoints], stage=stage)
        loaders = _loaders(trainer, data=data, config=config, student=student, img_size=img_size, views=views)
        if labels is not None:
            trainer.callbacks.append(FillLabels(labels, loaders[0], listener))
        steps = math.ceil(len(loaders[0]) / training.accumulate)
        module = build(Budget(steps_per_epoch=steps, epochs=epochs))
        module.on_position = loaders[0].batch_sampler.set_position
        resume_from = checkpoints.last_path if checkpoints.last_path.is_file() else None
        try:
            trainer.fit(module, *loaders, ckpt_path=resume_from, weights_only=True)
        except torch.OutOfMemoryError as error:
            raise WorkError(
                f"The device ran out of memory: {str(error).splitlines()[0]}",
                hint=f"Try --batch-size {max(1, training.batch_size // 2)}, or -o training.accumulate=2.",
            ) from error
        finally:
            if labels is not None:
                labels.store.close()
    if trainer.interrupted:
        raise InterruptedRunError("Interrupted.", hint=f"Continue with --resume --out {run.path}")
    best = checkpoints.best_path
    if training.keep == "best" and best.is_file() and trainer.is_global_zero:
        module.load_state_dict(AtomicCheckpointIO().load_checkpoint(best)["state_dict"])
    return module


def _trainer(config: RunConfig, run: RunDirectory, *, epochs: int, callbacks: Sequence[object], stage: str) -> Trainer:
    training, compute = config.training, config.compute
    gpu = uses_gpu(compute)
    strategy: str | Strategy = "auto"
    if compute.strategy == "fsdp":
        strategy = "fsdp"
    elif compute.strategy == "ddp" or world_size(compute) > 1:
        strategy = DDPStrategy(process_group_backend="nccl" if gpu else "gloo", broadcast_buffers=True)
    return Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=num_devices(compute),
        num_nodes=compute.nodes,
        strategy=strategy,
        precision=_TRAINER_PRECISIONS[training.precision],  # type: ignore[arg-type]
        max_epochs=epochs,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.clip_grad_norm,
        deterministic=training.deterministic,
        benchmark=gpu and not training.deterministic,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=training.log_every,
        logger=TensorBoardLogger(run.path, name="tensorboard", version=stage),
        default_root_dir=run.path,
        callbacks=list(callbacks),  # type: ignore[arg-type]
        plugins=[AtomicCheckpointIO()],
    )


def _loaders(
    trainer: Trainer,
    *,
    data: DataSet,
    config: RunConfig,
    student: Network,
    img_size: tuple[int, int],
    views: LabelStoreConfig | None,
) -> tuple:
    ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size, "workers": config.data.workers or 0}
    batch = config.training.batch_size // (trainer.world_size * config.training.accumulate)
    train = train_loader(
        data.splits["train"],
        train_view(data.task, config, img_size=img_size, spec=student.input),
        batch_size=batch,
        seed=config.training.seed,
        cache=config.data.cache,
        epochs=trainer.max_epochs,
        **({} if views is None else _view_options(views)),
        **ranks,
    )
    val = eval_loader(
        data.splits["val"],
        eval_view(data.task, student.input, evaluation=config.segmentation.evaluation),
        batch_size=max(batch, 64) if data.task == "classification" else batch,
        cache=config.data.cache,
        **ranks,
    )
    return train, val


def _view_options(views: LabelStoreConfig) -> dict[str, int | None]:
    """Which views the loader draws; without a number of views, each epoch draws new ones from the run's own seed."""
    seed = None if views.views is None else views.view_seed
    return {"views": views.views, "view_seed": seed, "views_per_image": views.views_per_image}


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice out of the user's terminal: this project decides what it advises on."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", module=r"torch\.optim\.lr_scheduler")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_path(out: str | None, name: str) -> Path:
    """Return the run directory: ``out``, or ``runs/<name>``."""
    return Path(out) if out else Path("runs") / "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
