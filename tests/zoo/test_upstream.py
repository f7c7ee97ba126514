"""Upstream cards say what timm and torchvision say: no network, timm's result tables lie beside this file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torchvision.models import get_model_builder, get_model_weights

from visionkd.hub.card import Card
from visionkd.hub.index import own_directory, read_card
from visionkd.models.aliases import ALIASES
from visionkd.models.detection.factory import _published_input
from visionkd.models.detection.names import TORCHVISION

ROOT = Path(__file__).resolve().parent
CARDS = [read_card(file) for file in sorted((ROOT.parents[1] / "zoo").glob("*/*.yaml"))]
UPSTREAM = [card for card in CARDS if card.origin == "upstream"]
TIMM_COMMIT = "4e5207c7bb65"


def table(name: str) -> list[dict[str, str]]:
    with open(ROOT / "timm" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


RESULTS = {(row["model"], int(row["img_size"])): row for row in table("results-imagenet")}
BENCHMARK = {
    (row["model"], int(row["infer_img_size"])): row for row in table("benchmark-infer-amp-nhwc-pt240-cu124-rtx3090")
}


def published(card: Card, library: str) -> tuple[str, str] | None:
    """Return name and tag of the weights that a card names, None where they are not of ``library``."""
    for artifact in card.artifacts.values():
        if artifact.format == "published" and artifact.model.startswith(f"{library}/"):
            name, tag = artifact.model.partition("/")[2].split(".")
            return name, tag
    return None


FROM_TIMM = [card for card in UPSTREAM if published(card, "timm")]
FROM_TORCHVISION = [card for card in UPSTREAM if published(card, "torchvision")]


def metrics(card: Card) -> dict[str, float]:
    """Return what a publisher measured."""
    found = [row.values for row in card.metrics if row.by == "published"]
    return dict(found[0]) if found else {}


def differences(card: Card) -> list[str]:
    """Return what a timm card says otherwise than timm's tables and its installed configuration."""
    name, tag = published(card, "timm") or ("", "")
    size = card.preprocessing.img_size[0]
    config = get_pretrained_cfg(f"{name}.{tag}")
    found: dict[str, tuple[Any, Any]] = {
        "tag": (tag, config.tag),
        "licence": (card.licence, config.license),
        "img_size": (card.preprocessing.img_size, tuple(config.input_size[1:])),
        "mean": (card.preprocessing.mean, tuple(config.mean)),
        "std": (card.preprocessing.std, tuple(config.std)),
        "interpolation": (card.preprocessing.interpolation, config.interpolation),
        "crop_pct": (card.preprocessing.crop_pct, config.crop_pct),
        "num_classes": (card.num_classes, config.num_classes),
        "architecture": (card.architecture.name, name),
        "macs_g": (card.macs_g, float(BENCHMARK[name, size]["infer_gmacs"])),
    }
    if card.num_classes == 1000:
        row = RESULTS[f"{name}.{tag}", size]
        found |= {
            "top1": (metrics(card).get("top1"), float(row["top1"])),
            "top5": (metrics(card).get("top5"), float(row["top5"])),
            "params_m": (card.params_m, float(row["param_count"])),
            "the table's crop_pct": (card.preprocessing.crop_pct, float(row["crop_pct"])),
            "the table's interpolation": (card.preprocessing.interpolation, row["interpolation"]),
            "how": (card.metrics[0].how.rpartition(" ")[2], TIMM_COMMIT),
        }
    return [f"{key}: {given} instead of {true}" for key, (given, true) in found.items() if given != true]


def test_there_are_enough_of_every_kind() -> None:
    assert own_directory() == ROOT.parents[1] / "zoo"
    assert len(UPSTREAM) >= 30
    names = " ".join(card.name for card in UPSTREAM)
    assert all(kind in names for kind in (".mae", "clip", "dinov2", "deit", "swin", "convnext", "mobilenet", "resnet"))
    assert {card.task for card in UPSTREAM} >= {"classification", "segmentation", "detection"}
    detectors = {card.architecture.name for card in FROM_TORCHVISION if card.task == "detection"}
    assert detectors == set(TORCHVISION)


