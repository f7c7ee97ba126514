"""visionkd: compress vision models by distillation, and prove that it worked."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load ``visionkd.zoo`` when it is first asked for: importing the package loads nothing."""
    if name == "zoo":
        import importlib

        return importlib.import_module("visionkd.zoo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
