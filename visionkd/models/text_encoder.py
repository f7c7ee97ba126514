"""A small text encoder over the words of its own captions, trained beside an image encoder.

It knows no word that no caption had: it refuses a text with other words rather than to guess what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkd.errors import Problem, RequestError, did_you_mean

_PAD, _END, _FIRST = 0, 1, 2
_TOKENS = re.compile(r"[^\W_]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words and punctuation marks; underscores separate words."""
    return _TOKENS.findall(text.lower())


@dataclass(frozen=True)
class TextSpec:
    """Size and words of a text encoder.

    Attributes:
        words: Everything it can read, in the order of its embeddings.
        dim: Length of an embedding of a text, and of an image.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        context: Most words of a text; longer captions are cut.
    """

    words: tuple[str, ...]
    dim: int
    width: int = 128
    depth: int = 2
    heads: int = 4
    context: int = 64

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "words": list(self.words)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextSpec:
        return cls(**{**values, "words": tuple(values["words"])})


class Tokenizer:
    """Words to numbers."""

    def __init__(self, words: Sequence[str], context: int) -> None:
        self.numbers = {word: number for number, word in enumerate(words, start=_FIRST)}
        self.context = context

    @classmethod
    def words(cls, texts: Iterable[str]) -> tuple[str, ...]:
        """Return every word of ``texts``, sorted."""
        return tuple(sorted({word for text in texts for word in words_of(text)}))

    def unknown(self, text: str) -> list[str]:
        """Return the words of ``text`` that are not known."""
        return [word for word in words_of(text) if word not in self.numbers]

    def __call__(self, texts: Sequence[str], *, skip_unknown: bool = False) -> Tensor:
        """Return the numbers of words, N x L of int64 for a longest text of L, each closed by an end mark.

        Args:
            texts: What to read; those longer than the context are cut.
            skip_unknown: Leave unknown words out, as for captions that are only looked at.

        Raises:
            RequestError: If a text has an unknown word, or none at all.
        """
        rows = torch.full((len(texts), self.context), _PAD, dtype=torch.int64)
        problems = []
        for row, text in zip(rows, texts, strict=True):
            words, unknown = words_of(text), self.unknown(text)
            if unknown and not skip_unknown:
                near = did_you_mean(unknown[0], self.numbers)
                said = ", ".join(f"'{word}'" for word in unknown)
                problems.append(Problem("text", f"'{text}' has words that no caption had: {said}", near or None))
            elif not words:
                problems.append(Problem("text", f"'{text}' has no word"))
            known = [self.numbers[word] for word in words if word in self.numbers][: self.context - 1]
            row[: len(known) + 1] = torch.tensor([*known, _END])
        if problems:
            raise RequestError(problems, hint="The encoder reads the words of its own training captions alone.")
        return rows[:, : int((rows != _PAD).sum(1).amax())] if len(rows) else rows


class TextEncoder(nn.Module):
    """A transformer over words; the end mark gathers the text.

    Args:
        spec: Its size and words.
    """

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer = Tokenizer(spec.words, spec.context)
        self.embedding = nn.Embedding(len(spec.words) + _FIRST, spec.width, padding_idx=_PAD)
        self.positions = nn.Parameter(torch.empty(spec.context, spec.width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                spec.width,
                spec.heads,
                4 * spec.width,
                dropout=0.0,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )  # fmt: skip
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(spec.width)
        self.projection = nn.Linear(spec.width, spec.dim, bias=False)
        for table in (self.embedding.weight, self.positions):
            nn.init.normal_(table, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings of length 1, N x dim, for ``tokens``, N x L up to the context."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=tokens == _PAD)
        ends = (tokens == _END).int().argmax(1)
        return F.normalize(self.projection(self.norm(x[torch.arange(len(x)), ends])).float(), dim=-1)


class ImageTextHead(nn.Module):
    """What makes an image encoder one of images and texts: the text encoder, and a projection of the image's token.

    Args:
        spec: Of the text encoder.
        width: Channels of the image encoder's class token.
        temperature: That the cosines are divided by at the beginning; it is learned, and kept above 0.01.
    """

    def __init__(self, spec: TextSpec, *, width: int, temperature: float = 0.07) -> None:
        super().__init__()
        self.text = TextEncoder(spec)
        self.projection = nn.Linear(width, spec.dim, bias=False)
        self.log_scale = nn.Parameter(-torch.tensor(temperature).log())

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines, at most 100."""
        return self.log_scale.clamp_max(4.6052).exp()

    def saved(self) -> SavedTexts:
        """Return its size and tensors, to keep beside the image encoder."""
        tensors = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return SavedTexts(self.text.spec, tensors)


@dataclass(frozen=True, eq=False)
class SavedTexts:
    """An :class:`ImageTextHead` beside the weights of its image encoder."""

    spec: TextSpec
    tensors: Mapping[str, Tensor]

    def head(self) -> ImageTextHead:
        """Build it, in eval mode."""
        head = ImageTextHead(self.spec, width=self.tensors["projection.weight"].shape[1])
        head.load_state_dict(dict(self.tensors))
        return head.eval()
