"""DMAE and G2SD: masks from given noise, pixels, aligned and hidden features, both whole steps, the specific stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from _reference.base import Case, Check, Comparison
from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.distillation import soft_cross_entropy
from visionkd.losses.masked import (
    alignment_loss,
    hard_label_loss,
    hidden_feature_loss,
    masked_pixel_loss,
    nkd_loss,
    normalized_patches,
    patchify,
    unpatchify,
)
from visionkd.models.masked import encode, kept_patches, masking, sincos_positions, take
from visionkd.models.masked_decoder import DecoderSpec, MaskedDecoder, new_decoder


def _distance(case: Case, key: str) -> Any:
    return {"L1": "l1", "L2": "l2"}[case.hyper[key]]


def _masking(case: Case) -> Iterator[Comparison]:
    noise = case.tensor("noise")
    keep = kept_patches(noise.shape[1], float(case.hyper["mask_ratio"]))
    found = masking(noise, keep)
    yield Comparison("len_keep", keep, case.hyper["len_keep"])
    yield Comparison("x_kept", take(case.tensor("x"), found.ids_keep), case.arrays["x_kept"])
    for name in ("mask", "ids_restore", "ids_keep"):
        if case.has(name):
            yield Comparison(name, getattr(found, name), case.arrays[name])


def _pixels(case: Case) -> Iterator[Comparison]:
    images, pred, side = case.tensor("images"), case.tensor("pred", requires_grad=True), int(case.hyper["patch_size"])
    target = patchify(images, side)
    yield Comparison("target", target, case.arrays["target"])  # as it is cut, before any standardisation
    grid = (images.shape[2] // side, images.shape[3] // side)
    yield Comparison("images (cut and put together)", unpatchify(target, grid=grid, patch=(side, side)), images)
    if case.hyper["norm_pix_loss"]:
        target = normalized_patches(target)
    loss = masked_pixel_loss(student_pred=pred, target=target, mask=case.tensor("mask"))
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_pred", pred.grad, case.arrays["grad_pred"])


def _alignment(case: Case) -> Iterator[Comparison]:
    student, teacher = case.tensor("student", requires_grad=True), case.tensor("teacher")
    projected = student
    if case.has("proj_weight"):
        weight, bias = case.tensor("proj_weight", requires_grad=True), case.tensor("proj_bias", requires_grad=True)
        projected = F.linear(student, weight, bias)
    loss = alignment_loss(
        student_feature=projected, teacher_feature=teacher, distance=_distance(case, "func"),
        normalize=bool(case.hyper["l2_normalise_channels"]),
    )  # fmt: skip
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])
    if case.has("proj_weight"):
        yield Comparison("grad_proj_weight", weight.grad, case.arrays["grad_proj_weight"])
        yield Comparison("grad_proj_bias", bias.grad, case.arrays["grad_proj_bias"])


def _encoder(case: Case, role: str) -> VisionTransformer:
    size, hyper = case.hyper[role], case.hyper
    net = VisionTransformer(
        img_size=hyper["img_size"], patch_size=hyper["patch_size"], embed_dim=size["embed_dim"], depth=size["depth"],
        num_heads=size["num_heads"], mlp_ratio=hyper["mlp_ratio"], num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=hyper["norm_eps"]),
    )  # fmt: skip
    given = case.tensors(f"{role}.")
    wanted = net.state_dict()
    missing = {name for name in wanted if name not in given and not name.startswith("norm.")}
    if missing or (role == "student" and "norm.weight" not in given):
        raise KeyError(f"the case lacks {sorted(missing)}")
    net.load_state_dict({name: given[name] for name in wanted if name in given}, strict=False)
    net.pos_embed.requires_grad_(False)
    return net.train(role == "student")


def _decoder(case: Case, role: str, net: VisionTransformer) -> MaskedDecoder:
    size = case.hyper[role]
    spec = DecoderSpec(
        size["decoder_embed_dim"], size["decoder_depth"], size["decoder_num_heads"], case.hyper["mlp_ratio"]
    )
    decoder = new_decoder(net, spec)
    given = case.tensors(f"{role}.")
    named = {name: given[name if name == "mask_token" else f"decoder_{name}"] for name in decoder.state_dict()}
    decoder.load_state_dict(named)
    return decoder


def _noise_and_masks(case: Case) -> tuple[Any, Iterator[Comparison]]:
    noise = case.tensor("noise")
    found = masking(noise, kept_patches(noise.shape[1], float(case.hyper["mask_ratio"])))
    named = [name for name in ("mask", "ids_keep", "ids_restore") if case.has(name)]
    return found, iter([Comparison(name, getattr(found, name), case.arrays[name]) for name in named])


def _tables(case: Case) -> Iterator[Comparison]:
    """The saved tables of positions are those that we build."""
    side = case.hyper["img_size"] // case.hyper["patch_size"]
    for name in case.arrays:
        if name.endswith("pos_embed"):
            width = case.arrays[name].shape[-1]
            yield Comparison(name, sincos_positions((side, side), width, prefix=1)[None], case.arrays[name])


def _gradients(case: Case, parts: Mapping[str, nn.Module]) -> Iterator[Comparison]:
    """Compare every ``grad.`` array with the gradient of the parameter of that name in one of the parts."""
    own: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        for name, parameter in part.named_parameters():
            outer = name if name == "mask_token" else f"{prefix}{name}"
            own[outer] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, expected in case.tensors("grad.").items():
        if name in own:
            yield Comparison(f"grad.{name}", own[name], expected)
        elif not (name.startswith("encoderfeature_pred") and not expected.any()):  # weight 0, left out by us
            raise KeyError(f"there is no parameter {name}")


def _dmae(case: Case) -> Iterator[Comparison]:
    hyper, images = case.hyper, case.tensor("images")
    found, compared = _noise_and_masks(case)
    yield from compared
    yield from _tables(case)
    teacher, student = _encoder(case, "teacher"), _encoder(case, "student")
    decoder = _decoder(case, "student", student)
    blocks, teacher_blocks = hyper["aligned_blks_indices"], hyper["teacher_aligned_blks_indices"]
    with torch.no_grad():
        seen = encode(teacher, images, found.ids_keep, blocks=teacher_blocks, stop=True)
    yield Comparison("teacher_feature", seen.features[-1], case.arrays["teacher_feature"])
    encoded = encode(student, images, found.ids_keep, blocks=blocks)
    pred = decoder.predict(decoder(encoded.tokens, found.ids_restore))
    target = patchify(images, hyper["patch_size"])
    if hyper["norm_pix_loss"]:
        target = normalized_patches(target)
    reconstruction = masked_pixel_loss(student_pred=pred, target=target, mask=found.mask)
    heads = nn.ModuleList()
    alignment = torch.zeros(())
    given = case.tensors("student.aligned_feature_projection_heads.")
    for number, (own, theirs) in enumerate(zip(encoded.features, seen.features, strict=True)):
        if f"{number}.weight" in given:
            head = nn.Linear(own.shape[-1], theirs.shape[-1])
            head.load_state_dict({name: given[f"{number}.{name}"] for name in ("weight", "bias")})
            heads.append(head)
            own = head(own)
        alignment = alignment + alignment_loss(
            student_feature=own, teacher_feature=theirs, distance=_distance(case, "loss"), normalize=bool(given)
        )
    total = reconstruction + float(hyper["weight_of_alignment"]) * alignment
    total.backward()
    yield Comparison("pred", pred, case.arrays["pred"])
    yield Comparison("loss_reconstruction", reconstruction, case.arrays["loss_reconstruction"])
    yield Comparison("loss_alignment", alignment, case.arrays["loss_alignment"])
    yield Comparison("loss_total", total, case.arrays["loss_total"])
    yield from _gradients(case, {"": student, "decoder_": decoder, "aligned_feature_projection_heads.": heads})


def _hidden(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student_pred", requires_grad=True)
    loss = hidden_feature_loss(
        student_pred=student, teacher_hidden=case.tensor("teacher_hidden"), beta=float(case.hyper["smooth_l1_beta"])
    )
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])


def _generic(case: Case) -> Iterator[Comparison]:
    hyper, images = case.hyper, case.tensor("images")
    found, compared = _noise_and_masks(case)
    yield from compared
    yield from _tables(case)
    teacher, student = _encoder(case, "teacher"), _encoder(case, "student")
    decoders = {role: _decoder(case, role, net) for role, net in (("teacher", teacher), ("student", student))}
    with torch.no_grad():
        tokens = encode(teacher, images, found.ids_keep).tokens
        hidden = decoders["teacher"](tokens, found.ids_restore, blocks=int(hyper["teacher"]["suplayer"]))
    given = case.tensors("student.decoderfeature_pred.")
    width_out, width_in = given["fc1.weight"].shape
    head = Mlp(width_in, width_out, width_out)
    head.load_state_dict(given)
    pred = head(decoders["student"](encode(student, images, found.ids_keep).tokens, found.ids_restore))
    loss = hidden_feature_loss(student_pred=pred, teacher_hidden=hidden, beta=float(hyper["smooth_l1_beta"]))
    loss.backward()
    yield Comparison("teacher_hidden", hidden, case.arrays["teacher_hidden"])
    yield Comparison("student_pred", pred, case.arrays["student_pred"])
    yield Comparison("loss", loss, case.arrays["loss"])
    for name in hyper.get("student_parameters_without_gradient", ()):
        parameter = decoders["student"].get_parameter(name.removeprefix("decoder_"))
        yield Comparison(f"{name} has no gradient", parameter.grad is None, True)
    parts = {"": student, "decoder_": decoders["student"], "decoderfeature_pred.": head}
    yield from _gradients(case, parts)


def _specific(case: Case) -> Iterator[Comparison]:
    own, distilled = (case.tensor(f"{name}_logits", requires_grad=True) for name in ("cls", "dist"))
    teacher, target = case.tensor("teacher_logits"), case.tensor("soft_targets")
    if case.hyper["enable_nkd"]:
        settings = case.hyper["nkd"]
        loss = nkd_loss(
            student_logits=own, teacher_logits=teacher, target=target, temperature=float(settings["temp"]),
            alpha=float(settings["alpha"]),
        )  # fmt: skip
    else:
        labels = soft_cross_entropy(student_logits=own, teacher_probs=target)
        loss = 0.5 * (labels + hard_label_loss(student_logits=distilled, teacher_logits=teacher))
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    for name, logits in (("cls", own), ("dist", distilled)):
        ours = torch.zeros_like(logits) if logits.grad is None else logits.grad
        yield Comparison(f"grad_{name}", ours, case.arrays[f"grad_{name}"])


def _channel_wise(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student", requires_grad=True)
    loss = float(case.hyper["weight"]) * channel_wise_loss(
        student_map=student, teacher_map=case.tensor("teacher"), temperature=float(case.hyper["tau"]),
        divergence="cross_entropy",
    )  # fmt: skip
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])


CHECKS = [
    Check("masking", lambda case: case.has("noise", "x", "x_kept", "ids_restore"), _masking),
    Check("masked pixels", lambda case: case.has("images", "pred", "target", "grad_pred"), _pixels),
    Check(
        "feature alignment",
        lambda case: "forward_distillation_loss_embedding" in case.produced_by and case.has("student", "teacher"),
        _alignment,
    ),
    Check("DMAE step", lambda case: case.has("noise", "teacher_feature", "loss_alignment", "loss_total"), _dmae),
    Check(
        "hidden features",
        lambda case: case.has("student_pred", "teacher_hidden", "grad_student") and not case.has("noise"),
        _hidden,
    ),
    Check("G2SD generic step", lambda case: case.has("noise", "teacher_hidden", "student_pred"), _generic),
    Check("G2SD specific loss", lambda case: case.has("cls_logits", "dist_logits", "soft_targets"), _specific),
    Check("channel-wise cross-entropy", lambda case: "ChannelWiseDivergence" in case.produced_by, _channel_wise),
]
