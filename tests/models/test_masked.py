"""Masked encoders and decoders: they are the plain network on fewer tokens."""

from __future__ import annotations

import pytest
import torch

from tests.methods.masked_nets import tiny_vit, whole_autoencoder
from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.hub.package import save_package
from visionkd.models.factory import load_packaged
from visionkd.models.initial import network_from
from visionkd.models.masked import (
    encode,
    has_sincos_positions,
    initialize_encoder,
    kept_patches,
    masking,
    plain_problem,
    resize_grid,
    set_sincos_positions,
    sincos_positions,
)
from visionkd.models.masked_decoder import DecoderSpec, decoder_of, new_decoder


def noise(batch: int = 3, patches: int = 64) -> torch.Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 49), (0.8, 39), (0.9, 19), (0.95, 9), (0.98, 3)])
def test_a_fraction_of_a_patch_is_dropped(ratio, kept):
    assert kept_patches(196, ratio) == kept


def test_masks_are_consistent():
    found = masking(noise(), 16)
    assert torch.equal(found.mask.sum(1), torch.full((3,), 48.0))
    assert not found.mask.gather(1, found.ids_keep).any() and found.mask.gather(1, found.ids_removed).all()
    order = torch.cat([found.ids_keep, found.ids_removed], dim=1)
    assert torch.equal(order.gather(1, found.ids_restore), torch.arange(64).expand(3, 64))


@pytest.mark.parametrize(
    "args",
    [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}, {"pre_norm": True}],
    ids=str,
)
def test_with_all_patches_it_is_the_plain_network(args):
    network = tiny_vit(seed=1, **args).eval()
    image = torch.rand(2, 3, 32, 32)
    prepared = network.prepare(image)
    everything = torch.arange(64).expand(2, 64)
    ours = encode(network.net, prepared, everything, blocks=(0,))
    if not args.get("global_pool"):
        assert torch.allclose(ours.tokens, network.net.forward_features(prepared), atol=1e-5)
    expected = network.net.get_intermediate_layers(prepared, n=[0], return_prefix_tokens=False)[0]
    assert torch.allclose(ours.features[0][:, -64:], expected, atol=1e-5)
    shuffled = torch.randperm(64).expand(2, 64)
    again = encode(network.net, prepared, shuffled)
    assert torch.allclose(again.tokens[:, -64:], ours.tokens[:, -64:][:, shuffled[0]], atol=1e-5)


def test_positions_are_the_column_first_then_the_row():
    table = sincos_positions((2, 3), 8, prefix=1)
    assert table.shape == (7, 8) and not table[0].any()
    column, row = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])  # of the patch in the second row, third column
    expected = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
    assert torch.allclose(table[1 + 3 + 2], expected)


def test_a_fixed_table_is_built_anew_and_a_learned_one_resampled():
    fixed, learned = tiny_vit(seed=1).eval(), tiny_vit(seed=1).eval()
    set_sincos_positions(fixed.net)
    assert has_sincos_positions(fixed.net) and not has_sincos_positions(learned.net)
    for network in (fixed, learned):
        resize_grid(network, (6, 6))
        assert network.input.img_size == (24, 24) and network(torch.rand(1, 3, 32, 32)).logits.shape == (1, 4)
    assert has_sincos_positions(fixed.net) and not has_sincos_positions(learned.net)


def test_weights_begin_as_the_authors_do():
    network = tiny_vit(seed=1)
    initialize_encoder(network.net)
    first = network.net.blocks[0].mlp.fc1
    bound = (6 / (32 + 128)) ** 0.5
    assert not first.bias.any() and bound * 0.95 < float(first.weight.detach().abs().max()) <= bound
    assert 0.01 < float(network.net.cls_token.detach().std()) < 0.03


def test_what_is_no_plain_transformer_is_told():
    from tests.methods.contract import tiny_network

    assert plain_problem(tiny_vit(seed=1).net) is None
    assert "no plain" in plain_problem(tiny_network(seed=1).net)
    assert "VisionTransformerDistilled" in plain_problem(tiny_network("deit_tiny_distilled_patch16_224", seed=1).net)
    assert "positions" in plain_problem(tiny_vit(seed=1, pos_embed="none").net)


def test_the_decoder_fills_places_and_predicts_those_asked_for():
    network = tiny_vit(seed=1).eval()
    decoder = new_decoder(network.net, DecoderSpec(16, 2, 2)).eval()
    found = masking(noise(), 16)
    tokens = torch.rand(3, 17, 32)
    hidden = decoder(tokens, found.ids_restore)
    assert hidden.shape == (3, 65, 16)
    whole, part = decoder.predict(hidden), decoder.predict(hidden, found.ids_removed)
    assert whole.shape == (3, 64, 48)
    assert torch.allclose(part, whole.gather(1, found.ids_removed[..., None].expand(-1, -1, 48)), atol=1e-6)
    assert torch.equal(decoder(tokens, found.ids_restore, blocks=2), hidden)


def test_a_package_keeps_the_decoder_and_training_forgets_it(tmp_path):
    network = whole_autoencoder(seed=1)
    save_package(network, tmp_path / "model", task="classification", classes=None, metrics={}, origin={})
    loaded, card = load_packaged(tmp_path / "model")
    assert card["decoder"]["width"] == 24 and loaded.num_classes == 0
    before, after = decoder_of(network).state_dict(), decoder_of(loaded).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    begun = network_from(str(tmp_path / "model"), NetworkConfig(name=str(tmp_path / "model")), classes=("a", "b"))
    assert begun.masked_decoder is None and begun.num_classes == 2
    assert torch.equal(begun.net.blocks[0].attn.qkv.weight, network.net.blocks[0].attn.qkv.weight)
    (tmp_path / "model" / "decoder.safetensors").write_bytes(b"x")
    from visionkd.errors import DataError

    with pytest.raises(DataError, match="damaged"):
        load_packaged(tmp_path / "model")


def test_there_is_no_decoder_beside_most_networks():
    with pytest.raises(RequestError, match="without the decoder"):
        decoder_of(tiny_vit(seed=1))
