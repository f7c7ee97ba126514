"""Build a TensorRT engine from an ONNX file and compare it with that file. No torch: this runs on the device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from visionkd.data.open import open_data
from visionkd.data.subset import SubsetSource
from visionkd.errors import Problem, RequestError, UnreadableImageError, WorkError
from visionkd.export.accuracy import Truth, boxes_truth, truth_of
from visionkd.export.differences import Differences
from visionkd.export.tensorrt import EngineOptions, build_engine, default_timing_cache
from visionkd.files import check_writable
from visionkd.runtime.bundle_file import is_bundle, read_bundle
from visionkd.runtime.cuda_driver import find_device
from visionkd.runtime.engine_file import ENGINE_SUFFIX, EngineInfo, Library, engine_name
from visionkd.runtime.onnx_file import read_onnx_file
from visionkd.runtime.preprocess import letterbox, preprocess, stretch, to_batch
from visionkd.runtime.session import ONNX_SUFFIX, Session, is_engine_file, open_session
from visionkd.runtime.zoo_name import local_model
from visionkd.types import Listener
from visionkd.workflows._tasks import check_task, work_of
from visionkd.workflows.evaluate import choose_split, data_config, match_classes, run_of
from visionkd.workflows.results import EngineResult

_RANDOM_IMAGES = 8
_BATCH = 16
#: Largest loss of accuracy of an engine against ONNX Runtime on the same file, in points.
_MAX_DROP = 1.0
#: Largest difference of logits, as a share of the largest: single INT8 steps and FP16 stay far below.
_TOLERANCE = 0.2


def export_engine(
    *,
    model: str,
    out: str | None = None,
    data: str | None = None,
    verify_images: int | None = None,
    precision: str | None = None,
    batch: str | None = None,
    workspace_mb: int | None = None,
    timing_cache: str | None = None,
    dla: int | None = None,
    builder: str | None = None,
    compute_capability: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> EngineResult:
    """Build an engine; the parameters are those of :func:`visionkd.workflows.export`.

    Raises:
        RequestError: If there is no ONNX file to build from, or a parameter does not fit.
        WorkError: If TensorRT does not build it, or it answers differently from the ONNX file; no file is left then.
    """
    listener = listener or Listener()
    source = onnx_of(model)
    path = _place(source, out, overwrite=overwrite)
    library = _library(builder, compute_capability)
    options = EngineOptions(
        precision=_precision(precision),
        batch=parse_batch(batch),
        workspace_mb=workspace_mb,
        timing_cache=Path(timing_cache) if timing_cache is not None else default_timing_cache(library),
        dla_core=dla,
        compute_capability=compute_capability,
    )
    compared = _Comparison(source, data, verify_images or 256, listener)
    runs_here = compute_capability is None and find_device() is not None
    info = build_engine(
        source,
        path,
        library=library,
        options=options,
        check=compared.check if runs_here else None,
        report=listener.message,
    )
    if not runs_here:
        listener.message("The engine was built for another GPU: it was neither run nor compared here", level="warning")
    _judge_layers(info, listener)
    return _result(path, info, compared)


def onnx_of(model: str) -> Path:
    """Return the ONNX file that an engine of ``model`` is built from: a run's INT8 file, or else its float one.

    Raises:
        RequestError: If there is none.
    """
    model = local_model(model, use="onnx")
    path = Path(model)
    if is_engine_file(model):
        raise RequestError(f"{model} is an engine already.", hint="Give the ONNX file it is to be built from.")
    if model.lower().endswith(ONNX_SUFFIX):
        return path
    if is_bundle(path):
        return read_bundle(path).onnx("tensorrt")
    found = {file: read_onnx_file(file).int8_target for file in sorted((path / "export").glob("*.onnx"))}
    for target in ("tensorrt", None):
        for file, given in found.items():
            if given == target:
                return file
    where = f"{path / 'export'} has no ONNX file for TensorRT" if path.is_dir() else f"{model} is not an ONNX file"
    option = "" if path.is_dir() else " --out model.onnx, then: visionkd export model.onnx --format tensorrt"
    raise RequestError(
        f"{where}, and engines are built from one.",
        hint=f"Run: visionkd export {model} --int8 --target tensorrt{option}",
    )


def parse_batch(text: str | None) -> tuple[int, int, int]:
    """Read ``N``, or ``SMALLEST:BEST:LARGEST``."""
    if text is None:
        return EngineOptions().batch
    parts = str(text).split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise RequestError(
            Problem("--batch", f"'{text}' is neither N nor SMALLEST:BEST:LARGEST", "Example: --batch 1:8:32")
        )
    low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    return low, best, high


def _precision(given: str | None) -> Literal["fp32", "fp16"]:
    if given not in (None, "fp32", "fp16"):
        raise RequestError(Problem("--precision", f"'{given}' is unknown", "Known: fp32, fp16"))
    return given or "fp32"  # type: ignore[return-value]


def _library(builder: str | None, compute_capability: str | None) -> Library:
    known: tuple[Library, ...] = get_args(Library)
    if builder is not None:
        if builder not in known:
            raise RequestError(Problem("--builder", f"'{builder}' is unknown", f"Known: {', '.join(known)}"))
        return builder  # type: ignore[return-value]
    order = known if compute_capability is None else known[::-1]
    for name in order:
        if importlib.util.find_spec(name) is not None:
            return name
    raise RequestError(
        "building an engine needs TensorRT, which is not installed",
        hint="On a Jetson it comes with JetPack (a virtual environment needs --system-site-packages to see it); "
        "elsewhere: pip install tensorrt",
    )


def _place(source: Path, out: str | None, *, overwrite: bool) -> Path:
    name = engine_name(source.name)
    path = source.with_name(name) if out is None else Path(out)
    path = path / name if path.is_dir() else path
    if path.suffix.lower() != ENGINE_SUFFIX:
        raise RequestError(Problem("--out", f"'{path}' does not end in {ENGINE_SUFFIX}", f"Example: {name}"))
    if path.exists() and not overwrite:
        raise RequestError(
            f"{path} exists, and nothing is written over unasked.", hint="Give --overwrite, or another --out FILE."
        )
    check_writable(path)
    return path


class _Comparison:
    """The engine against ONNX Runtime on the same file, on images of ``data`` or random ones."""

    def __init__(self, source: Path, data: str | None, count: int, listener: Listener) -> None:
        self.source, self.data, self.count, self.listener = source, data, count, listener
        self.num_images = 0
        self.max_abs_diff: float | None = None
        self.accuracies: dict[str, float] = {}

    def check(self, engine: Path) -> None:
        """Run both; raise WorkError where they differ too much."""
        from visionkd.runtime.trt import TrtModel

        session = Session(TrtModel(engine))
        images, truth = self._images(session)
        self.num_images = len(images)
        reference = self._reference()
        tallies = [truth.tally(), truth.tally()] if truth is not None else []
        seen = Differences(session.rule)
        for start in range(0, len(images), _BATCH):
            batch = to_batch(images[start : start + _BATCH])
            given = session.answers(batch)
            if not np.isfinite(given).all():
                raise WorkError(
                    "the engine answers with values that are not finite", hint="Build it with --precision fp32."
                )
            answers = [given]
            if reference is not None:
                answers.append(reference.answers(batch))
                seen.add(given, answers[1], averaged=False)
            for tally, logits in zip(tallies, answers, strict=False):
                tally.add(logits)
        names = ("engine", "onnx") if reference is not None else ("engine",)
        if truth is not None:
            percents = [tally.percent() for tally, _ in zip(tallies, names, strict=False)]
            self.accuracies = {f"{truth.metric}_{name}": value for name, value in zip(names, percents, strict=True)}
        if reference is not None:
            self.max_abs_diff = seen.largest
            self._judge(seen.relative, truth)

    def _reference(self) -> Session | None:
        try:
            return open_session(self.source)
        except RequestError as error:
            self.listener.message(f"The engine is not compared with its ONNX file: {error.message}", level="warning")
            return None

    def _judge(self, share: float, truth: Truth | None) -> None:
        hint = "Report it with the versions from: visionkd doctor"
        if share > _TOLERANCE:
            raise WorkError(
                f"the engine differs from '{self.source}' by {self.max_abs_diff:.3g}, {share:.2g} of the largest value "
                f"({_TOLERANCE:g} is allowed), so that no file was written",
                hint=hint,
            )
        if truth is None:
            return
        engine, onnx = (self.accuracies[f"{truth.metric}_{name}"] for name in ("engine", "onnx"))
        if engine < onnx - _MAX_DROP:
            raise WorkError(
                f"the engine has {engine:.2f} % {truth.title}, and '{self.source}' {onnx:.2f} %: more than "
                f"{_MAX_DROP:g} points lost, so that no file was written",
                hint=hint,
            )

    def _images(self, session: Session) -> tuple[list[np.ndarray], Truth | None]:
        run = run_of(str(self.source))
        if self.data is None and run is None:
            self.listener.message("Without --data the engine is compared on random images", level="warning")
            generator = np.random.default_rng(0)
            shape = (*session.input.img_size, 3)
            return [generator.integers(0, 256, shape, np.uint8) for _ in range(_RANDOM_IMAGES)], None
        config = data_config(self.data, run=run)
        size = max(session.input.img_size)
        task = session.task if config.task == "auto" and config.data.path == "shapes" else config.task
        dataset = open_data(config.data.path, config=config.data, seed=config.data.split_seed, img_size=size, task=task)
        check_task(str(self.source), session.task, dataset.task, key="--data")
        _, source = choose_split(dataset, None, trained_here=self.data is None)
        chosen = source
        if len(source) > self.count:
            chosen = SubsetSource(source, work_of(dataset.task).some(source, self.count, seed=0))
        outputs = len(session.classes) if session.classes is not None else len(dataset.classes)
        columns, _ = match_classes(session.classes, dataset.classes, outputs, str(self.source))
        images, kept, views = [], [], []
        for index in range(len(chosen)):
            try:
                picture = chosen.load(index)
            except UnreadableImageError:
                continue
            kept.append(index)
            if session.task == "detection":
                view, scale = letterbox(picture, session.input)
                views.append((scale, (picture.height, picture.width)))
            else:
                view = (stretch if session.task == "segmentation" else preprocess)(picture, session.input)
            images.append(view)
        if not images:
            raise RequestError("None of the images to compare on can be read.", hint="Give other data with --data.")
        targets = [chosen.target(index) for index in kept]
        if session.rule is not None:
            return images, boxes_truth(targets, views, rule=session.rule, columns=columns, num_classes=outputs)
        known = all(np.ndim(target) or target >= 0 for target in targets)
        return images, truth_of(targets, columns=columns, num_classes=outputs) if known else None


def _judge_layers(info: EngineInfo, listener: Listener) -> None:
    """Say aloud what makes an INT8 engine slow."""
    if info.quantized and info.layers.get("int8") == 0:
        listener.message("No layer of the engine computes in INT8, although the file is quantised", level="warning")
    elif info.quantized and info.layers.get("reformat", 0) > info.layers.get("int8", 0):
        listener.message(
            f"{info.layers['reformat']} layers of the engine only change formats, more than the "
            f"{info.layers['int8']} in INT8: compare its speed with a float engine by 'visionkd bench'",
            level="warning",
        )


def _result(path: Path, info: EngineInfo, compared: _Comparison) -> EngineResult:
    known = bool(info.layers)
    return EngineResult(
        file=path,
        size_mb=path.stat().st_size / 1e6,
        library=f"{info.library} {info.library_version} ({info.typing}ly typed)",
        device=f"{info.device or 'GPU'}, compute capability {', '.join(info.compute_capabilities)}"
        + (f", DLA core {info.dla_core}" if info.dla_core is not None else ""),
        precision=f"int8 and {info.precision}" if info.quantized else info.precision,
        batch=":".join(map(str, info.batch)),
        layers=info.layers.get("total") if known else None,
        int8_layers=info.layers.get("int8") if known else None,
        reformat_layers=info.layers.get("reformat") if known else None,
        max_abs_diff=compared.max_abs_diff,
        top1_onnx=compared.accuracies.get("top1_onnx"),
        top1_engine=compared.accuracies.get("top1_engine"),
        num_verify_images=compared.num_images,
        miou_onnx=compared.accuracies.get("miou_onnx"),
        miou_engine=compared.accuracies.get("miou_engine"),
        ap_onnx=compared.accuracies.get("ap_onnx"),
        ap_engine=compared.accuracies.get("ap_engine"),
    )
