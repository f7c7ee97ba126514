"""Pictures of what a masked autoencoder sees and makes of it: ``reconstructions.png`` in the run directory.

Three rows of the same validation images: as they are, without the removed patches, and with these as the decoder fills
them in. The file's text entry ``reconstructions`` says in JSON what was removed and when it was made.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from visionkd.files import write_bytes
from visionkd.losses.masked import patchify, unpatchify
from visionkd.models.network import Network

FILE = "reconstructions.png"
TEXT_KEY = "reconstructions"
IMAGES = 8
_LARGEST = 112  # pixels of a picture's longer side
_REMOVED = 0.5  # grey


def write_reconstructions(
    directory: Path,
    *,
    network: Network,
    prepared: Tensor,
    pred: Tensor,
    mask: Tensor,
    epoch: int,
    kept: int,
    normalized: bool,
) -> None:
    """Write the picture.

    Args:
        directory: The run's.
        network: Whose statistics the images have.
        prepared: Images as the network takes them, N x 3 x H x W.
        pred: Predicted patches in the same statistics, N x L x (p * p * 3).
        mask: N x L, 1 where a patch was removed.
        epoch: Epochs done.
        kept: Patches kept of each image.
        normalized: Whether mean and spread of each removed patch were taken from the image itself.
    """
    embed = network.net.patch_embed
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (network.input.mean, network.input.std))
    prepared, pred, mask = (part.detach().float().cpu() for part in (prepared, pred, mask))

    def whole(patches: Tensor) -> Tensor:
        return unpatchify(patches, grid=embed.grid_size, patch=embed.patch_size)

    patches, removed = patchify(prepared, embed.patch_size), mask.unsqueeze(-1).bool()
    original, filled = (whole(each) * std + mean for each in (patches, torch.where(removed, pred, patches)))
    holes = original.masked_fill(whole(removed.expand_as(patches).float()) > 0.5, _REMOVED)
    rows = (original, holes, filled)
    strip = torch.cat([_row(row.clamp(0, 1)) for row in rows], dim=1)
    pixels = (strip.clamp(0, 1) * 255.0).round().to(torch.uint8).permute(1, 2, 0)
    facts = {
        "epoch": epoch,
        "images": len(prepared),
        "kept": kept,
        "patches": mask.shape[1],
        "normalized": normalized,
    }
    text = PngInfo()
    text.add_itxt(TEXT_KEY, json.dumps(facts))
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG", pnginfo=text)
    write_bytes(directory / FILE, out.getvalue())


def _row(images: Tensor) -> Tensor:
    """Return images side by side, 3 x H x (N * W), at most so large as a strip wants them."""
    longer = max(images.shape[-2:])
    if longer > _LARGEST:
        size = [max(1, round(side * _LARGEST / longer)) for side in images.shape[-2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return torch.cat(list(images), dim=2)
