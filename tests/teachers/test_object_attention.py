"""The [OBJ] token beside the ordinary tokens of a vision transformer."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from visionkd.teachers.object_attention import (
    ClipTransformer,
    TimmTransformer,
    clip_stepping_problem,
    encode_objects,
    encode_whole,
    stepping_problem,
)


@pytest.fixture
def net() -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=12, pre_norm=True, init_values=0.5
    )
    for parameter in net.parameters():  # far from the small numbers that it begins with
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture
def crops() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def halves(grid: int) -> torch.Tensor:
    """The left half is the object."""
    outside = torch.zeros(2, grid, grid, dtype=torch.bool)
    outside[:, :, grid // 2 :] = True
    return outside


@pytest.mark.parametrize("upsample", [1, 2, 4])
@torch.no_grad()
def test_a_mask_that_leaves_nothing_out_gives_the_class_token(net, crops, upsample) -> None:
    vit = TimmTransformer(net)
    nothing = torch.zeros(2, 4 * upsample, 4 * upsample)
    whole = encode_whole(vit, crops, upsample=upsample)
    assert torch.allclose(encode_objects(vit, crops, nothing, upsample=upsample), whole, atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(2))
    masked = encode_objects(vit, crops, halves(4 * upsample), upsample=upsample)
    assert (masked - whole).abs().max() > 1e-3


@torch.no_grad()
def test_without_denser_patches_the_whole_is_what_the_network_says(net, crops) -> None:
    assert torch.allclose(encode_whole(TimmTransformer(net), crops), F.normalize(net(crops), dim=1), atol=1e-5)


@torch.no_grad()
def test_other_image_sizes_have_positions_too(net, crops) -> None:
    tall = torch.rand(1, 3, 48, 24, generator=torch.Generator().manual_seed(2))
    tokens = TimmTransformer(net).tokens(tall, 1)
    assert tokens.shape == (1, 1 + 6 * 3, 16)
    assert encode_whole(TimmTransformer(net), tall).shape == (1, 12)


@torch.no_grad()
def test_patches_outside_the_object_have_no_part_in_it_and_it_has_none_in_theirs(net) -> None:
    vit, generator = TimmTransformer(net), torch.Generator().manual_seed(3)
    own, patches = (torch.randn(2, count, 16, generator=generator) for count in (1, 16))
    outside = halves(4).flatten(1)
    bias = F.pad(outside.float() * -100, (0, 1))
    block = net.blocks[1]
    seen = vit.step_beside(block, own, patches, bias)
    other = patches.clone()
    other[outside] += torch.randn(16, generator=generator)
    assert torch.equal(vit.step_beside(block, own, other, bias), seen)
    inside = patches.clone()
    inside[~outside] += torch.randn(16, generator=generator)
    assert (vit.step_beside(block, own, inside, bias) - seen).abs().max() > 1e-3
    # the token reads the others before they change, and is no part of what they read
    whole = torch.cat([own, patches], 1)
    assert torch.equal(vit.step(block, whole), block(whole))


@torch.no_grad()
def test_a_hidden_object_attends_to_itself(net, crops) -> None:
    found = encode_objects(TimmTransformer(net), crops, torch.ones(2, 8, 8), upsample=2)
    assert found.isfinite().all()
    # nothing of the image reaches it but the class token, which is the same for all images
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_a_mask_of_another_grid_is_refused(net, crops) -> None:
    with pytest.raises(ValueError, match="16 cells for 64 patches"):
        encode_objects(TimmTransformer(net), crops, torch.zeros(2, 4, 4), upsample=2)


def test_networks_whose_blocks_cannot_be_stepped_are_named() -> None:
    made = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8}
    assert stepping_problem(VisionTransformer(**made)) is None
    assert "class token" in stepping_problem(VisionTransformer(**made, class_token=False, global_pool="avg"))
    assert "pools" in stepping_problem(VisionTransformer(**made, global_pool="avg"))
    assert "class token" in stepping_problem(VisionTransformer(**made, reg_tokens=2))
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64)
    assert "one convolution" in stepping_problem(hybrid)  # a network stands in front of the one that it has
    assert "Linear" in stepping_problem(nn.Linear(2, 2)) and "Linear" in clip_stepping_problem(nn.Linear(2, 2))


@torch.no_grad()
def test_open_clip_and_timm_agree_on_the_same_weights(crops) -> None:
    open_clip = pytest.importorskip("open_clip")
    from functools import partial

    from timm.layers import QuickGELU
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=4, output_dim=12,
        act_layer=open_clip.transformer.QuickGELU,
    ).eval()  # fmt: skip
    assert clip_stepping_problem(visual) is None
    twin = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=12, pre_norm=True,
        act_layer=QuickGELU, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()  # fmt: skip
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    twin.load_state_dict(checkpoint_filter_fn(state, twin))
    ours, theirs = ClipTransformer(visual), TimmTransformer(twin)
    assert torch.allclose(encode_whole(ours, crops), F.normalize(visual(crops), dim=1), atol=1e-5)
    assert ours.grid(2) == theirs.grid(2) == (8, 8)
    masked = encode_objects(ours, crops, halves(8))
    assert torch.allclose(masked, encode_objects(theirs, crops, halves(8)), atol=1e-5)
    assert (masked - encode_whole(ours, crops, upsample=2)).abs().max() > 1e-4
