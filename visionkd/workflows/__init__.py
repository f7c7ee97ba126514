"""One function for every command of the ``visionkd`` program, with the same parameters and a typed result."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

#: Name of each workflow and the module that holds it; nothing is imported before it is asked for.
_MODULES = {
    "distill": "distill",
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "export": "export",
    "bench": "bench",
    "report": "report",
    "search": "search",
    "quantize": "quantize",
    "doctor": "doctor",
    "check_data": "data",
    "list_data": "data",
    "list_cache": "data",
    "verify_cache": "data",
    "remove_cache": "data",
    "list_configs": "configs",
    "show_config": "configs",
    "copy_config": "configs",
    "list_zoo": "zoo",
    "show_zoo": "zoo",
    "pull_zoo": "zoo",
    "verify_zoo": "zoo",
    "add_zoo": "zoo",
    "push_zoo": "zoo",
    "prune_zoo": "zoo",
}

__all__ = list(_MODULES)


class _Workflows(ModuleType):
    """Keeps ``workflows.distill`` the function: importing the module of that name would put the module in its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _MODULES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Workflows
