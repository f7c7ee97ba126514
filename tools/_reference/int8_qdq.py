"""INT8 as TensorRT and ONNX compute it: fake quantisation, calibration, integer products, folding, the logits loss.

The authors' mean-squared-error search passes the number of bits where a bias is expected; the vectors hold the search
as it was meant, which is ours. Their logits loss divides by N * C where it is asked for the ``mean``; ours is the
batch mean, C times larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch.nn import functional as F

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import kd_loss
from visionkd.quantization.fake_quant import fake_quantize, quantize, symmetric_scale, weight_amax
from visionkd.quantization.fold import fold_weight
from visionkd.quantization.ranges import HistogramObserver, MaxObserver, entropy_amax, mse_amax, percentile_amax


def _fake_quantize(case: Case) -> Iterator[Comparison]:
    x, axis = case.tensor("input", requires_grad=True), case.hyper.get("axis")
    qmin = -127 if case.hyper.get("narrow_range") else -128
    if axis is None:
        amax = torch.tensor(float(case.hyper["amax"]))
    else:
        amax = weight_amax(x, axis)
        yield Comparison("amax", amax.reshape(case.arrays["amax"].shape), case.arrays["amax"])
    output = fake_quantize(x, symmetric_scale(amax), axis=axis, qmin=qmin)
    output.backward(case.tensor("grad_output"))
    yield Comparison("output", output, case.arrays["output"])
    yield Comparison("grad_input", x.grad, case.arrays["grad_input"])


def _calibration(case: Case) -> Iterator[Comparison]:
    largest, histogram = MaxObserver(), HistogramObserver(int(case.hyper["num_bins"]))
    for number in range(1, int(case.hyper.get("batches", 2)) + 1):
        for observer in (largest, histogram):
            observer(case.tensor(f"batch{number}"))
    found, edges = histogram.counts, histogram.edges
    settings = {"start_bin": int(case.hyper.get("start_bin", 128)), "stride": int(case.hyper.get("stride", 1))}
    yield Comparison("amax_max", largest.amax, case.arrays["amax_max"])
    yield Comparison("hist", found, case.arrays["hist"])
    yield Comparison("bin_edges", edges, case.arrays["bin_edges"])
    yield Comparison("amax_entropy", entropy_amax(found, edges, **settings), case.arrays["amax_entropy"])
    yield Comparison("amax_mse", mse_amax(found, edges, **settings), case.arrays["amax_mse_intended"])
    for name in case.arrays:
        if name.startswith("amax_percentile_"):
            percentile = float(name.removeprefix("amax_percentile_").replace("_", "."))
            yield Comparison(name, percentile_amax(found, edges, percentile), case.arrays[name])


def _qdq(case: Case) -> Iterator[Comparison]:
    x, scale = case.tensor("input"), torch.tensor(float(case.hyper["scale"]))
    yield Comparison("q", quantize(x, scale), case.arrays["q"])
    yield Comparison("output", fake_quantize(x, scale), case.arrays["output"])


def _convolution(case: Case) -> Iterator[Comparison]:
    x, weight, bias = case.tensor("input"), case.tensor("weight"), case.tensor("bias")
    scale_x, scale_w = case.tensor("scale_x"), symmetric_scale(weight_amax(weight))
    settings = {"stride": int(case.hyper.get("stride", 1)), "padding": int(case.hyper.get("pads", 0))}
    yield Comparison("scale_w", scale_w, case.arrays["scale_w"])
    q_x, q_w = quantize(x, scale_x), quantize(weight, scale_w, axis=0, qmin=-127)
    yield Comparison("q_input", q_x, case.arrays["q_input"])
    yield Comparison("q_weight", q_w, case.arrays["q_weight"])
    accumulator = F.conv2d(q_x.double(), q_w.double(), **settings).to(torch.int32)
    yield Comparison("accumulator", accumulator, case.arrays["accumulator"])
    output = F.conv2d(fake_quantize(x, scale_x), fake_quantize(weight, scale_w, axis=0, qmin=-127), bias, **settings)
    yield Comparison("output", output, case.arrays["output"])
    integer = scale_x * scale_w[:, None, None] * accumulator + bias[:, None, None]
    yield Comparison("output_integer", integer, case.arrays["output_integer"])


def _fold(case: Case) -> Iterator[Comparison]:
    names = ("gamma", "beta", "mean", "var")
    gamma, beta, mean, var = (case.tensor(name) for name in names)
    eps = float(case.hyper["eps"])
    before = _convolution_of(case, [case.arrays[name] for name in names], eps)
    x, weight, bias, scale_x, scale_w = (
        torch.from_numpy(before[name]) for name in ("input", "weight", "bias", "scale_x", "scale_w")
    )
    norm = {"gamma": gamma, "beta": beta, "mean": mean, "var": var, "eps": eps}
    folded, scale, shift = fold_weight(weight, scale_w, bias, **norm)
    integers = quantize(folded, scale, axis=0, qmin=-127)
    yield Comparison("q_weight_folded", integers, case.arrays["q_weight_folded"])
    signs = gamma.sign().to(torch.int8)[:, None, None, None]
    yield Comparison("sign(gamma) q", signs * torch.from_numpy(before["q_weight"]), case.arrays["q_weight_folded"])
    settings = _settings(before)
    x, plain = fake_quantize(x, scale_x), fake_quantize(weight, scale_w, axis=0, qmin=-127)
    output = F.conv2d(x, plain, bias, **settings)
    normed = F.batch_norm(output, mean, var, gamma, beta, training=False, eps=eps)
    yield Comparison("output_bn", normed, case.arrays["output_bn"])
    output = F.conv2d(x, fake_quantize(folded, scale, axis=0, qmin=-127), shift, **settings)
    yield Comparison("output_folded", output, case.arrays["output_folded"])


def _convolution_of(case: Case, norm: list[np.ndarray], eps: float) -> Mapping[str, np.ndarray]:
    """Return the arrays of the convolution that the case goes on from: the one whose normed output it holds."""
    gamma, beta, mean, var = (values[:, None, None] for values in norm)
    for arrays in case.others.values():
        if {"q_weight", "accumulator", "output"} <= set(arrays):
            output = arrays["output"]
            if output.shape == case.arrays["output_bn"].shape:
                normed = (output - mean) * gamma / np.sqrt(var + eps) + beta
                if np.allclose(normed, case.arrays["output_bn"], rtol=1e-3, atol=1e-4):
                    return arrays
    raise LookupError("the file holds no convolution whose normed output this is")


def _settings(convolution: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Find the stride and padding that give the accumulators from the integers."""
    x, weight = (torch.from_numpy(convolution[name]).double() for name in ("q_input", "q_weight"))
    for stride in range(1, x.shape[-1] + 1):
        for padding in range(weight.shape[-1]):
            found = F.conv2d(x, weight, stride=stride, padding=padding).numpy()
            if np.array_equal(found, convolution["accumulator"]):
                return {"stride": stride, "padding": padding}
    raise LookupError("no stride and padding give these accumulators")


def _logits_loss(case: Case) -> Iterator[Comparison]:
    student, teacher = case.tensor("student_logits", requires_grad=True), case.tensor("teacher_logits")
    loss = kd_loss(
        student_logits=student, teacher_logits=teacher, temperature=float(case.hyper.get("temperature", 1.0))
    )
    if case.hyper.get("reduction", "mean") == "mean":
        loss = loss / student.shape[1]
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])


def _by(name: str, case: Case) -> bool:
    return name in case.produced_by


CHECKS = [
    Check(
        "fake quantisation",
        lambda case: case.has("grad_output", "grad_input") and _by("tensor_quant.py", case),
        _fake_quantize,
    ),
    Check("calibration of an activation", lambda case: case.has("hist", "bin_edges", "amax_max"), _calibration),
    Check("Q/DQ", lambda case: case.has("input", "q", "output") and _by("ONNX", case), _qdq),
    Check("integer convolution", lambda case: case.has("q_input", "q_weight", "accumulator"), _convolution),
    Check("folding of a batch norm", lambda case: case.has("gamma", "q_weight_folded", "output_folded"), _fold),
    Check("distillation of logits", lambda case: _by("LogitsDistillationLoss", case), _logits_loss),
]
