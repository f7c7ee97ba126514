"""The errors a user can meet, each with the exit code that the command line answers with.

Raise :class:`RequestError` when the request itself is wrong and nothing was started (exit code 2), and a
:class:`WorkError` when the work was started or its data turned out bad (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class VisionKDError(Exception):
    """Base of all errors that are shown to the user without a traceback.

    Args:
        message: What is wrong, in one or two sentences.
        hint: What to do next, ideally a command.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class WorkError(VisionKDError):
    """The work failed: a device was lost, the loss became NaN, an export differs from its model."""


class DataError(WorkError):
    """The data cannot be used: unreadable images, empty classes, no validation split."""


class UnreadableImageError(DataError):
    """One image cannot be decoded."""


class DownloadError(WorkError):
    """Weights or data cannot be fetched."""


class InterruptedRunError(VisionKDError):
    """The user stopped the run; a checkpoint was written before this is raised."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request.

    Attributes:
        key: Dotted path of the key, such as ``training.epochs``, or the option, such as ``--teacher``.
        message: What is wrong with it, with the value that was given and what is allowed.
        hint: What to do about it.
    """

    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.key}: {self.message}"
        return f"{text}. {self.hint}" if self.hint else text


class RequestError(VisionKDError):
    """The request is wrong; every problem found is listed at once.

    Args:
        problems: One or more problems, or a single message.
        hint: The command to run next.
    """

    exit_code = 2

    def __init__(self, problems: str | Problem | Sequence[Problem], *, hint: str | None = None) -> None:
        if isinstance(problems, str):
            self.problems: tuple[Problem, ...] = ()
            message = problems
        else:
            self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
            message = "\n".join(str(problem) for problem in self.problems)
        super().__init__(message, hint=hint)


def did_you_mean(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``Did you mean 'a' or 'b'?`` for the names nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name.lower(), list(known), n=count, cutoff=0.6)
    if not near:
        return ""
    quoted = [f"'{match}'" for match in near]
    return f"Did you mean {quoted[0] if len(quoted) == 1 else ', '.join(quoted[:-1]) + ' or ' + quoted[-1]}?"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of somebody else's code says, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
