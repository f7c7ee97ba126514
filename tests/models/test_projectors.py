from __future__ import annotations

import pytest
import torch
from torch import nn

from visionkd.models.projectors import MapExit, PatchMerging, TokenExit, num_merges


def parameters_m(modules: list[nn.Module]) -> float:
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6


# Extra parameters that the authors' code trains, with 1000 classes.
RESNET18 = [(64, 56), (128, 28), (256, 14), (512, 7)]
MOBILENETV2 = [(24, 56), (32, 28), (96, 14), (1280, 7)]
DEIT_TINY = [(192, 14)] * 4
RESMLP_12 = [(384, 14)] * 4
SWIN_PICO = [(48, 56), (96, 28), (192, 14), (384, 7)]


@pytest.mark.parametrize(
    ("student", "width", "tokens", "expected_m"),
    [
        (RESNET18, 512, False, 3.04),
        (MOBILENETV2, 1280, False, 7.14),
        (DEIT_TINY, 192, True, 4.48),
        (RESMLP_12, 384, True, 16.3),
        (SWIN_PICO, 384, True, 16.3),
    ],
)
def test_exits_are_as_large_as_the_authors(student, width: int, tokens: bool, expected_m: float) -> None:
    with torch.device("meta"):
        exits = []
        for stage, (channels, side) in enumerate(student, start=1):
            if tokens:
                made = TokenExit(channels=channels, grid=(side, side), stage=stage, width=width, num_classes=1000)
            else:
                made = MapExit(channels=channels, stage=stage, width=width, num_classes=1000)
            exits.append(made)
    assert float(f"{parameters_m(exits):.3g}") == expected_m


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (1, 6)])
def test_an_exit_from_maps_takes_every_size(stage: int, size: tuple[int, int]) -> None:
    made = MapExit(channels=6, stage=stage, width=20, num_classes=3)
    feature = torch.rand(4, 6, *size, requires_grad=True)
    logits = made(feature)
    assert logits.shape == (4, 3)
    logits.square().sum().backward()
    assert feature.grad.abs().sum() > 0 and all(parameter.grad is not None for parameter in made.parameters())
    widths = [block[-3].out_channels for block in made.blocks if isinstance(block, nn.Sequential)]
    assert widths == {1: [12, 24, 20], 2: [12, 20], 3: [20], 4: []}[stage], "only the last one jumps to the width"


def test_layouts_of_memory_change_nothing() -> None:
    for stage in (2, 4):
        torch.manual_seed(0)
        made = MapExit(channels=6, stage=stage, width=10, num_classes=3)
        feature = torch.rand(4, 6, 8, 8)
        grads = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            made = made.to(memory_format=memory_format)
            given = feature.clone(memory_format=memory_format).requires_grad_()
            made(given).square().sum().backward()
            grads.append(given.grad)
        torch.testing.assert_close(*grads)


def test_the_last_exit_from_maps_is_a_convolution_then_the_mean() -> None:
    made = MapExit(channels=6, stage=4, width=10, num_classes=3)
    feature = torch.rand(4, 6, 5, 5)
    torch.testing.assert_close(made(feature), made.head(made.blocks[0](feature).mean((2, 3))))


@pytest.mark.parametrize(
    ("grid", "count"),
    [
        ((56, 56), 3),
        ((28, 28), 2),
        ((14, 14), 1),
        ((13, 13), 0),
        ((7, 7), 0),
        ((4, 4), 0),
        ((24, 24), 1),
        ((32, 32), 2),
        ((15, 15), 1),
        ((14, 28), 1),
        ((1, 400), 0),
        ((3, 300), 1),
    ],
)
def test_how_often_tokens_are_merged(grid: tuple[int, int], count: int) -> None:
    assert num_merges(grid) == count


def test_small_images_are_merged_down_to_where_the_network_ends() -> None:
    assert [num_merges((side, side), (4, 4)) for side in (16, 8, 4)] == [2, 1, 0]
    assert [num_merges((side, side), (1, 1)) for side in (4, 2, 1)] == [2, 1, 0]
    assert [num_merges((side, side), (14, 14)) for side in (14, 28)] == [1, 2], "a ViT's final grid changes nothing"


def test_neighbours_are_joined_column_by_column() -> None:
    merging = PatchMerging(1, 4, activation=False)
    merging.norm = nn.Identity()
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(4))
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert merging(x)[0, 0, 1].tolist() == [2.0, 6.0, 3.0, 7.0]
    odd = merging(torch.arange(1.0, 10.0).view(1, 3, 3, 1))
    assert odd.shape == (1, 2, 2, 4) and odd[0, 1, 1].tolist() == [9.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize(("channels", "grid"), [(6, (16, 16)), (6, (15, 20)), (6, (4, 4)), (20, (4, 4)), (20, (1, 1))])
def test_an_exit_from_tokens_takes_every_grid(stage: int, channels: int, grid: tuple[int, int]) -> None:
    made = TokenExit(channels=channels, grid=grid, stage=stage, width=20, num_classes=3)
    feature = torch.rand(2, channels, *grid, requires_grad=True)
    logits = made(feature)
    assert logits.shape == (2, 3) and len(made.blocks) == (3 if stage == 1 else 1)
    logits.square().sum().backward()
    assert feature.grad.abs().sum() > 0 and all(parameter.grad is not None for parameter in made.parameters())
    assert {module.eps for module in made.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    assert all(block.attn.num_heads == 4 and block.attn.qkv.bias is None for block in made.blocks)


def test_gelu_follows_each_merge_but_the_last_of_several() -> None:
    def activations(grid: int, channels: int = 4) -> list[bool]:
        made = TokenExit(channels=channels, grid=(grid, grid), stage=4, width=8, num_classes=2)
        return [isinstance(merging.act, nn.GELU) for merging in made.merging]

    assert activations(56) == [True, True, False]
    assert activations(14) == [True]
    assert activations(7) == [True], "one token stays one, but its width changes"
    assert activations(7, channels=8) == []


def test_the_class_token_joins_the_blocks_and_is_read() -> None:
    made = TokenExit(channels=8, grid=(14, 14), stage=3, width=8, num_classes=3, class_token=True).eval()
    feature, prefix = torch.rand(2, 8, 14, 14, requires_grad=True), torch.rand(2, 2, 8)
    logits = made(feature, prefix_tokens=prefix)
    assert not torch.allclose(logits, made(feature, prefix_tokens=prefix.flip(1))), "the first one is read"
    logits.sum().backward()
    assert feature.grad.abs().amin(0).amax() > 0, "it attends to the others"
    with pytest.raises(ValueError, match="width 4 cannot join blocks of width 8"):
        TokenExit(channels=4, grid=(7, 7), stage=4, width=8, num_classes=3, class_token=True)


def test_a_width_that_four_heads_do_not_divide() -> None:
    made = TokenExit(channels=6, grid=(4, 4), stage=4, width=6, num_classes=3)
    assert made.blocks[0].attn.num_heads == 2 and made(torch.rand(1, 6, 4, 4)).shape == (1, 3)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    tokens = TokenExit(channels=64, grid=(14, 14), stage=3, width=64, num_classes=100)
    maps = MapExit(channels=64, stage=3, width=256, num_classes=100)
    linear = [m for made in (tokens, maps) for m in made.modules() if isinstance(m, nn.Linear)]
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert module.bias is None or not module.bias.any()
    pointwise = maps.blocks[0][5]
    assert pointwise.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
