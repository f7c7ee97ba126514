"""What a student may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from visionkd.errors import Problem, RequestError, did_you_mean

#: What can be limited, with what it is.
BUDGETS: Mapping[str, str] = {
    "params_m": "parameters in millions",
    "macs_g": "multiply-accumulates for one image in 10^9",
    "latency_ms": "measured latency of one image in milliseconds",
}


def parse_budget(budget: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return the largest value allowed of each cost that is limited.

    Args:
        budget: ``params_m=0.5,macs_g=0.05,latency_ms=3``, or the same as a mapping.

    Raises:
        RequestError: With everything that is wrong.
    """
    if budget is None:
        return {}
    if isinstance(budget, str):
        pairs = [tuple(part.partition("=")[::2]) for part in budget.split(",") if part.strip()]
    else:
        pairs = list(budget.items())
    limits: dict[str, float] = {}
    problems = [] if pairs else [Problem("--budget", "is empty", _allowed())]
    for name, value in pairs:
        name = name.strip()
        if name not in BUDGETS:
            problems.append(
                Problem("--budget", f"unknown cost '{name}'", did_you_mean(name, BUDGETS, count=1) or _allowed())
            )
        elif name in limits:
            problems.append(Problem("--budget", f"'{name}' is given twice"))
        else:
            limits[name] = _number(value)
            if not 0 < limits[name] < math.inf:
                problems.append(Problem("--budget", f"{name} must be a number above 0 (given: '{value}')"))
    if problems:
        raise RequestError(problems)
    return limits


def exceeded(costs: Mapping[str, float | None], limits: Mapping[str, float]) -> str | None:
    """Return the first limit that ``costs`` exceed, in words; None where they keep to all, or were not measured."""
    for name, limit in limits.items():
        value = costs.get(name)
        if value is not None and value > limit:
            return f"{name} {value:.4g} is above {limit:g}"
    return None


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _allowed() -> str:
    return "Allowed: " + ", ".join(f"{name} ({what})" for name, what in BUDGETS.items())
