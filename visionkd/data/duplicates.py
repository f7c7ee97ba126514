"""Finding images that show what another image shows: copies that were re-encoded, resized, trimmed or brightened.

Two steps, both on thumbnails of 32 x 32 pixels. (1) Candidates: the low frequencies of brightness and colour (DCT), as
unit vectors after making up for the fall of natural images towards high ones; a product of matrices compares all with
all. (2) Proof: the directions of edges. The one picture is laid over the other at slightly different scales and places,
and local gradients, each divided by its own strength, are correlated where the two overlap. Pictures that merely have
the same layout of light and dark (a ship on the horizon) pass the first step and fail the second.

Cui et al. (arXiv 2103.05959) match SIFT features for the same purpose.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from PIL import Image

from visionkd.errors import UnreadableImageError
from visionkd.types import Source

#: Changes whenever signatures do, so that stored ones are not compared with new ones.
VERSION = 1
_SIZE = 32
_LUMA, _CHROMA = 8, 3  # DCT coefficients a side
_CODE = _LUMA**2 - 1 + 2 * (_CHROMA**2 - 1)
_WHITENING = 0.7
# Chosen on CIFAR-10, where ciFAIR's authors marked 286 test images with a near-duplicate by hand: docs/methods/ssld.md.
_CANDIDATE, _SAME = 0.70, 0.70
_NOISE = 6.0  # grey levels of a gradient that count as noise
_TEXTURE = 3.0  # below this norm of the gradients there is nothing to recognise
_SCALES = (1.0, 0.95, 0.9, 1 / 0.95, 1 / 0.9)
_SHIFT = 0.05
_PART, _BLOCK, _PAIRS = 64, 4096, 4096
_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)

#: What is kept of an image: a hash of its pixels (0: unreadable), a grey thumbnail, and a unit vector.
SIGNATURE = np.dtype([("digest", "<u8"), ("grey", "u1", (_SIZE, _SIZE)), ("code", "<f2", (_CODE,))])


def signatures(source: Source, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the signatures of samples ``start`` to ``stop``, N of :data:`SIGNATURE`.

    An image that cannot be read has an empty signature, which is like no other.
    """
    indices = range(start, len(source) if stop is None else stop)
    parts = [indices[first : first + _PART] for first in range(0, len(indices), _PART)]
    with ThreadPoolExecutor(_processors()) as pool:
        found = list(pool.map(lambda part: _signatures(source, part), parts))
    return np.concatenate(found) if found else np.zeros(0, SIGNATURE)


def find_copies(images: np.ndarray, originals: np.ndarray, *, mirrored: bool = True) -> np.ndarray:
    """Return, for each of ``images``, an original that it is a copy or near-duplicate of.

    Args:
        images: N of :data:`SIGNATURE`.
        originals: M of :data:`SIGNATURE`.
        mirrored: Find mirrored copies as well.

    Returns:
        Index of the most similar original, -1 where none is similar enough; N of int64.
    """
    found = _equal(images["digest"], originals["digest"])
    rest = np.flatnonzero((found < 0) & (images["digest"] != 0))
    for block in _blocks(rest):
        best = np.full(len(block), -1.0, np.float32)
        for flip in (False, True) if mirrored else (False,):
            for pairs in _candidates(images["code"][block], originals["code"], flip):
                scores = _scores(images["grey"][block], originals["grey"], pairs, flip)
                order = np.argsort(scores)  # of several originals the most similar one comes last and stays
                row, column, score = pairs[order, 0], pairs[order, 1], scores[order]
                better = (score >= _SAME) & (score > best[row])
                best[row[better]] = score[better]
                found[block[row[better]]] = column[better]
    return found


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _BLOCK):
        yield indices[start : start + _BLOCK]


