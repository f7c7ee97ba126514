"""Spaces of students: what can be varied, and the network that a candidate stands for.

A candidate is a plain mapping that JSON holds. What it stands for is a :class:`NetworkConfig`, the ``student`` of a
distillation: what a search finds is trained by its name and arguments alone.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from visionkd.config.schema import NetworkConfig
from visionkd.errors import Problem, RequestError, did_you_mean

Candidate = dict[str, Any]
_SMALL_IMAGE_PX = 64
_TRIES = 1000


@runtime_checkable
class Space(Protocol):
    """What a search walks through. ``rng`` is the only source of chance.

    Attributes:
        name: For messages and the name of the run.
        size: Number of candidates at most; None where there is no end of them.
    """

    name: str
    size: int | None

    def sample(self, rng: Random) -> Candidate:
        """Return any candidate."""

    def mutate(self, candidate: Candidate, rng: Random) -> Candidate:
        """Return a candidate that differs in one thing."""

    def crossover(self, first: Candidate, second: Candidate, rng: Random) -> Candidate:
        """Return a candidate each part of which is that of one of the two."""

    def enumerate(self) -> Iterator[Candidate]:
        """Yield all candidates; only called where ``size`` is given."""

    def network(self, candidate: Candidate) -> NetworkConfig:
        """Return the student that a candidate stands for."""


def key_of(candidate: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal candidates."""
    return json.dumps(candidate, sort_keys=True)


