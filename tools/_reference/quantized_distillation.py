"""Quantised distillation: uniform and learned levels, sizes, the loss, and two steps of each of the two trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import average_probabilities
from visionkd.methods.quantized import softened_kl
from visionkd.quantization.differentiable import allocate, nearest, quantile_points, quantize_to_points
from visionkd.quantization.quantized_distillation import (
    fake_quantize_uniform,
    quantize_uniform,
    scale,
    uniform_levels,
)
from visionkd.quantization.size import huffman_bits, level_counts, reduction_factor, size_mb


def _uniform(case: Case) -> Iterator[Comparison]:
    x, hyper = case.tensor("input", requires_grad=True), case.hyper
    noise = case.tensor("noise") if case.has("noise") else None
    given = {"num_levels": int(hyper["s"]), "bucket_size": hyper.get("bucket_size")}
    before = {"subtract_mean": bool(hyper.get("subtract_mean")), "max_element": hyper.get("max_element") or None}
    yield Comparison("output", quantize_uniform(x, noise=noise, **given, **before), case.arrays["output"])
    seen = x.detach() - x.detach().mean() if before["subtract_mean"] else x.detach()
    if before["max_element"]:
        seen = seen.clamp(-before["max_element"], before["max_element"])
    buckets = scale(seen, given["bucket_size"])
    for name in ("alpha", "beta"):
        yield Comparison(name, getattr(buckets, name).reshape(case.arrays[name].shape), case.arrays[name])
    if case.has("scaled"):
        yield Comparison("scaled", buckets.values.reshape(case.arrays["scaled"].shape), case.arrays["scaled"])
    if noise is None and not any(before.values()):  # as a training sees it
        output = fake_quantize_uniform(x, **given)
        grad = torch.linspace(-1, 1, x.numel()).view_as(x)
        output.backward(grad)
        yield Comparison("output (training)", output, case.arrays["output"])
        yield Comparison("straight-through gradient", x.grad, grad.numpy())


def _points(case: Case) -> Iterator[Comparison]:
    x, points = case.tensor("input", requires_grad=True), case.tensor("points", requires_grad=True)
    size = case.hyper.get("bucket_size")
    output = quantize_to_points(x, points, bucket_size=size)
    buckets = scale(x, size)
    yield Comparison("output", output, case.arrays["output"])
    indices = buckets.plain(nearest(buckets.values, points.detach()))
    yield Comparison("indices", indices.reshape(case.arrays["indices"].shape), case.arrays["indices"])
    if case.has("alpha"):
        yield Comparison("alpha", buckets.alpha.reshape(case.arrays["alpha"].shape), case.arrays["alpha"])
    if case.has("grad_output"):
        output.backward(case.tensor("grad_output"))
        yield Comparison("grad_points", points.grad, case.arrays["grad_points"])
        yield Comparison("grad_input", x.grad, case.arrays["grad_input"])


def _quantiles(case: Case) -> Iterator[Comparison]:
    ours = quantile_points(
        case.tensor("input"), int(case.hyper["num_points"]), bucket_size=case.hyper.get("bucket_size")
    )
    yield Comparison("points", ours, case.arrays["points"])


def _allocation(case: Case) -> Iterator[Comparison]:
    of = "points" if case.hyper["input_is_point"] else "bits"
    ours = allocate(case.arrays["gradient_norms"].tolist(), case.hyper["initial"], of=of)
    yield Comparison("result", ours, case.arrays["result"])


def _sizes(case: Case) -> Iterator[Comparison]:
    levels, size = int(case.hyper["s"]), case.hyper.get("bucket_size")
    results = {"mean_bits", "size_reduction", "size_mb", "size_mb_skip_first_last"}
    tensors = [case.tensor(name) for name in case.arrays if name not in results]

    def bits(some: list[Tensor]) -> float:
        scaled = [scale(tensor, size) for tensor in some]
        return huffman_bits(level_counts(b.plain(uniform_levels(b, levels)) for b in scaled))

    def count(some: list[Tensor]) -> int:
        return sum(tensor.numel() for tensor in some)

    mean_bits, middle = bits(tensors), tensors[1:-1]
    yield Comparison("mean_bits", mean_bits, case.arrays["mean_bits"])
    yield Comparison("size_reduction", reduction_factor(mean_bits, size), case.arrays["size_reduction"])
    # a model of few weights is a small part of 10^6 bytes: the file's absolute tolerance would let anything pass
    whole = size_mb(num_quantized=count(tensors), num_plain=0, mean_bits=mean_bits, bucket_size=size)
    yield Comparison("size_mb", whole, case.arrays["size_mb"], atol=1e-12)
    if case.has("size_mb_skip_first_last"):
        plain = count(tensors) - count(middle)
        part = size_mb(num_quantized=count(middle), num_plain=plain, mean_bits=bits(middle), bucket_size=size)
        yield Comparison("size_mb_skip_first_last", part, case.arrays["size_mb_skip_first_last"], atol=1e-12)


def _loss_of(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    weight, temperature = float(case.hyper["weight_teacher_loss"]), float(case.hyper["temperature"])
    soft = softened_kl(
        student_logits=student,
        teacher_probs=average_probabilities([teacher], temperature=temperature),
        temperature=temperature,
        reduction="elements",  # the authors' mean over images and classes
    )
    return weight * soft + (1.0 - weight) * F.cross_entropy(student, target)


def _loss(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student_logits", requires_grad=True)
    loss = _loss_of(case, student, case.tensor("teacher_logits"), case.tensor("labels"))
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])


class _Net(nn.Module):
    """The authors' network: padded convolutions, then linear layers, a ReLU and a batch norm behind each.

    A 2 x 2 pooling follows the first; the logits have a ReLU too. Sizes are those of the tensors.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        out = state["out_layer.weight"]
        self.conv_layers, self.linear_layers = nn.ModuleList(), nn.ModuleList()
        while (weight := state.get(f"conv_layers.{len(self.conv_layers)}.weight")) is not None:
            self.conv_layers.append(
                nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), padding=weight.shape[-1] // 2)
            )
        while (weight := state.get(f"linear_layers.{len(self.linear_layers)}.weight")) is not None:
            self.linear_layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        norms = [nn.BatchNorm2d(layer.out_channels) for layer in self.conv_layers]
        norms += [nn.BatchNorm1d(layer.out_features) for layer in self.linear_layers]
        self.batchNormalizationLayers = nn.ModuleList(norms)
        self.out_layer = nn.Linear(out.shape[1], out.shape[0])
        self.load_state_dict(dict(state))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate([*self.conv_layers, *self.linear_layers]):
            x = x if isinstance(layer, nn.Conv2d) else x.flatten(1)
            x = self.batchNormalizationLayers[number](layer(x).relu())
            if number == 0:
                x = F.max_pool2d(x, 2)
        return self.out_layer(x).relu()


