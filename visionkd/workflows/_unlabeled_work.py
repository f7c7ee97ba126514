"""What is computed about images without labels: copies of known images, and what the teachers say of them."""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visionkd.config.schema import DistillConfig
from visionkd.data.duplicates import SIGNATURE, VERSION, find_copies, signatures
from visionkd.data.layout import Opened
from visionkd.data.subset import SubsetSource
from visionkd.data.unlabeled import surest_of_each_class
from visionkd.errors import DataError, Problem, RequestError
from visionkd.files import replacing, write_text
from visionkd.models.network import Network
from visionkd.types import DataSet, Listener, Progress, Source
from visionkd.workflows._classification import answer
from visionkd.workflows._training import torch_device

STAGE = "unlabeled"
_PART = 10_000
#: Why an image of the pool is left out.
_UNREADABLE, _HELD_OUT, _TRAINED, _UNSURE = 1, 2, 3, 4
_REASONS = {
    _UNREADABLE: "cannot be read",
    _HELD_OUT: "shows what a held-out image shows",
    _TRAINED: "shows what a training image shows",
    _UNSURE: "not among the surest of its class",
}


class UnlabeledWork:
    """Works part by part, each of which is written once and read back, so that a killed run goes on where it was.

    Args:
        directory: Where to keep parts and results.
        teachers: With the data's classes in the data's order.
        config: Settings of the run.
        listener: Is told what happens.
    """

    def __init__(self, directory: Path, teachers: Sequence[Network], config: DistillConfig, listener: Listener) -> None:
        self.directory, self.teachers, self.config, self.listener = directory, teachers, config, listener

    def answers(self, source: Source) -> np.ndarray:
        """Return the class that the teachers give to each image, N of int64; -1 for an unreadable one."""
        found = self._in_parts("validation", len(source), lambda part: {"class": self._answers(source, part)[0]})
        return found.get("class", np.zeros(0, np.int64))

    def _answers(self, source: Source, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return class (-1 for an unreadable image) and probability that the teachers give to each image."""
        chosen, total = SubsetSource(source, part), None
        classes, scores = np.full(len(part), -1, np.int64), np.zeros(len(part), np.float32)
        for teacher in self.teachers:
            found = answer(
                teacher, chosen, device=torch_device(self.config.compute), batch_size=64,
                workers=self.config.data.workers or 0, listener=Listener(),
            )  # fmt: skip
            total = found.probs if total is None else total + found.probs
        if total is not None and len(total):
            classes[found.indices], scores[found.indices] = total.argmax(1), total.max(1) / len(self.teachers)
        return classes, scores

    def selected(self, data: DataSet, pool: Opened) -> np.ndarray:
        """Return the positions of the pool's images to train on."""
        file, source = self.directory / "selection.npz", pool.sources["all"]
        if not file.is_file():
            reasons, originals = self._without_copies(data, pool)
            kept = np.flatnonzero(reasons == 0)
            if self.config.data.unlabeled_per_class is not None and len(kept):
                reasons[np.setdiff1d(kept, self._surest(source, kept))] = _UNSURE
            self._write_list(source, reasons, originals, data)
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, reasons=reasons, pool=np.frombuffer(pool.fingerprint.encode(), np.uint8))
            shutil.rmtree(self.directory / "parts", ignore_errors=True)  # their sum is written down
        with np.load(file, allow_pickle=False) as arrays:
            reasons, fingerprint = arrays["reasons"], arrays["pool"].tobytes().decode()
        if fingerprint != pool.fingerprint:
            raise RequestError(
                Problem("--unlabeled", f"'{self.config.data.unlabeled}' has changed since the run was started"),
                hint="Bring them back, or start a new run with --overwrite.",
            )
        return self._told(reasons)

    def _told(self, reasons: np.ndarray) -> np.ndarray:
        """Say what was left out, and return what was not."""
        where, kept = self.config.data.unlabeled, np.flatnonzero(reasons == 0)
        counts = {code: int((reasons == code).sum()) for code in _REASONS}
        said = {
            _HELD_OUT: "show what a held-out image shows",
            _TRAINED: "show what a training image shows already",
            _UNREADABLE: "cannot be read",
            _UNSURE: f"are not among the {self.config.data.unlabeled_per_class} surest of a class",
        }
        left_out = ", ".join(f"{counts[code]:,} {text}" for code, text in said.items() if counts[code])
        text = f"Unlabelled images: {len(reasons):,} in {where}"
        if left_out:
            text += f"; {left_out}; {len(kept):,} are left (each is named in {self.directory / 'left_out.csv'})"
        elif self.config.data.near_duplicates == "keep":
            text += ", not compared with the others (data.near_duplicates: keep)"
        self.listener.message(text)
        if not len(kept):
            raise DataError(
                f"None of the {len(reasons):,} unlabelled images in '{where}' is left to train on.",
                hint="Leave --unlabeled out, or take copies as well with -o data.near_duplicates=keep.",
            )
        return kept

    def _without_copies(self, data: DataSet, pool: Opened) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Return why each image is left out (0: it is not), and for each reason the number of the image it copies."""
        source = pool.sources["all"]
        if self.config.data.near_duplicates == "keep":
            return np.zeros(len(source), np.int64), {}
        known = self._known_images(data)

        def compare(part: np.ndarray) -> dict[str, np.ndarray]:
            found = signatures(source, int(part[0]), int(part[-1]) + 1)
            reasons = np.where(found["digest"] == 0, _UNREADABLE, 0)
            copies = {}
            for code, originals in known.items():
                rest = np.flatnonzero(reasons == 0)
                match = np.full(len(part), -1, np.int64)
                match[rest] = find_copies(found[rest], originals)
                reasons[match >= 0] = code
                copies[str(code)] = match
            return {"reasons": reasons, **copies}

        found = self._in_parts(f"parts/pool.{pool.fingerprint[:12]}", len(source), compare)
        return found.pop("reasons"), {int(code): match for code, match in found.items()}

    def _known_images(self, data: DataSet) -> dict[int, np.ndarray]:
        """Return the signatures of the images that the pool must not repeat, by reason."""
        known = {}
        for code, sources in _known_sources(data).items():
            parts = [
                self._in_parts(f"parts/{split}.v{VERSION}.{data.fingerprint[:12]}", len(each), lambda part, each=each: {
                    "signatures": signatures(each, int(part[0]), int(part[-1]) + 1)
                })["signatures"]
                for split, each in sources.items()
            ]  # fmt: skip
            known[code] = np.concatenate(parts) if parts else np.zeros(0, SIGNATURE)
        return known

    def _surest(self, source: Source, kept: np.ndarray) -> np.ndarray:
        """Return, of the positions in ``kept``, those of the images that the teachers are surest of in each class."""

        def score(part: np.ndarray) -> dict[str, np.ndarray]:
            classes, scores = self._answers(source, kept[part])
            return {"class": classes, "score": scores}

        found = self._in_parts("parts/scores", len(kept), score)
        return kept[surest_of_each_class(found["class"], found["score"], self.config.data.unlabeled_per_class or 0)]

    def _write_list(
        self, source: Source, reasons: np.ndarray, originals: Mapping[int, np.ndarray], data: DataSet
    ) -> None:
        """Write ``left_out.csv``: every image that is left out, why, and which image it resembles."""
        known = _known_sources(data)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["image", "reason", "like_split", "like_image"])
        for index in np.flatnonzero(reasons):
            code, like = int(reasons[index]), ("", "")
            if code in originals:
                like = _named(known[code], int(originals[code][index]))
            rows.writerow([source.name(int(index)), _REASONS[code], *like])
        write_text(self.directory / "left_out.csv", text.getvalue())

    # Parts ------------------------------------------------------------------------------------------------------------

    def _in_parts(
        self, name: str, count: int, compute: Callable[[np.ndarray], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Compute arrays for ``count`` images, a part at a time; a part that is on disk is not computed again."""
        parts, start = [], time.perf_counter()
        for first in range(0, count, _PART):
            file, indices = self.directory / f"{name}.{first}.npz", np.arange(first, min(first + _PART, count))
            if not file.is_file():
                found = compute(indices)
                with replacing(file) as temporary, open(temporary, "wb") as stream:
                    np.savez(stream, **found)
                done = int(indices[-1]) + 1
                rate = (done - first) / max(1e-6, time.perf_counter() - start)
                self.listener.progress(
                    Progress(STAGE, done, count, images_per_s=rate, eta_s=(count - done) / max(rate, 1e-6))
                )
            start = time.perf_counter()
            with np.load(file, allow_pickle=False) as arrays:
                parts.append({key: arrays[key] for key in arrays.files})
        return {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}


def _known_sources(data: DataSet) -> dict[int, dict[str, Source]]:
    """Held-out splits, each once whatever its names are, and the training split."""
    held_out: dict[str, Source] = {}
    for split, source in data.splits.items():
        if (
            split not in ("train", "labeled", "all")
            and len(source)
            and all(source is not other for other in held_out.values())
        ):
            held_out[split] = source
    return {_HELD_OUT: held_out, _TRAINED: {"train": data.splits["train"]}}


def _named(sources: Mapping[str, Source], index: int) -> tuple[str, str]:
    """Return split and name of image ``index``, counted through all sources."""
    for split, source in sources.items():
        if index < len(source):
            return split, source.name(index)
        index -= len(source)
    raise IndexError(index)
