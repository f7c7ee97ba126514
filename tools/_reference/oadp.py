"""OADP: regions, the [OBJ] token, heads, losses and their weights, calibration, pseudo labels.

Three arrays show what the released trainer does and we do not: the box of the whole-image block (a corner and a side
where readers expect two corners), label losses whose warm-up nothing advances, and rows of scores that turn to NaN
because the background is one less a sum above one. Each is rebuilt here from our values and the documented difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from _reference.base import Case, Check, Comparison
from visionkd.losses.oadp import (
    WEIGHTS,
    Weight,
    asymmetric_loss,
    embedding_loss,
    global_loss,
    relation_loss,
)
from visionkd.models.open_vocabulary import NormalizedLinear, TextClassifier, calibrated_scores
from visionkd.teachers.object_attention import (
    TimmTransformer,
    encode_objects,
    encode_whole,
    resized_positions,
    stepping_problem,
)
from visionkd.teachers.pseudo_labels import PseudoLabelOptions, pseudo_label_scores
from visionkd.teachers.regions import (
    block_boxes,
    block_labels,
    expand_boxes,
    in_crops,
    outside_masks,
    partition,
    whole_image_box,
)

_NAMES = {
    "object_l1": "object_loss",
    "block_l1": "block_loss",
    "block_rkd": "block_relation_loss",
    "global_mse": "global_loss",
    "block_asl": "block_label_loss",
    "global_asl": "global_label_loss",
}
_DISTANCES: dict[str, Callable[..., Tensor]] = {
    "object": embedding_loss,
    "block_l1": embedding_loss,
    "block_rkd": relation_loss,
    "global": global_loss,
}


# Regions --------------------------------------------------------------------------------------------------------------


def _expand(case: Case) -> Iterator[Comparison]:
    hyper, proposals = case.hyper, case.tensor("proposals")
    size = (int(hyper["image_height"]), int(hyper["image_width"]))
    constant = hyper.get("constant") if hyper["expand_mode"] == "CONSTANT" else None
    crops = expand_boxes(proposals, image_size=size, side=constant, area_ratio=float(hyper.get("scale_ratio") or 0))
    yield Comparison("expanded", crops, case.arrays["expanded"])
    yield Comparison("foreground", in_crops(proposals, crops), case.arrays["foreground"])
    mask = outside_masks(proposals, crops, int(hyper["grid"]))
    yield Comparison("mask", mask[:, None].to(torch.uint8), case.arrays["mask"])


def _blocks_given(case: Case) -> dict[str, float]:
    return {"block": int(case.hyper["block"]), "max_stride": int(case.hyper["max_stride"])}


def _partition(case: Case) -> Iterator[Comparison]:
    starts = partition(int(case.hyper["length"]), **_blocks_given(case))
    yield Comparison("starts", np.array(starts, dtype=np.int64), case.arrays["starts"])


def _blocks(case: Case) -> Iterator[Comparison]:
    size = (int(case.hyper["height"]), int(case.hyper["width"]))
    boxes = block_boxes(size, rescale=float(case.hyper["rescale"]), **_blocks_given(case))
    yield Comparison("block_boxes (all but the first)", boxes[1:], case.arrays["block_boxes"][1:])
    first = whole_image_box(size)
    yield Comparison("block_boxes_first_corrected", boxes[0], case.arrays["block_boxes_first_corrected"])
    released = torch.cat([first[:2], first[2:] - first[:2]])
    yield Comparison("block_boxes (the first, as released)", released, case.arrays["block_boxes"][0])


def _labels(case: Case) -> Iterator[Comparison]:
    found = block_labels(
        case.tensor("block_boxes"), case.tensor("gt_boxes"), case.tensor("gt_labels"), int(case.hyper["num_classes"])
    )
    yield Comparison("block_labels", found, case.arrays["block_labels"])


# The encoder ----------------------------------------------------------------------------------------------------------


def _objects(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    net = VisionTransformer(
        img_size=hyper["input_resolution"], patch_size=hyper["patch_size"], embed_dim=hyper["width"],
        depth=hyper["layers"], num_heads=hyper["heads"], num_classes=hyper["output_dim"], pre_norm=True,
        act_layer=QuickGELU, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    given = {f"visual.{name}": value for name, value in case.tensors("param:").items()}
    net.load_state_dict(checkpoint_filter_fn(given, net))
    if problem := stepping_problem(net):
        raise ValueError(f"the network {problem}")
    vit, upsample = TimmTransformer(net.eval()), int(hyper["upsample"])
    crops, mask = case.tensor("crops"), case.tensor("mask")
    old = net.patch_embed.grid_size
    grid = (old[0] * upsample, old[1] * upsample)
    positions = resized_positions(net.pos_embed[0], grid, old=old)
    with torch.no_grad():
        yield Comparison("pos_embedding_upsampled", positions, case.arrays["pos_embedding_upsampled"])
        found = encode_objects(vit, crops, mask[:, 0], upsample=upsample, mask_bias=float(hyper["mask_bias"]))
        yield Comparison("obj_embedding", found, case.arrays["obj_embedding"])
        nothing = torch.zeros_like(mask[:, 0])
        full = encode_objects(vit, crops, nothing, upsample=upsample)
        yield Comparison("obj_embedding_full_box", full, case.arrays["obj_embedding_full_box"])
        whole = encode_whole(vit, crops, upsample=upsample)
        yield Comparison("cls_embedding", whole, case.arrays["cls_embedding"])


# Heads ----------------------------------------------------------------------------------------------------------------


def _linear(case: Case) -> NormalizedLinear:
    layer = NormalizedLinear(case.arrays["weight"].shape[1], case.arrays["weight"].shape[0])
    layer.load_state_dict({"weight": case.tensor("weight"), "bias": case.tensor("bias")})
    return layer


def _classifier(case: Case) -> Iterator[Comparison]:
    hyper, x, layer = case.hyper, case.tensor("x", requires_grad=True), _linear(case)
    vild = hyper["kind"] == "vild"
    classifier = TextClassifier(
        case.tensor("text_embeddings"), num_base=int(hyper["num_base"]),
        scale=1 / float(hyper["temperature_train"]) if vild else float(hyper["scaler"]),
        eval_scale=1 / float(hyper["temperature_val"]) if vild else None,
        bias=0.0 if vild else float(hyper["bias"]),
    )  # fmt: skip
    with torch.no_grad():
        classifier.background.copy_(case.tensor("bg_embedding"))
    logits = classifier.train()(layer(x))
    loss = F.cross_entropy(logits, case.tensor("label"))
    loss.backward()
    yield Comparison("logits_train", logits, case.arrays["logits_train"])
    yield Comparison("logits_val", classifier.eval()(layer(x)), case.arrays["logits_val"])
    yield Comparison("loss", loss, case.arrays["loss"])
    named = {"x": x, "weight": layer.weight, "bias": layer.bias, "bg": classifier.background}
    for name, tensor in named.items():
        yield Comparison(f"grad_{name}", tensor.grad, case.arrays[f"grad_{name}"])


def _calibration(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    scores = calibrated_scores(
        case.tensor("bbox_logits"), case.tensor("object_logits"), num_base=int(hyper["num_base"]),
        base_power=float(hyper["lam_base"]), novel_power=float(hyper["lam_novel"]),
    )  # fmt: skip
    yield Comparison("category_scores", scores, case.arrays["category_scores"])
    background = 1 - scores.sum(1, keepdim=True)
    yield Comparison("rows_nan", (background < 0)[:, 0], case.arrays["rows_nan"])
    released = torch.cat([scores, background], dim=1).log()
    yield Comparison("head_output", released, case.arrays["head_output"])
    yield Comparison("final_scores", released.softmax(1), case.arrays["final_scores"])


# Losses ---------------------------------------------------------------------------------------------------------------


def _distillation(case: Case) -> Iterator[Comparison]:
    hyper, x, layer = case.hyper, case.tensor("x", requires_grad=True), _linear(case)
    weight = Weight(float(hyper["gain"]), int(hyper["end"])).at(int(hyper["step"]))
    embedding = layer(x)
    embedding.retain_grad()
    distance = _DISTANCES[hyper["kind"]]
    loss = weight * distance(student_embedding=embedding, teacher_embedding=case.tensor("teacher"))
    loss.backward()
    yield Comparison("embedding", embedding, case.arrays["embedding"])
    yield Comparison("loss", loss, case.arrays["loss"])
    for name, tensor in {"embedding": embedding, "x": x, "weight": layer.weight, "bias": layer.bias}.items():
        yield Comparison(f"grad_{name}", tensor.grad, case.arrays[f"grad_{name}"])


def _asymmetric(case: Case) -> Iterator[Comparison]:
    hyper, logits = case.hyper, case.tensor("logits", requires_grad=True)
    novel = int(hyper.get("num_novel_masked", 0))
    masked = torch.zeros(logits.shape[1], dtype=torch.bool)
    masked[logits.shape[1] - novel :] = True
    loss = asymmetric_loss(
        student_logits=logits.masked_fill(masked, float("-inf")), target=case.tensor("target"),
        gamma_positive=float(hyper["gamma_pos"]), gamma_negative=float(hyper["gamma_neg"]),
        margin=float(hyper["clip"]), eps=float(hyper["eps"]),
    )  # fmt: skip
    loss = Weight(float(hyper["gain"]), int(hyper["end"])).at(int(hyper["step"])) * loss
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_logits", logits.grad, case.arrays["grad_logits"])


def _schedule(case: Case) -> Iterator[Comparison]:
    for name, expected in case.arrays.items():
        if name == "step":
            continue
        term = name.removeprefix("w_").removesuffix("_released").removesuffix("_intended")
        released = name.endswith("_released")
        ours = [WEIGHTS[_NAMES[term]].at(int(step), released=released) for step in case.arrays["step"]]
        yield Comparison(name, np.array(ours, dtype=np.float32), expected)


def _pseudo_labels(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    options = PseudoLabelOptions(
        scale=float(hyper["scaler"]), bias=float(hyper["bias"]), temperature=float(hyper["softmax_t"]),
        top_k=int(hyper["topk"]), class_power=float(hyper["clip_ratio"]), objectness_power=float(hyper["obj_ratio"]),
    )  # fmt: skip
    scores = pseudo_label_scores(
        case.tensor("embeddings"), case.tensor("objectness")[..., 0], case.tensor("class_embeddings"), options
    )
    yield Comparison("scores", scores, case.arrays["scores"])


CHECKS = [
    Check("OADP crops of proposals", lambda case: case.has("proposals", "expanded", "mask"), _expand),
    Check("OADP partition of an axis", lambda case: case.has("starts") and "max_stride" in case.hyper, _partition),
    Check("OADP block boxes", lambda case: case.has("block_boxes", "block_boxes_first_corrected"), _blocks),
    Check("OADP block labels", lambda case: case.has("block_labels", "gt_boxes", "block_boxes"), _labels),
    Check("OADP [OBJ] attention", lambda case: case.has("crops", "obj_embedding", "mask"), _objects),
    Check("OADP classifier", lambda case: case.has("text_embeddings", "bg_embedding", "logits_train"), _classifier),
    Check("OADP calibration", lambda case: case.has("bbox_logits", "object_logits", "category_scores"), _calibration),
    Check("OADP distillation", lambda case: case.has("grad_embedding", "teacher", "embedding"), _distillation),
    Check(
        "OADP asymmetric loss",
        lambda case: case.has("logits", "target", "grad_logits") and "gamma_neg" in case.hyper,
        _asymmetric,
    ),
    Check("OADP loss weights", lambda case: case.has("step", "w_object_l1"), _schedule),
    Check(
        "OADP pseudo labels",
        lambda case: case.has("embeddings", "objectness", "class_embeddings", "scores"),
        _pseudo_labels,
    ),
]
