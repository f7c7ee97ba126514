"""Boxes of novel classes found among proposals."""

from __future__ import annotations

import torch

from visionkd.teachers.pseudo_labels import PseudoLabelOptions, pseudo_label_scores, pseudo_labels

TEXTS = torch.eye(4)
BOXES = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 50, 50.0]])


def test_each_proposal_keeps_its_best_class_alone() -> None:
    embedding, objectness = torch.tensor([[3.0, 1, 0, 0], [0, 0, 0.1, 5]]), torch.tensor([1.0, 0.5])
    scores = pseudo_label_scores(embedding, objectness, TEXTS)
    assert (scores > 0).sum(1).tolist() == [1, 1] and scores.argmax(1).tolist() == [0, 3]
    two = pseudo_label_scores(embedding, objectness, TEXTS, PseudoLabelOptions(top_k=2))
    assert (two > 0).sum(1).tolist() == [2, 2]
    assert scores[1, 3] < pseudo_label_scores(embedding, torch.ones(2), TEXTS)[1, 3]
    assert torch.allclose(scores, pseudo_label_scores(9 * embedding, objectness, TEXTS))  # length does not matter


def test_novel_boxes_survive_overlaps_and_base_boxes_are_left_to_the_annotations() -> None:
    embedding = TEXTS[[3, 3, 2, 0]]  # two on one object of class 3, one of class 2, one of base class 0
    found = pseudo_labels(BOXES, embedding, torch.tensor([0.9, 0.95, 0.8, 1.0]), TEXTS, num_base=2)
    assert found.labels.tolist() == [3, 2] and found.boxes_xyxy.tolist() == BOXES[[1, 2]].tolist()
    assert found.scores[0] > found.scores[1] > 0.5


def test_unlikely_proposals_and_those_beyond_the_limit_give_nothing() -> None:
    embedding = TEXTS[[3, 3, 2, 0]]
    assert not len(pseudo_labels(BOXES, embedding, torch.full((4,), 0.1), TEXTS, num_base=2).labels)
    one = PseudoLabelOptions(proposals=1)
    found = pseudo_labels(BOXES, embedding, torch.tensor([0.9, 0.95, 0.8, 1.0]), TEXTS, num_base=2, options=one)
    assert not len(found.labels)  # the best proposal is a base class
    none = pseudo_labels(BOXES[:0], embedding[:0], torch.zeros(0), TEXTS, num_base=2)
    assert none.boxes_xyxy.shape == (0, 4)
