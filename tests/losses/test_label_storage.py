from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkd.losses.distillation import soft_cross_entropy
from visionkd.losses.label_storage import recover_labels, top_k_labels


def distributions(batch: int, classes: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    logits = scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(1)


def test_the_most_probable_classes_come_first_with_the_mass_of_the_others():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.05, 0.25]])
    indices, values, rest = top_k_labels(probs, 2)
    assert indices.tolist() == [[1, 3], [0, 3]]
    torch.testing.assert_close(values, torch.tensor([[0.4, 0.3], [0.7, 0.25]]))
    torch.testing.assert_close(rest, torch.tensor([0.3, 0.05]))


def test_the_rest_mass_is_never_negative():
    probs = torch.tensor([[0.6, 0.40001, 0.0]])
    assert top_k_labels(probs, 2)[2].tolist() == [0.0]


@pytest.mark.parametrize(
    ("kind", "k", "rest", "expected"),
    [
        ("hard", 1, "renormalize", [0.0, 1.0, 0.0, 0.0]),
        ("smoothing", 1, "uniform", [0.5 / 3, 0.5, 0.5 / 3, 0.5 / 3]),
        ("marginal_smoothing", 2, "uniform", [0.1, 0.5, 0.1, 0.3]),
        ("marginal_renorm", 2, "renormalize", [0.0, 0.625, 0.0, 0.375]),
        ("full", 4, "uniform", [0.05, 0.5, 0.15, 0.3]),
        ("full", 4, "renormalize", [0.05, 0.5, 0.15, 0.3]),
    ],
)
def test_each_label_type_of_fkd(kind, k, rest, expected):
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    indices, values, mass = top_k_labels(probs, k)
    for given_mass in (None, mass):
        found = recover_labels(indices, values, num_classes=4, rest=rest, rest_mass=given_mass)
        torch.testing.assert_close(found, torch.tensor([expected]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    classes=st.integers(1, 40),
    k=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 5.0, 40.0]),
    rest=st.sampled_from(["uniform", "renormalize"]),
    half=st.booleans(),
    with_mass=st.booleans(),
)
def test_recovered_rows_are_distributions(seed, classes, k, scale, rest, half, with_mass):
    k = min(k, classes)
    probs = distributions(3, classes, seed=seed, scale=scale)
    indices, values, mass = top_k_labels(probs, k)
    if half:
        values, mass = values.half(), mass.half()
    labels = recover_labels(indices, values, num_classes=classes, rest=rest, rest_mass=mass if with_mass else None)
    assert labels.dtype == torch.float32 and (labels >= 0).all()
    torch.testing.assert_close(labels.sum(1), torch.ones(3), rtol=0, atol=2e-6)
    assert (labels.gather(1, indices[:, :1])[:, 0] >= labels.max(1).values - (1e-3 if half else 1e-6)).all(), (
        "the first one stays first"
    )
    stored = labels.gather(1, indices)
    if rest == "uniform":
        torch.testing.assert_close(stored, probs.gather(1, indices), rtol=0, atol=1e-3 if half else 2e-6)


def test_half_precision_above_one_leaves_nothing_for_the_others():
    values = torch.tensor([[0.9995, 0.0007]]).half()  # sums to 1.0002
    indices = torch.tensor([[2, 0]])
    ours = recover_labels(indices, values, num_classes=30)
    assert ours.min() == 0.0 and ours.sum().item() == pytest.approx(1.0, abs=1e-6)
    released = recover_labels(indices, values, num_classes=30, clamp_rest=False)
    assert released.min() < 0.0, "what the released code does; else the option would be for nothing"
    assert released[0, 2] == values[0, 0].float()


def test_the_rest_mass_that_was_stored_corrects_what_half_precision_rounded_away():
    probs = torch.full((1, 100), 1e-4 / 99)
    probs[0, 7] = 1.0 - 1e-4  # is 1 in half precision
    indices, values, mass = top_k_labels(probs, 10)
    stored = recover_labels(indices, values.half(), num_classes=100, rest_mass=mass.half())
    torch.testing.assert_close(stored, probs, rtol=0.03, atol=0)
    without = recover_labels(indices, values.half(), num_classes=100)
    assert without[0, 50] < 1e-9, "nothing is left of the others without it"


def test_a_label_that_is_not_there_stays_visible():
    nan = float("nan")
    indices, values = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.6, 0.3], [nan, nan]])
    for rest in ("uniform", "renormalize"):
        labels = recover_labels(indices, values, num_classes=4, rest=rest, rest_mass=torch.tensor([0.1, nan]))
        assert not labels[0].isnan().any() and labels[1].isnan().all()


def test_an_unknown_rest_is_refused():
    with pytest.raises(ValueError, match="'zero'"):
        recover_labels(torch.tensor([[0]]), torch.tensor([[0.5]]), num_classes=2, rest="zero")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_give_the_loss_and_the_gradient_of_the_live_teacher(temperature):
    probs = distributions(4, 6)
    indices, values, mass = top_k_labels(probs, 6)
    labels = recover_labels(indices, values, num_classes=6, rest_mass=mass)
    student = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = soft_cross_entropy(student_logits=student, teacher_probs=labels, temperature=temperature)
    loss.backward()
    live = soft_cross_entropy(student_logits=student.detach(), teacher_probs=probs, temperature=temperature)
    torch.testing.assert_close(loss.detach(), live)
    expected = ((student.detach() / temperature).softmax(1) - probs) / (4 * temperature)
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-7)
