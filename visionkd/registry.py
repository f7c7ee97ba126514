"""Look-up by name, where the name is the file name.

``names("visionkd.methods")`` lists the files of a package and imports nothing; ``load`` imports one module.
"""

from __future__ import annotations

import importlib
import importlib.resources
from types import ModuleType

from visionkd.errors import Problem, RequestError, did_you_mean


def names(package: str) -> tuple[str, ...]:
    """Return the public module names in ``package``, sorted; none of them is imported."""
    files = importlib.resources.files(package).iterdir()
    found = (file.name.removesuffix(".py") for file in files if file.name.endswith(".py"))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(package: str, name: str, *, key: str) -> ModuleType:
    """Import and return the module ``package.name``.

    Args:
        package: Dotted name of the package.
        name: File name without ``.py``.
        key: What the user calls this choice, for the error message (``--method``).

    Raises:
        RequestError: If there is no such module; the nearest names are offered.
    """
    known = names(package)
    if name not in known:
        hint = did_you_mean(name, known) or f"Known: {', '.join(known)}"
        raise RequestError(Problem(key, f"unknown name '{name}'", hint))
    return importlib.import_module(f"{package}.{name}")
