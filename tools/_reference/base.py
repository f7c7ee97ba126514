"""What a check of reference vectors is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One case of a reference file.

    Attributes:
        file: Stem of the JSON file.
        id: Name of the case in it.
        produced_by: File and function of the authors' code.
        what: What the case is about, in words.
        notes: What it is a trap for, in words.
        hyper: Hyper-parameters.
        arrays: Inputs, outputs and gradients by name.
        rtol: Tolerances of the file.
        atol: Tolerances of the file.
        others: Arrays of the other cases of the file, by case, for one that goes on from another.
        atol_share: Absolute tolerance as a share of the largest number expected, in place of ``atol``.
    """

    file: str
    id: str
    produced_by: str
    what: str
    notes: str
    hyper: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    rtol: float
    atol: float
    others: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    atol_share: float | None = None

    def tensor(self, name: str, *, requires_grad: bool = False) -> Tensor:
        """Return an array as a fresh tensor of its own type."""
        return torch.from_numpy(np.array(self.arrays[name])).requires_grad_(requires_grad)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose names begin with ``prefix``, by the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)}

    def has(self, *names: str) -> bool:
        return all(name in self.arrays for name in names)


@dataclass(frozen=True)
class Comparison:
    """One of our values beside the expected one; the tolerances are the file's unless they are given."""

    name: str
    ours: Any
    expected: Any
    rtol: float | None = None
    atol: float | None = None


@dataclass(frozen=True)
class Check:
    """A kind of case.

    Attributes:
        name: Short name of the kind.
        matches: Recognises the kind by what produced a case and by its arrays, never by its id, sizes or seed.
        run: Computes the case with the project's own functions.
    """

    name: str
    matches: Callable[[Case], bool]
    run: Callable[[Case], Iterable[Comparison]]


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    case: Case
    kind: str
    problems: tuple[str, ...]
    compared: int = 0
    largest: float = field(default=0.0)


def read_cases(directory: Path) -> Iterator[Case]:
    """Yield every case of a directory of ``<name>.json`` and ``<name>.npz`` pairs.

    Raises:
        FileNotFoundError: If there is no pair at all, or half of one.
    """
    found = sorted(directory.glob("*.json"))
    if not found:
        raise FileNotFoundError(f"no <name>.json in {directory}")
    for path in found:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not any("arrays" in case for case in content.get("cases", ())):
            continue  # a table, not a test
        tolerance = content.get("tolerance", {})
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            every = {
                case["case"]: {name: arrays[f"{case['case']}/{name}"] for name in case["arrays"]}
                for case in content["cases"]
            }
            for case in content["cases"]:
                yield Case(
                    file=path.stem,
                    id=case["case"],
                    produced_by=case.get("produced_by", ""),
                    what=case.get("what", ""),
                    notes=case.get("notes", ""),
                    hyper=case.get("hyper_parameters", {}),
                    arrays=every[case["case"]],
                    rtol=float(tolerance.get("rtol", 1e-5)),
                    atol=float(tolerance.get("atol", 1e-6)),
                    others={name: values for name, values in every.items() if name != case["case"]},
                    atol_share=tolerance.get("atol_times_max_abs"),
                )


def judge(case: Case, checks: Iterable[Check]) -> Verdict:
    """Run the one check that knows the case."""
    known = [check for check in checks if check.matches(case)]
    if len(known) != 1:
        said = "no check knows this kind of case" if not known else f"several checks: {[c.name for c in known]}"
        return Verdict(case, "unknown" if not known else "ambiguous", (said,))
    kind, problems, compared, largest = known[0].name, [], 0, 0.0
    try:
        for item in known[0].run(case):
            compared += 1
            difference = _difference(item, case)
            largest = max(largest, difference if difference == difference else float("inf"))
            if not difference <= 1.0:
                problems.append(_told(item, difference))
    except Exception as error:  # a check that cannot be computed has failed, and the others go on
        problems.append(f"{type(error).__name__}: {error}")
    if not compared and not problems:
        problems.append("nothing was compared")
    return Verdict(case, kind, tuple(problems), compared, largest)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _difference(item: Comparison, case: Case) -> float:
    """Largest difference in units of the tolerance: above 1 is too much, NaN where one side alone has no number."""
    ours, expected = _array(item.ours), _array(item.expected)
    if ours.shape != expected.shape:
        return float("nan")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "biu":
        return 0.0 if np.array_equal(ours, expected) else float("inf")
    ours, expected = ours.astype(np.float64), expected.astype(np.float64)
    same = (ours == expected) | (np.isnan(ours) & np.isnan(expected))
    rtol = case.rtol if item.rtol is None else item.rtol
    atol = _atol(item, case, expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.where(same, 0.0, np.abs(ours - expected) / (atol + rtol * np.abs(expected))).max())


def _atol(item: Comparison, case: Case, expected: np.ndarray) -> float:
    if item.atol is not None:
        return item.atol
    if case.atol_share is None:
        return case.atol
    return case.atol_share * float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))


def _told(item: Comparison, difference: float) -> str:
    ours, expected = _array(item.ours), _array(item.expected)
    if ours.shape != expected.shape:
        return f"{item.name}: shape {ours.shape}, expected {expected.shape}"
    return f"{item.name}: {difference:.3g} times the tolerance"
