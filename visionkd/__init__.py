"""visionkd: compress vision models by distillation, and prove that it worked."""

__version__ = "0.1.0"
