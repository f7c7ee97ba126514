"""HARD's unconstrained augmentor: edits in the latents of a small hierarchical autoencoder.

A Very Deep VAE (Child, arXiv 2011.10650) in small: an encoder, and six top-down decoder blocks at 1/8, 1/4 and 1/2 of
the size, each with a prior p(z | above) and a posterior q(z | above, x). To augment, blocks before ``start`` sample
their posterior; in the blocks [start, end) a small network changes the posterior's mean and raw scale first; blocks
from ``end`` on sample the prior, and the output is sampled with gradient. As in the authors' own VDVAE fork, scales are
``elu(raw) + 1``; unlike there, the KL term uses the same scale as the sampler.

Simplified: the output has one logistic per pixel and channel instead of a mixture of ten (nothing is to be chosen by a
soft Gumbel draw then), with a density instead of bins of 1/255, and the autoencoder sees images at 32 pixels. What is
added to an image is the difference that the edit makes, ``x' = x + (decoded with edit - decoded without)`` with the
same noise on both sides. So it begins at the identity, and keeps the detail that a small autoencoder blurs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn

from visionkd.config.schema import HardAugmentConfig
from visionkd.errors import Problem
from visionkd.files import write_bytes
from visionkd.methods._augmentors import Augmentor
from visionkd.methods._optimizer import step_together

SIZE = 32
_WIDTH, _HIDDEN, _LATENTS = 32, 16, 8
_LEVELS = (4, 8, 16)  # height and width of the decoder's blocks, two blocks each
_LEAST_SCALE = 1e-3
_LEAST_OUTPUT_SCALE = 2.0 / 255.0  # of pixels in [-1, 1]: flat areas would otherwise have an infinite density
_MOST_EDIT = 2.0
_LR, _BATCH = 2e-3, 64


def scale_of(raw: Tensor) -> Tensor:
    """Return a positive scale, ``elu(raw) + 1``: linear above 0, so that it cannot explode as exp does."""
    return F.elu(raw) + (1.0 + _LEAST_SCALE)


def gaussian_kl(mean: Tensor, raw: Tensor, prior_mean: Tensor, prior_raw: Tensor) -> Tensor:
    """Return KL(N(mean, scale^2) || N(prior_mean, prior_scale^2)) of each element."""
    scale, prior_scale = scale_of(raw), scale_of(prior_raw)
    return (prior_scale / scale).log() + (scale**2 + (mean - prior_mean) ** 2) / (2 * prior_scale**2) - 0.5


def _bottleneck(inputs: int, outputs: int, *, scale: float = 1.0) -> nn.Sequential:
    """1 x 1, 3 x 3 and 1 x 1 convolutions; ``scale`` makes what a residual block adds small at the start."""
    last = nn.Conv2d(_HIDDEN, outputs, 1)
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.zero_()
    middle = nn.Conv2d(_HIDDEN, _HIDDEN, 3, padding=1)
    return nn.Sequential(nn.GELU(), nn.Conv2d(inputs, _HIDDEN, 1), nn.GELU(), middle, nn.GELU(), last)


class DecoderBlock(nn.Module):
    """One latent: its prior, its posterior, and what it adds to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = _bottleneck(_WIDTH, 2 * _LATENTS + _WIDTH, scale=0.1)
        self.posterior = _bottleneck(2 * _WIDTH, 2 * _LATENTS, scale=0.1)
        self.from_latent = nn.Conv2d(_LATENTS, _WIDTH, 1)
        self.residual = _bottleneck(_WIDTH, _WIDTH, scale=0.1)

    def open(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prior's mean and raw scale, and the state with what the prior's features add to it."""
        mean, raw, more = self.prior(state).split([_LATENTS, _LATENTS, _WIDTH], dim=1)
        return mean, raw, state + more

    def close(self, state: Tensor, latent: Tensor) -> Tensor:
        """Return the state with the latent in it."""
        state = state + self.from_latent(latent)
        return state + self.residual(state)


class VDVAE(nn.Module):
    """A hierarchical autoencoder of images in [-1, 1], B x 3 x 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTH, 4, stride=2, padding=1)
        self.encoder = nn.ModuleList(_bottleneck(_WIDTH, _WIDTH, scale=0.5) for _ in _LEVELS)
        self.start = nn.Parameter(torch.zeros(1, _WIDTH, _LEVELS[0], _LEVELS[0]))
        self.blocks = nn.ModuleList(DecoderBlock() for _ in range(2 * len(_LEVELS)))
        self.output = nn.ConvTranspose2d(_WIDTH, 6, 4, stride=2, padding=1)
        with torch.no_grad():
            self.output.bias[3:] = -2.0  # a scale of 0.14

    def encode(self, image: Tensor) -> dict[int, Tensor]:
        """Return the activations by their height."""
        state, found = self.stem(image), {}
        for number, (size, block) in enumerate(zip(reversed(_LEVELS), self.encoder, strict=True)):
            state = state if number == 0 else F.avg_pool2d(state, 2)
            found[size] = state = state + block(state)
        return found

    def decode(
        self, found: dict[int, Tensor], noise: Sequence[Tensor], *, edit: Edit | None, end: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output's mean and raw scale, and the KL of posterior and prior per image.

        Args:
            found: What :meth:`encode` returned.
            noise: Standard normal, one B x Z x R x R for each block.
            edit: Changes the posterior's parameters; None leaves them.
            end: Blocks from this one on sample their prior.
        """
        batch = len(found[_LEVELS[0]])
        state = self.start.expand(batch, -1, -1, -1)
        kl = state.new_zeros(batch)
        for number, (block, eps) in enumerate(zip(self.blocks, noise, strict=True)):
            size = eps.shape[-1]
            state = state if state.shape[-1] == size else F.interpolate(state, scale_factor=2, mode="nearest")
            mean, raw, opened = block.open(state)
            if number < end:
                prior = (mean, raw)
                mean, raw = block.posterior(torch.cat([state, found[size]], dim=1)).chunk(2, dim=1)
                kl = kl + gaussian_kl(mean, raw, *prior).flatten(1).sum(1)
                if edit is not None:
                    mean, raw = edit(number, mean, raw)
            state = block.close(opened, mean + scale_of(raw) * eps)
        mean, raw = self.output(state).chunk(2, dim=1)
        return mean, raw, kl

    def loss(self, image: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Return the negative evidence lower bound in nats per pixel and channel; ``image`` in [-1, 1]."""
        mean, raw, kl = self.decode(self.encode(image), noise, edit=None, end=len(self.blocks))
        scale = scale_of(raw) + _LEAST_OUTPUT_SCALE
        z = (image - mean) / scale
        nll = (z + 2.0 * F.softplus(-z) + scale.log()).flatten(1).sum(1)
        return (nll + kl).mean() / image[0].numel()


class Edit(nn.Module):
    """The augmentation network: new mean and raw scale of the posteriors of the blocks [start, end)."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start = start
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * _LATENTS, _WIDTH, 1), nn.GELU(), nn.Conv2d(_WIDTH, 2 * _LATENTS, 1))
            for _ in range(start, end)
        )
        for net in self.nets:
            nn.init.zeros_(net[2].weight)
            nn.init.zeros_(net[2].bias)

    def forward(self, number: int, mean: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        if not self.start <= number < self.start + len(self.nets):
            return mean, raw
        change = _MOST_EDIT * torch.tanh(self.nets[number - self.start](torch.cat([mean, raw], dim=1)))
        more_mean, more_raw = change.chunk(2, dim=1)
        return mean + more_mean, raw + more_raw


class VDVAEAugmentor(Augmentor):
    """Edits images in the latents of an autoencoder, which is trained before the game and fixed in it."""

    def __init__(self, config: HardAugmentConfig) -> None:
        super().__init__()
        self.vae = VDVAE()
        self.end = config.vae_blocks[1]
        self.edit = Edit(*config.vae_blocks)

    def learned(self) -> list[nn.Parameter]:
        return list(self.edit.parameters())

    def forward(self, image: Tensor, generator: Generator) -> Tensor:
        small = _to_small(image)
        noise = latent_noise(len(image), generator, image.device)
        u = torch.rand(small.shape, generator=generator).clamp_(1e-4, 1.0 - 1e-4).to(image.device)
        logistic = u.log() - (-u).log1p()
        with torch.no_grad():
            found = self.vae.encode(small)
            plain = self._sample(found, noise, logistic, edit=None)
        change = (self._sample(found, noise, logistic, edit=self.edit) - plain) / 2.0
        if change.shape[-2:] != image.shape[-2:]:
            change = F.interpolate(change, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return (image + change).clamp(0.0, 1.0)

    def _sample(
        self, found: dict[int, Tensor], noise: Sequence[Tensor], logistic: Tensor, *, edit: Edit | None
    ) -> Tensor:
        mean, raw, _ = self.vae.decode(found, noise, edit=edit, end=self.end)
        return (mean + (scale_of(raw) + _LEAST_OUTPUT_SCALE) * logistic).clamp(-1.0, 1.0)

    def summary(self) -> dict[str, dict[str, float]]:
        sizes = [net[2].weight.detach().square().mean().sqrt() for net in self.edit.nets]
        return {
            f"edit of block {self.edit.start + number}, weight": {"mean": float(size)}
            for number, size in enumerate(sizes)
        }

    def vae_loss(self, image: Tensor, generator: Generator) -> Tensor:
        """Return the autoencoder's own loss on images in [0, 1], B x 3 x H x W."""
        return self.vae.loss(_to_small(image), latent_noise(len(image), generator, image.device))


def latent_noise(batch: int, generator: Generator, device: torch.device) -> list[Tensor]:
    """Draw standard normal noise for every block."""
    return [
        torch.randn(batch, _LATENTS, size, size, generator=generator).to(device) for size in _LEVELS for _ in range(2)
    ]


def _to_small(image: Tensor) -> Tensor:
    if tuple(image.shape[-2:]) != (SIZE, SIZE):
        image = F.interpolate(image, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return image * 2.0 - 1.0


class Pretraining:
    """Trains the autoencoder of an augmentor on the run's own images, in the first steps of the run.

    Args:
        augmentor: May have no autoencoder; there is nothing to do then.
        config: How many steps, or the file that makes them needless.
    """

    def __init__(self, augmentor: Augmentor, config: HardAugmentConfig) -> None:
        self.part = next((part for part in augmentor.modules() if isinstance(part, VDVAEAugmentor)), None)
        self.steps_left = 0 if self.part is None or config.vae_file is not None else config.vae_steps
        self.optimizer: torch.optim.Adam | None = None
        if self.part is not None:
            self.part.vae.requires_grad_(self.steps_left > 0)
            if self.steps_left:
                self.optimizer = torch.optim.Adam(self.part.vae.parameters(), lr=_LR)

    def step(self, image: Tensor, generator: Generator, mean_of_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Train on a batch of images in [0, 1], and return the loss.

        Args:
            image: B x 3 x H x W, of which a part is taken.
            generator: Draws the latents.
            mean_of_ranks: Averages a tensor over all processes.
        """
        assert self.part is not None and self.optimizer is not None
        with torch.autocast(image.device.type, enabled=False), torch.enable_grad():
            loss = self.part.vae_loss(image[:_BATCH], generator)
        loss.backward()
        parameters = list(self.part.vae.parameters())
        step_together(self.optimizer, parameters, clip_grad_norm=1.0, mean_of_ranks=mean_of_ranks)
        self.steps_left -= 1
        if not self.steps_left:
            self.part.vae.requires_grad_(False)
            self.optimizer = None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        state = None if self.optimizer is None else self.optimizer.state_dict()
        return {"steps_left": self.steps_left, "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_left = state["steps_left"]
        if self.optimizer is not None and self.steps_left:
            self.optimizer.load_state_dict(state["optimizer"])
        elif self.part is not None:
            self.optimizer = None
            self.part.vae.requires_grad_(False)


def save_vae(vae: VDVAE, path: Path) -> None:
    """Write an autoencoder, for ``augment.hard.vae_file`` of another run."""
    write_bytes(path, save({name: value.contiguous() for name, value in vae.state_dict().items()}))


def load_vae(vae: VDVAE, path: str) -> None:
    """Read what :func:`save_vae` wrote."""
    vae.load_state_dict(load_file(path))


def find_vae(config: HardAugmentConfig) -> list[Problem]:
    """Return what is wrong with the file of a configuration, before anything is trained."""
    if config.vae_file is None:
        return []
    key, hint = "augment.hard.vae_file", "Runs write 'augmentations/vdvae.safetensors'; null trains one."
    try:
        load_vae(VDVAE(), config.vae_file)
    except OSError as error:
        return [Problem(key, f"'{config.vae_file}' cannot be read: {error.strerror or error}", hint)]
    except (SafetensorError, RuntimeError):
        return [Problem(key, f"'{config.vae_file}' does not hold an autoencoder of this form", hint)]
    return []
