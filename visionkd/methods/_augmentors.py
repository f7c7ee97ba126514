"""Learned augmentations: modules from images in [0, 1] to images in [0, 1], B x 3 x H x W, that begin near identity.

Their parameters describe distributions, and gradients reach these through the images (reparameterised draws). Noise
comes from a generator that the caller passes, always on the CPU, so that a step looks the same on every device.
"Simple spatial transformations" and a variational autoencoder are the authors' words (Nix, Burg and Sinz, arXiv
2305.14890); the form of everything here is this project's, since no code of theirs was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.transforms import v2

from visionkd.config.schema import HardAugmentConfig

_LEAST_STD = 1e-3
_MOST_LINEAR = 0.4  # of each entry of the matrix: its determinant stays above 0.2, so no image is mirrored or collapses
_MOST_COLOR = 0.5
_LUMA = (0.299, 0.587, 0.114)
_MIX_START = 4.0  # logit of the original image, 95 % of the mixture beside three augmentations
_MIX_BOUND = 6.0
_MIX_GROUP = 16  # images that share one draw of an augmentation's parameters


class Augmentor(nn.Module):
    """Base of all augmentors."""

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        """Augment images in [0, 1], B x 3 x H x W; one draw per image."""
        raise NotImplementedError

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring the parameters back into their bounds, after a step of the optimiser."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Return what was learned, in the units of the report: ``{name: {"mean": ..., "std": ...}}``."""
        return {}

    def learned(self) -> list[nn.Parameter]:
        """Return the parameters phi that the game between student and augmentor trains."""
        return list(self.parameters())


class Gaussians(nn.Module):
    """Independent Gaussians with learnable mean and log-std, drawn by reparameterisation and cut off at a bound.

    Args:
        bounds: Largest deviation of a draw from 0, for each of N values.
        std: Standard deviation at the start.
        max_std: Largest standard deviation.
    """

    bounds: Tensor

    def __init__(self, bounds: Sequence[float], *, std: float, max_std: float) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor(bounds))
        self.mean = nn.Parameter(torch.zeros(len(bounds)))
        self.log_std = nn.Parameter(torch.full((len(bounds),), std).log())
        self.max_std = max_std

    def forward(self, count: int, generator: Generator) -> Tensor:
        """Draw ``count`` x N values."""
        noise = torch.randn(count, len(self.mean), generator=generator).to(self.mean.device)
        # beyond the bound a draw has no gradient; the means stay within, so that there are always draws that have one
        return (self.mean + self.log_std.exp() * noise).clamp(-self.bounds, self.bounds)

    @torch.no_grad()
    def constrain(self) -> None:
        self.mean.clamp_(-self.bounds, self.bounds)
        self.log_std.clamp_(torch.tensor(_LEAST_STD).log().item(), torch.tensor(self.max_std).log().item())


def matrices(values: Tensor) -> Tensor:
    """Return B x 2 x 3 matrices of B x 6 entries, of B x 4 without a shift, or of B x 2 shifts alone.

    A shift of 1 is half the width or height of the image.
    """
    count = values.shape[1]
    if count == 6:
        return values.view(-1, 2, 3)
    identity = torch.eye(2, dtype=values.dtype, device=values.device).expand(len(values), 2, 2)
    linear = values.view(-1, 2, 2) if count == 4 else identity
    shift = values if count == 2 else torch.zeros_like(values[:, :2])
    return torch.cat([linear, shift.unsqueeze(2)], dim=2)


def warp(image: Tensor, theta: Tensor) -> Tensor:
    """Resample each image by its matrix: bilinear, zeros outside, corners not aligned.

    Args:
        image: B x C x H x W.
        theta: B x 2 x 3, from coordinates of the output, in [-1, 1], to those of the input.
    """
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class AffineAugmentor(Augmentor):
    """A learned Gaussian over 2 x 3 matrices around the identity, or over their shift or linear part alone."""

    NAMES = (("xx", "xy", "x"), ("yx", "yy", "y"))
    TITLES = {
        "x": ("shift across, % of width", 50.0),
        "y": ("shift down, % of height", 50.0),
        "xx": ("stretch across, %", 100.0),
        "yy": ("stretch down, %", 100.0),
    }
    identity: Tensor

    def __init__(self, config: HardAugmentConfig) -> None:
        super().__init__()
        linear, shift = _MOST_LINEAR, config.max_shift
        columns = {"full": (0, 1, 2), "translation": (2,), "linear": (0, 1)}[config.affine]
        bounds, identity = torch.tensor([[linear, linear, shift]] * 2), torch.eye(2, 3)
        self.names = [self.NAMES[row][column] for row in range(2) for column in columns]
        self.register_buffer("identity", identity[:, columns].flatten())
        self.values = Gaussians(bounds[:, columns].flatten().tolist(), std=config.std, max_std=config.max_std)

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        return warp(image, matrices(self.identity + self.values(len(image), generator)))

    def constrain(self) -> None:
        self.values.constrain()

    def summary(self) -> dict[str, dict[str, float]]:
        mean, std = self.values.mean.detach().tolist(), self.values.log_std.detach().exp().tolist()
        by_name = {name: (m, s) for name, m, s in zip(self.names, mean, std, strict=True)}
        # the matrix leads from output to input: what it adds moves the picture the other way
        found = {
            title: {"mean": -scale * by_name[name][0], "std": scale * by_name[name][1]}
            for name, (title, scale) in self.TITLES.items()
            if name in by_name
        }
        if "xy" in by_name:
            (one, one_std), (other, other_std) = by_name["xy"], by_name["yx"]
            turn = {"mean": (one - other) / 2, "std": (one_std**2 + other_std**2) ** 0.5 / 2}
            found["turn, degrees"] = {name: 180.0 / torch.pi * value for name, value in turn.items()}
        return found


