"""The text classifier with base and novel classes, and scores of two heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionkd.models.open_vocabulary import NormalizedLinear, TextClassifier, calibrated_scores


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def texts() -> torch.Tensor:
    return rand(5, 8).requires_grad_()


def test_embeddings_have_length_one() -> None:
    assert torch.allclose(NormalizedLinear(6, 8)(rand(4, 6)).norm(dim=1), torch.ones(4))


def test_novel_classes_do_not_exist_in_training(texts) -> None:
    classifier, embedding = (
        TextClassifier(texts, num_base=3, scale=100.0),
        F.normalize(rand(4, 8, seed=1)).requires_grad_(),
    )
    logits = classifier.train()(embedding)
    assert (logits[:, 3:5] == float("-inf")).all() and logits[:, [0, 1, 2, 5]].isfinite().all()
    assert (logits.softmax(1)[:, 3:5] == 0).all()
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 5])).backward()
    assert embedding.grad.isfinite().all() and classifier.background.grad.abs().sum() > 0
    other = TextClassifier(torch.cat([texts[:3], rand(2, 8, seed=9)]), num_base=3, scale=100.0)
    other.load_state_dict({"background": classifier.background.detach()}, strict=False)
    mine = embedding.detach().clone().requires_grad_()
    F.cross_entropy(other.train()(mine), torch.tensor([0, 1, 2, 5])).backward()
    assert torch.equal(mine.grad, embedding.grad)  # whatever the novel texts are


def test_another_class_at_inference_appends_a_column(texts) -> None:
    classifier, embedding = TextClassifier(texts, num_base=3, scale=100.0).eval(), F.normalize(rand(4, 8, seed=1))
    before = classifier(embedding)
    assert before.isfinite().all()
    classifier.set_classes(torch.cat([texts, rand(1, 8, seed=2)]), num_base=3)
    after = classifier(embedding)
    assert after.shape == (4, 7)
    assert torch.allclose(after[:, :5], before[:, :5]) and torch.allclose(after[:, 6], before[:, 5])
    with pytest.raises(ValueError, match="embeddings of 8"):
        classifier.set_classes(rand(5, 9), num_base=3)


def test_scales_of_training_and_evaluation_and_texts_that_are_not_normalised(texts) -> None:
    classifier = TextClassifier(texts, num_base=5, scale=100.0, eval_scale=50.0, bias=4.0, background=False)
    embedding = F.normalize(rand(4, 8, seed=1))
    trained, seen = classifier.train()(embedding), classifier.eval()(embedding)
    assert torch.allclose(trained + 4, 2 * (seen + 4), atol=1e-4) and trained.shape == (4, 5)
    assert torch.allclose(seen + 4, 50 * embedding @ texts.T, atol=1e-4)
    assert not list(classifier.parameters())


def test_calibration_lies_between_the_heads() -> None:
    boxes, objects = rand(6, 9) * 3, rand(6, 9, seed=1) * 3
    p, q = boxes.softmax(1)[:, :8], objects[:, :8].softmax(1)
    scores = calibrated_scores(boxes, objects, num_base=5, base_power=1.0)
    assert torch.allclose(scores[:, :5], p[:, :5]) and torch.allclose(scores[:, 5:], q[:, 5:])
    scores = calibrated_scores(boxes, objects[:, :8], num_base=5)
    assert torch.allclose(scores[:, :5], p[:, :5] ** (2 / 3) * q[:, :5] ** (1 / 3))
    assert torch.allclose(scores[:, 5:], p[:, 5:] ** (1 / 3) * q[:, 5:] ** (2 / 3))


def test_scores_are_finite_where_they_sum_to_more_than_one() -> None:
    agree = rand(200, 8) * 4
    whole = calibrated_scores(torch.cat([agree, torch.full((200, 1), -9.0)], 1), agree * 0.5, num_base=5)
    assert (whole.sum(1) > 1).any() and whole.isfinite().all()  # the released code loses those rows
    sure = calibrated_scores(rand(9, 9) * 1e4, rand(9, 8, seed=1) * 1e4, num_base=5)
    assert sure.isfinite().all() and (sure >= 0).all()


class Heads(nn.Module):
    """Both heads of a detector, and the scores of its regions."""

    def __init__(self, texts: torch.Tensor) -> None:
        super().__init__()
        self.box, self.object = NormalizedLinear(6, 8), NormalizedLinear(6, 8)
        self.box_classes = TextClassifier(texts, num_base=3, scale=100.0)
        self.object_classes = TextClassifier(texts, num_base=3, scale=100.0, background=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return calibrated_scores(self.box_classes(self.box(x)), self.object_classes(self.object(x)), num_base=3)


@torch.no_grad()
def test_the_heads_are_one_graph_with_the_texts_as_constants(texts) -> None:
    heads, x = Heads(texts).eval(), rand(4, 6)
    program = torch.export.export(heads, (x,))
    assert torch.allclose(program.module()(x), heads(x))
    assert {"box_classes.texts", "object_classes.texts"} <= program.state_dict.keys()


@torch.no_grad()
def test_half_precision_does_not_reach_the_logits(texts) -> None:
    classifier, embedding = TextClassifier(texts, num_base=3, scale=143.0).eval(), F.normalize(rand(4, 8, seed=1))
    full = classifier(embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier(embedding), full)
