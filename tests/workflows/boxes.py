"""A folder of scenes with boxes, and runs of a few seconds on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from visionkd.models.detection.network import DetectionNetwork
from visionkd.workflows._found import found_boxes

CLASSES = ("red", "blue")
_COLORS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
#: A detector of 0.1 M parameters, and settings of a run of seconds.
NETWORK = "fcos_test_resnet"
ARGS = ("channels=16", "head_convs=1")
TINY = ("data.workers=0", "training.batch_size=4", "optimizer.lr=0.004")


def network(role: str = "model") -> tuple[str, ...]:
    """Return the settings of the small detector."""
    return (f"{role}.img_size=64", *(f"{role}.args.{each}" for each in ARGS))


def write_boxes(root: Path, *, train: int = 12, val: int = 7) -> Path:
    """Write pictures of different sizes, with a red and a blue box in most, as COCO JSON; one picture has none."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]  # with a hole
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, rows = [], []
        for number in range(count):
            height, width = (int(side) for side in rng.integers(40, 70, 2))
            pixels = rng.normal(90, 20, (height, width, 3))
            for category in categories if number else ():
                box_width, box_height = (int(side) for side in rng.integers(14, 28, 2))
                left, top = int(rng.integers(0, width - box_width)), int(rng.integers(0, height - box_height))
                pixels[top : top + box_height, left : left + box_width] = _COLORS[category["name"]]
                rows.append({
                    "id": len(rows) + 1, "image_id": number, "category_id": category["id"], "iscrowd": 0,
                    "bbox": [left, top, box_width, box_height], "area": box_width * box_height,
                })  # fmt: skip
            name = f"{number}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        table = {"images": images, "annotations": rows, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))
    return root


def mark_found(root: Path, network: DetectionNetwork, *, most: int = 8) -> Path:
    """Put the surest boxes of a network in the place of those that are there, so that its AP is high."""
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}.json"
        table, rows = json.loads(file.read_text()), []
        for image in table["images"]:
            found = found_boxes(network, Image.open(root / split / image["file_name"]).convert("RGB"), device="cpu")
            for (left, top, right, bottom), label in zip(found.boxes[:most].tolist(), found.labels[:most].tolist(),
                                                         strict=True):  # fmt: skip
                box = [left, top, right - left, bottom - top]
                rows.append({
                    "id": len(rows) + 1, "image_id": image["id"], "category_id": {0: 3, 1: 7}[label], "bbox": box,
                    "area": box[2] * box[3], "iscrowd": 0,
                })  # fmt: skip
        file.write_text(json.dumps({**table, "annotations": rows}))
    return root
