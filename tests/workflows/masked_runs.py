"""Runs of a second that masked distillation starts from."""

from __future__ import annotations

from pathlib import Path

from tests.workflows.conftest import TINY
from visionkd import workflows

#: A vision transformer on 64 patches of 4 pixels.
VIT = "vit_tiny_patch16_224"
ARGS = "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
TEACHER_ARGS = "{patch_size: 4, embed_dim: 48, depth: 3, num_heads: 3}"
DECODER = ("options.decoder_width=16", "options.decoder_depth=2", "options.decoder_heads=2")


def pretrain(out: Path, **more) -> Path:
    """Train a masked autoencoder for an epoch."""
    options = (*TINY, *DECODER, "model.img_size=32", f"model.args={TEACHER_ARGS}", "report.enabled=false")
    given = {"pretrained": False, "epochs": 1, "batch_size": 32, "options": options, **more}
    workflows.train(model=VIT, objective="mae", out=str(out), **given)
    return out


def tune(init: Path, out: Path, **more) -> Path:
    """Fine-tune it for an epoch."""
    options = (*TINY, "model.args={global_pool: avg}", "optimizer.layer_decay=0.75", "report.enabled=false")
    workflows.train(init=str(init), out=str(out), **{"epochs": 1, "batch_size": 32, "options": options, **more})
    return out