@pytest.mark.parametrize("card", FROM_TIMM, ids=lambda card: card.name)
def test_a_timm_card_agrees_with_timm(card: Card) -> None:
    assert differences(card) == []


def test_a_wrong_figure_is_found() -> None:
    card = next(card for card in FROM_TIMM if card.name == "resnet50.a1_in1k")
    wrong = card.model_dump() | {"params_m": 25.6, "licence": "mit"}
    wrong["metrics"][0]["values"]["top1"] = 80.9
    found = differences(Card.model_validate(wrong))
    assert [line.split(":")[0] for line in found] == ["licence", "top1", "params_m"]


def test_every_row_of_the_tables_is_of_a_card() -> None:
    of_cards = {(".".join(published(card, "timm") or ()), card.preprocessing.img_size[0]) for card in FROM_TIMM}
    assert set(RESULTS) <= of_cards
    assert set(BENCHMARK) == {(name.partition(".")[0], size) for name, size in of_cards}


@pytest.mark.parametrize("card", [card for card in FROM_TIMM if card.num_classes != 1000], ids=lambda card: card.name)
def test_an_encoder_has_the_parameters_that_are_built(card: Card) -> None:
    with torch.device("meta"):
        net = timm.create_model(card.architecture.name, num_classes=card.num_classes)
    assert card.params_m == pytest.approx(sum(each.numel() for each in net.parameters()) / 1e6, abs=0.006)
    assert not card.metrics, "no classes, no accuracy"


@pytest.mark.parametrize("card", FROM_TORCHVISION, ids=lambda card: card.name)
def test_a_torchvision_card_agrees_with_torchvision(card: Card) -> None:
    name, tag = published(card, "torchvision") or ("", "")
    record = get_model_weights(name)[tag]
    preset, meta, spec = record.transforms(), record.meta, card.preprocessing
    ((_, stated),) = meta["_metrics"].items()
    names = {"acc@1": "top1", "acc@5": "top5", "box_map": "ap"}
    assert metrics(card) == {names.get(key, key): value for key, value in stated.items()}
    assert card.params_m == pytest.approx(meta["num_params"] / 1e6, abs=1e-4)
    assert card.macs_g == meta["_ops"]
    # detectors answer for the classes of COCO that have a name: neither the background nor what was never labelled
    classes = [each for each in meta["categories"] if card.task != "detection" or each not in ("__background__", "N/A")]
    assert card.num_classes == len(classes)
    assert card.classes == ("imagenet1k" if card.num_classes == 1000 else tuple(classes))
    assert f"-{card.artifacts['weights'].sha256}.pth" in record.url
    if card.task == "detection":
        with torch.device("meta"):
            preset = get_model_builder(name)(weights=None, weights_backbone=None).transform
        assert (spec.mean, spec.std) == (tuple(preset.image_mean), tuple(preset.image_std))
        assert spec.img_size == _published_input(name).img_size
        assert (spec.interpolation, spec.crop_pct, card.licence) == ("bilinear", 1.0, "bsd-3-clause")
        return
    assert (spec.mean, spec.std) == (tuple(preset.mean), tuple(preset.std))
    assert spec.interpolation == preset.interpolation.value
    if card.task == "classification":
        assert spec.img_size == (preset.crop_size[0],) * 2
        assert spec.crop_pct == pytest.approx(preset.crop_size[0] / preset.resize_size[0], abs=1e-4)
    else:
        assert spec.img_size == (preset.resize_size[0],) * 2
    assert (card.licence == "cc-by-nc-4.0") == ("SWAG" in (meta.get("license") or ""))


def test_a_licence_that_forbids_commercial_use_is_named_among_what_a_model_is_bad_for() -> None:
    for card in CARDS:
        warned = any("commercial use" in text for text in card.bad_for)
        assert warned == ("-nc" in card.licence), card.name


def test_what_a_title_says_of_an_alias_is_true() -> None:
    stated = {alias: card for card in FROM_TIMM for alias in ALIASES if card.title.endswith(f"what {alias} stands for")}
    assert set(stated) == {"vit_b", "vit_l"}
    for alias, card in stated.items():
        config = get_pretrained_cfg(ALIASES[alias])
        assert card.name == f"{config.architecture}.{config.tag}"
