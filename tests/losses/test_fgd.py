"""FGD: which cells count how much, what the terms are 0 for, who is trained."""

from __future__ import annotations

import pytest
import torch

from visionkd.losses.fgd import box_masks, channel_attention, context_loss, fgd_terms, spatial_attention
from visionkd.models.context import ContextBlock

SIZE = (48, 64)  # pixels of the image; the map has 6 x 8 cells of 8 pixels


def maps(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(seed))


def boxes(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).reshape(-1, 4)


def test_attention_has_mean_one() -> None:
    features = maps(0)
    assert torch.allclose(spatial_attention(features).mean((1, 2)), torch.ones(2))
    assert torch.allclose(channel_attention(features).mean(1), torch.ones(2))
    strong = features.clone()
    strong[:, :, 2, 3] *= 5
    assert (spatial_attention(strong).flatten(1).argmax(1) == 2 * 8 + 3).all()


def test_a_box_covers_rows_and_columns_of_its_own_axis() -> None:
    inside, outside = box_masks([boxes([9, 17, 30, 22])], image_size=SIZE, map_size=(6, 8))
    cells = [(y, x) for y, x in inside[0].nonzero().tolist()]
    # columns 1 to ceil(3.75) = 4 and rows 2 to ceil(2.75) = 3, both ends included: 8 cells
    assert cells == [(y, x) for y in (2, 3) for x in (1, 2, 3, 4)]
    assert inside.sum().item() == pytest.approx(1.0)
    assert outside.sum().item() == pytest.approx(1.0) and (outside[0] > 0).sum() == 48 - 8


def test_the_smaller_box_decides_where_two_overlap() -> None:
    large, small = [0, 0, 63, 47], [8, 8, 15, 15]
    inside, _ = box_masks([boxes(large, small)], image_size=SIZE, map_size=(6, 8))
    assert inside[0, 1, 1].item() == pytest.approx(1 / 4)
    assert inside[0, 5, 7].item() == pytest.approx(1 / (9 * 7))  # its edges reach one cell beyond the map


def test_without_boxes_everything_is_background_and_a_box_over_all_leaves_none() -> None:
    student, teacher = maps(0), maps(1)
    none = fgd_terms(student_map=student, teacher_map=teacher, boxes=[boxes()] * 2, image_size=SIZE)
    weighed = (student - teacher).square() * channel_attention(teacher)[:, :, None, None]
    plain = (weighed.sum(1) * spatial_attention(teacher)).mean((1, 2)).mean()
    assert none.foreground == 0 and none.background.item() == pytest.approx(plain.item(), rel=1e-5)
    everything = fgd_terms(student_map=student, teacher_map=teacher, boxes=[boxes([0, 0, 64, 48])] * 2, image_size=SIZE)
    assert everything.background == 0 and everything.foreground > 0


def test_equal_features_and_untrained_blocks_cost_nothing() -> None:
    features = maps(0)
    terms = fgd_terms(
        student_map=features.clone(), teacher_map=features, boxes=[boxes([0, 0, 20, 20])] * 2, image_size=SIZE
    )
    relation = context_loss(student_context=ContextBlock(4)(features), teacher_context=ContextBlock(4)(features))
    assert terms.foreground == terms.background == terms.attention == relation == 0


def test_gradients_reach_the_student_and_both_blocks_and_never_the_teacher() -> None:
    student, teacher = maps(0).requires_grad_(), maps(1).requires_grad_()
    blocks = ContextBlock(4), ContextBlock(4)
    for block in blocks:
        torch.nn.init.normal_(block.expand.weight)
    terms = fgd_terms(student_map=student, teacher_map=teacher, boxes=[boxes([0, 0, 20, 20]), boxes()], image_size=SIZE)
    relation = context_loss(student_context=blocks[0](student), teacher_context=blocks[1](teacher.detach()))
    (terms.foreground + terms.background + terms.attention + relation).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    for block in blocks:
        silent = {name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum()}
        assert silent <= {"pick.bias"}  # a softmax does not see what is added to all its inputs


def test_a_context_block_adds_the_same_to_every_cell() -> None:
    block, features = ContextBlock(4), maps(0)
    assert torch.equal(block(features), features)
    torch.nn.init.normal_(block.expand.weight)
    added = block(features) - features
    assert added.abs().sum() > 0 and torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
