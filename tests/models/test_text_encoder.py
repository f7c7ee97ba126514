"""The small text encoder: words, unknown ones, and texts of different lengths side by side."""

from __future__ import annotations

import pytest
import torch

from visionkd.errors import RequestError
from visionkd.models.text_encoder import ImageTextHead, TextEncoder, TextSpec, Tokenizer, words_of

CAPTIONS = ("a red circle on a blue background", "a green star, with a small red square")


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextSpec(Tokenizer.words(CAPTIONS), dim=6, width=16, depth=1, heads=2, context=10)).eval()


def test_words_are_lower_case_and_parted_by_underscores() -> None:
    assert words_of("Red_circle, 2 stars!") == ["red", "circle", ",", "2", "stars", "!"]
    assert Tokenizer.words(CAPTIONS) == tuple(sorted({word for text in CAPTIONS for word in words_of(text)}))


def test_unknown_words_are_refused_all_at_once_with_the_nearest(encoder) -> None:
    with pytest.raises(RequestError) as caught:
        encoder.tokenizer(["a red circle", "a purple circl", "", "a dog"])
    said = str(caught.value)
    assert "'purple', 'circl'" in said and "''" in said and "'dog'" in said and len(caught.value.problems) == 3
    with pytest.raises(RequestError, match="Did you mean 'circle'"):
        encoder.tokenizer(["circl"])
    skipped = encoder.tokenizer(["a purple star"], skip_unknown=True)
    assert torch.equal(skipped, encoder.tokenizer(["a star"]))


@torch.no_grad()
def test_neither_the_neighbours_nor_the_padding_matter(encoder) -> None:
    alone = encoder(encoder.tokenizer(["a red circle"]))
    beside = encoder(encoder.tokenizer(["a red circle", "a small green star with a red square"]))
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
    assert torch.allclose(beside.norm(dim=1), torch.ones(2)) and (beside[0] - beside[1]).abs().max() > 1e-3
    swapped = encoder(encoder.tokenizer(["circle red a"]))
    assert (swapped - alone).abs().max() > 1e-4  # the order of words matters


def test_long_texts_are_cut_and_end(encoder) -> None:
    tokens = encoder.tokenizer(["a red circle on a blue background with a small red square"])
    assert tokens.shape == (1, 10) and tokens[0, -1] == 1 and (tokens != 0).all()


def test_a_head_is_built_again_from_its_parts() -> None:
    head = ImageTextHead(TextSpec(("a", "b"), dim=4, width=8, heads=2), width=5, temperature=0.05).eval()
    again = head.saved().head()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())
    assert again.scale.item() == pytest.approx(20.0) and TextSpec.from_dict(head.text.spec.to_dict()) == again.text.spec
    with torch.no_grad():
        head.log_scale.fill_(99.0)
    assert head.scale.item() == pytest.approx(100.0, rel=1e-4)