def _distillation_steps(case: Case) -> Iterator[Comparison]:
    hyper, student = case.hyper, _Net(case.tensors("init."))
    teacher = _Net(case.tensors("teacher.")).eval()
    skipped = () if hyper["quantize_first_and_last_layer"] else hyper["skipped_parameters"]
    given = {"num_levels": 2 ** int(hyper["numBits"]), "bucket_size": hyper.get("bucket_size")}
    optimizer = _sgd(student.parameters(), hyper)

    def quantized() -> dict[str, Tensor]:
        named = [(name, p) for name, p in student.named_parameters() if name not in skipped]
        return {name: fake_quantize_uniform(p, **given) for name, p in named}

    for x, y in zip(case.tensor("x"), case.tensor("y"), strict=True):
        with torch.no_grad():
            taught = teacher(x)
        optimizer.zero_grad()
        _loss_of(case, functional_call(student, quantized(), (x,)), taught, y).backward()
        optimizer.step()
    yield from _states("fp_after.", case, student.state_dict())
    yield from _states("quantized_after.", case, {**student.state_dict(), **quantized()})


def _points_steps(case: Case) -> Iterator[Comparison]:
    hyper, size = case.hyper, case.hyper.get("bucket_size")
    student, teacher = _Net(case.tensors("weights.")), _Net(case.tensors("weights.")).eval()
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    points = {
        name: nn.Parameter(quantile_points(weight, int(hyper["num_points"]), bucket_size=size))
        for name, weight in weights.items()
    }
    for name, expected in case.tensors("points_init.").items():
        yield Comparison(f"points_init.{name}", points[name].clone(), expected.numpy())
    optimizer, used = _sgd(points.values(), hyper), {}
    for x, y in zip(case.tensor("x"), case.tensor("y"), strict=True):
        with torch.no_grad():
            taught = teacher(x)
        used = {name: quantize_to_points(weights[name], points[name], bucket_size=size) for name in weights}
        optimizer.zero_grad()
        _loss_of(case, functional_call(student, used, (x,)), taught, y).backward()
        optimizer.step()
        for each in points.values():
            each.data = each.data.sort().values
    yield from _states("points_after.", case, points)
    yield from _states("model_after.", case, {**student.state_dict(), **used})


def _sgd(parameters, hyper: Mapping) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=hyper["lr"], momentum=hyper["momentum"], nesterov=bool(hyper["nesterov"]),
        weight_decay=hyper.get("weight_decay", 0.0),
    )  # fmt: skip


def _states(prefix: str, case: Case, ours: Mapping[str, Tensor]) -> Iterator[Comparison]:
    for name, expected in case.tensors(prefix).items():
        yield Comparison(prefix + name, ours[name], expected.numpy())


def _made_by(file: str, *arrays: str, function: str = "") -> Callable[[Case], bool]:
    return lambda case: file in case.produced_by and function in case.produced_by and case.has(*arrays)


CHECKS = [
    Check("uniform quantisation", _made_by("quant_functions.py", "input", "output", function="uniformQ"), _uniform),
    Check("quantisation to points", _made_by("quant_functions.py", "points", "indices"), _points),
    Check("quantile points", _made_by("initialize_quantization_points", "points"), _quantiles),
    Check("allocation of points", _made_by("assign_bits_automatically", "gradient_norms", "result"), _allocation),
    Check("Huffman sizes", _made_by("get_huffman_encoding_mean_bit_length", "mean_bits"), _sizes),
    Check("quantised distillation loss", _made_by("cnn_models/help_fun.py", "student_logits"), _loss),
    Check("steps of quantised distillation", _made_by("train_model", "x", "y"), _distillation_steps),
    Check("steps of differentiable quantisation", _made_by("optimize_quantization_points", "x", "y"), _points_steps),
]