class GridSpace:
    """Arguments of a network's constructor, each with the values that it may take.

    Args:
        name: Name of the space.
        network: Name of the network; the axis ``network`` takes its place.
        axes: Values by name of the argument; ``blocks.0`` is the first item of the list ``blocks``.
        fixed: Arguments that all candidates share.
        img_size: Input size in pixels; None takes the network's own.
        pretrained: Whether the distillation starts from published weights, which an argument seldom leaves usable.
        valid: Which combinations are allowed.
    """

    def __init__(
        self,
        name: str,
        *,
        axes: Mapping[str, Sequence[Any]],
        network: str | None = None,
        fixed: Mapping[str, Any] | None = None,
        img_size: int | None = None,
        pretrained: bool = False,
        valid: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self.name = name
        self.axes = {axis: tuple(values) for axis, values in axes.items()}
        self.size: int | None = math.prod(len(values) for values in self.axes.values())
        self._network, self._fixed, self._img_size = network, dict(fixed or {}), img_size
        self._pretrained, self._valid = pretrained, valid or (lambda candidate: True)

    def sample(self, rng: Random) -> Candidate:
        for _ in range(_TRIES):
            candidate = {axis: rng.choice(values) for axis, values in self.axes.items()}
            if self._valid(candidate):
                return candidate
        raise RequestError(Problem("--space", f"'{self.name}' allows next to none of its combinations"))

    def mutate(self, candidate: Candidate, rng: Random) -> Candidate:
        axes = rng.sample(sorted(self.axes), len(self.axes))
        for axis in axes:
            others = [value for value in self.axes[axis] if value != candidate[axis]]
            for value in rng.sample(others, len(others)):
                changed = {**candidate, axis: value}
                if self._valid(changed):
                    return changed
        return dict(candidate)  # the only one of its kind

    def crossover(self, first: Candidate, second: Candidate, rng: Random) -> Candidate:
        for _ in range(_TRIES):
            child = {axis: rng.choice((first, second))[axis] for axis in self.axes}
            if self._valid(child):
                return child
        return dict(first)

    def enumerate(self) -> Iterator[Candidate]:
        for values in itertools.product(*self.axes.values()):
            candidate = dict(zip(self.axes, values, strict=True))
            if self._valid(candidate):
                yield candidate

    def network(self, candidate: Candidate) -> NetworkConfig:
        args: dict[str, Any] = copy.deepcopy(self._fixed)
        lists: dict[str, dict[int, Any]] = {}
        for axis, value in candidate.items():
            name, dot, index = axis.partition(".")
            if dot:
                lists.setdefault(name, {})[int(index)] = value
            elif name != "network":
                args[name] = list(value) if isinstance(value, tuple) else value
        args |= {name: [values[index] for index in sorted(values)] for name, values in lists.items()}
        return NetworkConfig(
            name=candidate.get("network", self._network),
            args=args,
            img_size=self._img_size,
            pretrained=self._pretrained,
        )


class NamesSpace:
    """Networks by name, all with their own arguments.

    Args:
        name: Name of the space.
        groups: Names of networks by family: a mutation mostly stays in the family.
        img_size: Input size in pixels; None takes each network's own.
    """

    _STAYS = 0.75

    def __init__(self, name: str, groups: Mapping[str, Sequence[str]], *, img_size: int | None = None) -> None:
        self.name, self._img_size = name, img_size
        self._groups = {group: tuple(names) for group, names in groups.items()}
        self._group_of = {member: group for group, names in self._groups.items() for member in names}
        self._names = sorted(self._group_of)
        self.size: int | None = len(self._names)

    def sample(self, rng: Random) -> Candidate:
        return {"network": rng.choice(self._names)}

    def mutate(self, candidate: Candidate, rng: Random) -> Candidate:
        family = self._groups[self._group_of[candidate["network"]]]
        names = family if len(family) > 1 and rng.random() < self._STAYS else self._names
        others = [name for name in names if name != candidate["network"]]
        return {"network": rng.choice(others)} if others else dict(candidate)

    def crossover(self, first: Candidate, second: Candidate, rng: Random) -> Candidate:
        return dict(rng.choice((first, second)))

    def enumerate(self) -> Iterator[Candidate]:
        for name in self._names:
            yield {"network": name}

    def network(self, candidate: Candidate) -> NetworkConfig:
        return NetworkConfig(name=candidate["network"], img_size=self._img_size)


# Those that come with the project -------------------------------------------------------------------------------------


def _items(name: str, count: int, values: Sequence[Any]) -> dict[str, Sequence[Any]]:
    return {f"{name}.{index}": values for index in range(count)}


def _cifar_resnet_s0(img_size: int | None) -> Space:
    axes = _items("blocks", 3, (1, 3, 5, 7))
    return GridSpace("cifar_resnet_s0", network="cifar_resnet", axes=axes, img_size=img_size)


def _cifar_resnet(img_size: int | None) -> Space:
    # The last stage keeps its 64 channels: gradients of classifiers of one width are compared channel by channel.
    axes = _items("blocks", 3, (1, 3, 5, 7)) | {"channels.0": (8, 12, 16, 24, 32), "channels.1": (16, 24, 32, 48, 64)}
    axes["channels.2"] = (64,)
    return GridSpace("cifar_resnet", network="cifar_resnet", axes=axes, img_size=img_size)


def _mobilenetv2(img_size: int | None) -> Space:
    small = img_size is not None and img_size <= _SMALL_IMAGE_PX
    axes = {"width": (0.35, 0.5, 0.75, 1.0, 1.4)} | _items("depths", 6, (1, 2, 3, 4))
    axes |= _items("kernels", 6, (3, 5, 7)) | _items("expansions", 6, (2, 3, 4, 6))
    fixed = {"strides": [1, 2, 2, 1, 2, 1]} if small else {}
    return GridSpace("mobilenetv2", network="mobilenetv2_free", axes=axes, fixed=fixed, img_size=img_size)


def _vit(img_size: int | None) -> Space:
    small = img_size is not None and img_size <= _SMALL_IMAGE_PX
    axes = {
        "embed_dim": (96, 144, 192, 240, 288, 384),
        "depth": (4, 6, 8, 10, 12, 14),
        "num_heads": (2, 3, 4, 6, 8),
        "mlp_ratio": (2.0, 3.0, 4.0),
    }
    fixed = {"patch_size": 4} if small else {}
    return GridSpace(
        "vit", network="vit_tiny_patch16_224", axes=axes, fixed=fixed, img_size=img_size,
        valid=lambda candidate: candidate["embed_dim"] % candidate["num_heads"] == 0,
    )  # fmt: skip


def _timm(img_size: int | None) -> Space:
    import timm

    import visionkd.models.factory  # noqa: F401  (with it, timm knows this project's own networks)

    groups = {module: timm.list_models(module=module) for module in timm.list_modules()}
    ours = [name for name in timm.list_models() if not any(name in names for names in groups.values())]
    return NamesSpace("timm", {**groups, "visionkd": ours}, img_size=img_size)


_BUILT_IN: Mapping[str, Callable[[int | None], Space]] = {
    "cifar_resnet": _cifar_resnet,
    "cifar_resnet_s0": _cifar_resnet_s0,
    "mobilenetv2": _mobilenetv2,
    "vit": _vit,
    "timm": _timm,
}


def space_names() -> tuple[str, ...]:
    """Return the names of the spaces that come with the project."""
    return tuple(_BUILT_IN)


def open_space(space: str, *, img_size: int | None = None) -> Space:
    """Return a space by its name, or the one that a file describes.

    Args:
        space: One of :func:`space_names`, or the path of a ``.yaml``, ``.yml`` or ``.py`` file; see docs/search.md.
        img_size: Input size of all candidates in pixels; None takes each network's own. At 64 pixels and below,
            ``vit`` takes patches of 4 pixels, and ``mobilenetv2`` halves its maps once less.

    Raises:
        RequestError: If there is no such space, or the file does not describe one.
    """
    if space in _BUILT_IN:
        return _BUILT_IN[space](img_size)
    path = Path(space).expanduser()
    if path.suffix in (".yaml", ".yml", ".py"):
        from visionkd.search.own_space import read_space

        return read_space(path, img_size=img_size)
    hint = did_you_mean(space, _BUILT_IN) or f"Known: {', '.join(_BUILT_IN)}, or a file of your own, .yaml or .py."
    raise RequestError(Problem("--space", f"unknown space '{space}'", hint))