def _equal(digests: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Index of an original with the same pixels, -1 without one."""
    order = np.argsort(originals, kind="stable")
    place = np.searchsorted(originals[order], digests)
    found = np.full(len(digests), -1, np.int64)
    inside = np.flatnonzero(place < len(order))
    hit = inside[(originals[order[place[inside]]] == digests[inside]) & (digests[inside] != 0)]
    found[hit] = order[place[hit]]
    return found


# Signatures -----------------------------------------------------------------------------------------------------------


def _signatures(source: Source, indices: range) -> np.ndarray:
    result = np.zeros(len(indices), SIGNATURE)
    small = np.zeros((len(indices), _SIZE, _SIZE, 3), np.uint8)
    for place, index in enumerate(indices):
        try:
            image = source.load(index)
        except UnreadableImageError:
            continue
        content = repr(image.size).encode() + image.tobytes()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        result["digest"][place] = digest or 1
        small[place] = np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0))
    ycc = (small.astype(np.float32) @ _YCC.T).transpose(0, 3, 1, 2)
    result["grey"] = np.clip(np.rint(ycc[:, 0]), 0, 255)
    parts = [_frequencies(ycc[:, :1], _LUMA), _frequencies(ycc[:, 1:], _CHROMA)]
    code = np.concatenate(parts, axis=1)
    norm = np.linalg.norm(code, axis=1, keepdims=True)
    result["code"] = np.where(norm > 1.0, code / np.maximum(norm, 1.0), 0.0)
    return result


def _frequencies(planes: np.ndarray, count: int) -> np.ndarray:
    """Lowest DCT coefficients of N x K x 32 x 32 without the mean, weighted by their frequency: N x K (count^2 - 1)."""
    basis, weight = _dct(count)
    return ((basis @ planes @ basis.T) * weight).reshape(*planes.shape[:2], -1)[:, :, 1:].reshape(len(planes), -1)


@lru_cache
def _dct(count: int) -> tuple[np.ndarray, np.ndarray]:
    frequency = np.arange(count)
    basis = np.sqrt(2 / _SIZE) * np.cos(np.pi * frequency[:, None] * (np.arange(_SIZE) + 0.5) / _SIZE)
    basis[0] /= np.sqrt(2)
    weight = np.hypot(frequency[:, None], frequency) ** _WHITENING
    return basis.astype(np.float32), weight.astype(np.float32)


@lru_cache
def _mirror_signs() -> np.ndarray:
    """What mirroring an image does to its code: coefficients of odd horizontal frequency change their sign."""
    signs = [np.tile((-1.0) ** np.arange(count), count)[1:] for count in (_LUMA, _CHROMA, _CHROMA)]
    return np.concatenate(signs).astype(np.float32)


# Comparison -----------------------------------------------------------------------------------------------------------


def _candidates(codes: np.ndarray, originals: np.ndarray, flip: bool) -> Iterator[np.ndarray]:
    """Yield pairs (image, original) of similar codes, P x 2, grouped by original."""
    codes = codes.astype(np.float32)
    for start in range(0, len(originals), _BLOCK):
        other = originals[start : start + _BLOCK].astype(np.float32)
        column, row = np.nonzero((other * _mirror_signs() if flip else other) @ codes.T >= _CANDIDATE)
        pairs = np.stack([row, column + start], axis=1)
        for first in range(0, len(pairs), _PAIRS):
            yield pairs[first : first + _PAIRS]


def _scores(images: np.ndarray, originals: np.ndarray, pairs: np.ndarray, flip: bool) -> np.ndarray:
    """Correlation of the edges of each pair where they fit best; P values between -1 and 1."""
    rows, row_of = np.unique(pairs[:, 0], return_inverse=True)
    edges = _edges(images[rows].astype(np.float32))
    matrices, masks = _placements()
    inside = np.sqrt(np.maximum(edges**2 @ masks.T, _TEXTURE**2))
    scores = np.empty(len(pairs), np.float32)
    for column in np.unique(pairs[:, 1]):
        members = np.flatnonzero(pairs[:, 1] == column)
        grey = originals[column].astype(np.float32)
        placed = _edges(np.stack([down @ (grey[:, ::-1] if flip else grey) @ across.T for down, across in matrices]))
        placed *= masks
        norm = np.maximum(np.linalg.norm(placed, axis=1), _TEXTURE)
        mine = row_of.reshape(-1)[members]
        scores[members] = (edges[mine] @ placed.T / (inside[mine] * norm)).max(1)
    return scores


def _edges(grey: np.ndarray) -> np.ndarray:
    """Gradients of N x 32 x 32 after slight smoothing, divided by their own strength: N x 1800."""
    grey = (grey[:, :-1] + grey[:, 1:]) / 2
    grey = (grey[:, :, :-1] + grey[:, :, 1:]) / 2
    down, across = grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]
    strength = np.sqrt(down**2 + across**2 + _NOISE**2)
    return np.concatenate([(part / strength).reshape(len(grey), -1) for part in (down, across)], axis=1)


@lru_cache
def _placements() -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Slight changes of scale and place: the matrices that resample rows and columns, and where the edges are valid."""
    matrices, masks = [], []
    for scale in _SCALES:
        shift = abs(1 - scale) / 2 if scale != 1 else _SHIFT
        axes = [_resampling(scale, sign * shift * _SIZE) for sign in (0, -1, 1)]
        for down, rows in axes:
            for across, columns in axes:
                valid = np.outer(rows, columns)
                # an edge looks at a square of 3 x 3 pixels
                inner = np.lib.stride_tricks.sliding_window_view(valid, (3, 3)).all((2, 3)).ravel()
                matrices.append((down, across))
                masks.append(np.concatenate([inner, inner]))
    return matrices, np.array(masks, np.float32)


def _resampling(scale: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix of linear interpolation at ``scale`` about the centre, moved by ``shift`` pixels, and the rows filled."""
    centre = (_SIZE - 1) / 2
    place = centre + (np.arange(_SIZE) - centre) * scale + shift
    valid = (place > -0.5) & (place < _SIZE - 0.5)
    place = np.clip(place, 0, _SIZE - 1)
    low = np.minimum(place.astype(int), _SIZE - 2)
    matrix = np.zeros((_SIZE, _SIZE), np.float32)
    matrix[np.arange(_SIZE), low] = 1 - (place - low)
    matrix[np.arange(_SIZE), low + 1] += place - low
    return matrix, valid