class ColorAugmentor(Augmentor):
    """A learned Gaussian over brightness, contrast, saturation, and a scale and shift of each channel."""

    NAMES = ("brightness", "contrast", "saturation", *(f"{c} {k}" for k in ("scale", "shift") for c in "RGB"))

    def __init__(self, config: HardAugmentConfig) -> None:
        super().__init__()
        self.values = Gaussians((_MOST_COLOR,) * 6 + (_MOST_COLOR / 2,) * 3, std=config.std, max_std=config.max_std)
        self.register_buffer("luma", torch.tensor(_LUMA))

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        drawn = self.values(len(image), generator)
        brightness, contrast, saturation = (1.0 + drawn[:, :3, None]).unbind(1)  # B x 1 each
        gain = brightness * (1.0 + drawn[:, 3:6])
        # all of it is one linear map of the colours of each image, with its mean grey as the centre of contrast
        grey = saturation[..., None] * torch.eye(3, device=drawn.device) + (1.0 - saturation[..., None]) * self.luma
        matrix = (gain * contrast)[..., None] * grey
        centre = (image.mean((2, 3)) * self.luma).sum(1, keepdim=True)
        offset = gain * (1.0 - contrast) * centre + drawn[:, 6:]
        image = torch.baddbmm(offset[..., None], matrix, image.flatten(2)).view(image.shape)
        return image.clamp(0.0, 1.0)

    def constrain(self) -> None:
        self.values.constrain()

    def summary(self) -> dict[str, dict[str, float]]:
        mean, std = self.values.mean.detach().tolist(), self.values.log_std.detach().exp().tolist()
        return {
            f"{name}, %": {"mean": 100.0 * m, "std": 100.0 * s}
            for name, m, s in zip(self.NAMES, mean, std, strict=True)
        }


class MixAugmentor(Augmentor):
    """A learned mixture of the original image and drawn existing augmentations: ``x' = sum_j w_j A_j(x)``.

    Only the weights are learned, ``w = softmax`` of logits that all images share; the augmented images are constants.
    """

    NAMES = ("original", "TrivialAugment", "RandAugment", "CutMix")

    def __init__(self, config: HardAugmentConfig) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([_MIX_START] + [0.0] * (len(self.NAMES) - 1)))
        self.transforms = (v2.TrivialAugmentWide(), v2.RandAugment())
        self.cutmix = v2.CutMix(num_classes=1)

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        weights = self.logits.softmax(0)
        with torch.no_grad():
            drawn = self._drawn(image, generator)
        return sum((weight * part for weight, part in zip(weights[1:], drawn, strict=True)), weights[0] * image)

    def _drawn(self, image: Tensor, generator: Generator) -> list[Tensor]:
        # torchvision draws from the default generator, of which the student's own randomness must notice nothing
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            groups = image.split(_MIX_GROUP)
            found = [torch.cat([transform(group) for group in groups]) for transform in self.transforms]
            labels = torch.zeros(len(image), dtype=torch.int64, device=image.device)
            found.append(self.cutmix(image, labels)[0])
        finally:
            torch.set_rng_state(state)
        return [part.clamp(0.0, 1.0) for part in found]

    @torch.no_grad()
    def constrain(self) -> None:
        self.logits.clamp_(-_MIX_BOUND, _MIX_BOUND)

    def summary(self) -> dict[str, dict[str, float]]:
        weights = self.logits.detach().softmax(0).tolist()
        return {f"{name}, % of the mixture": {"mean": 100.0 * w} for name, w in zip(self.NAMES, weights, strict=True)}


class Chain(Augmentor):
    """Augmentors one after the other."""

    def __init__(self, parts: Mapping[str, Augmentor]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        for part in self.parts.values():
            image = part(image, generator)
        return image

    def constrain(self) -> None:
        for part in self.parts.values():
            part.constrain()

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: values for part in self.parts.values() for name, values in part.summary().items()}

    def learned(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts.values() for parameter in part.learned()]


def build_augmentor(config: HardAugmentConfig, *, seed: int) -> Chain:
    """Return the augmentors of a configuration, in its order; the seed draws what begins at random in them."""
    from visionkd.methods._vdvae import VDVAEAugmentor, load_vae

    known = {"affine": AffineAugmentor, "color": ColorAugmentor, "mix": MixAugmentor, "vdvae": VDVAEAugmentor}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        chain = Chain({name: known[name](config) for name in dict.fromkeys(config.augmentors)})
    if "vdvae" in config.augmentors and config.vae_file is not None:
        load_vae(chain.parts["vdvae"].vae, config.vae_file)
    return chain
