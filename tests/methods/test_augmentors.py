from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from visionkd.config.schema import HardAugmentConfig
from visionkd.methods._augmentors import AffineAugmentor, Gaussians, MixAugmentor, build_augmentor, matrices, warp
from visionkd.methods._vdvae import (
    VDVAE,
    Pretraining,
    VDVAEAugmentor,
    find_vae,
    gaussian_kl,
    latent_noise,
    save_vae,
    scale_of,
)

NAMES = ("affine", "color", "mix", "vdvae")
every_augmentor = pytest.mark.parametrize("name", NAMES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int = 4, side: int = 32) -> torch.Tensor:
    small = torch.rand(size, 3, 6, 6, generator=generator(3))
    return torch.nn.functional.interpolate(small, size=side, mode="bicubic").clamp(0, 1)


def moved(augmentor, amount: float = 0.5):
    """An augmentor whose parameters have been moved at random."""
    with torch.no_grad():
        for parameter in augmentor.learned():
            parameter += amount * torch.randn(parameter.shape, generator=generator(9))
    augmentor.constrain()
    return augmentor


@every_augmentor
def test_begins_near_identity_and_repeats(name):
    augmentor, image = build_augmentor(HardAugmentConfig(augmentors=(name,), std=0.01), seed=0), images()
    found = augmentor(image, generator())
    assert (found - image).abs().mean() < 0.05
    assert torch.equal(found, augmentor(image, generator()))
    other = build_augmentor(HardAugmentConfig(augmentors=(name,), std=0.01), seed=0)
    assert torch.equal(found, other(image, generator()))


@every_augmentor
@pytest.mark.parametrize("side", [32, 48])
def test_answers_images_and_has_a_gradient_in_each_parameter(name, side):
    augmentor, image = moved(build_augmentor(HardAugmentConfig(augmentors=(name,)), seed=0)), images(side=side)
    found = augmentor(image, generator(1))
    assert found.shape == image.shape and found.min() >= 0.0 and found.max() <= 1.0
    assert not torch.allclose(found, image, atol=1e-2)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    gradients = torch.autograd.grad((found * weights).sum(), augmentor.learned())
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert augmentor.summary()


@every_augmentor
def test_draws_nothing_from_the_default_generator(name):
    augmentor, before = build_augmentor(HardAugmentConfig(augmentors=(name,)), seed=0), torch.get_rng_state()
    build_augmentor(HardAugmentConfig(augmentors=(name,)), seed=5)
    augmentor(images(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_chain_applies_its_parts_in_order():
    chain = moved(build_augmentor(HardAugmentConfig(augmentors=("affine", "color")), seed=0))
    noise, image = generator(2), images()
    by_hand = chain.parts["color"](chain.parts["affine"](image, noise), noise)
    assert torch.equal(chain(image, generator(2)), by_hand)
    assert len(chain.learned()) == 4


def test_gaussians_draw_what_they_say_and_stay_in_their_bounds():
    values = Gaussians((1.0, 0.5), std=0.1, max_std=0.3)
    with torch.no_grad():
        values.mean.copy_(torch.tensor([0.2, 0.0]))
    drawn = values(20_000, generator())
    assert drawn.mean(0).tolist() == pytest.approx([0.2, 0.0], abs=0.005)
    assert drawn.std(0).tolist() == pytest.approx([0.1, 0.1], abs=0.005)
    with torch.no_grad():
        values.mean.fill_(7.0)
        values.log_std.fill_(7.0)
    assert values(100, generator()).amax(0).tolist() == [1.0, 0.5]
    values.constrain()
    assert values.mean.tolist() == [1.0, 0.5] and values.log_std.exp().tolist() == pytest.approx([0.3, 0.3])


def test_gaussians_pass_gradient_to_mean_and_spread():
    values = Gaussians((10.0,), std=0.1, max_std=1.0)
    drawn = values(50, generator(4))
    noise = torch.randn(50, 1, generator=generator(4))
    drawn.square().sum().backward()
    assert values.mean.grad.item() == pytest.approx((2 * 0.1 * noise).sum().item(), rel=1e-4)
    assert values.log_std.grad.item() == pytest.approx((2 * (0.1 * noise) ** 2).sum().item(), rel=1e-4)


def test_matrices_move_pixels_as_they_say():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 2] = 1.0
    found = warp(image, matrices(torch.tensor([[-0.5, 0.25]])))  # 2 pixels to the right, 1 up
    assert found[0, 0, 2, 4].item() == pytest.approx(1.0, abs=1e-5) and found.sum().item() == pytest.approx(1.0)
    full = matrices(torch.tensor([[1.0, 0.0, -0.5, 0.0, 1.0, 0.25]]))
    assert torch.equal(full, matrices(torch.tensor([[-0.5, 0.25]])))
    turned = warp(image, matrices(torch.tensor([[0.0, 1.0, -1.0, 0.0]])))
    assert torch.allclose(turned, torch.rot90(image, -1, (2, 3)), atol=1e-5)  # clockwise


def test_summary_tells_pixels_and_degrees():
    augmentor = AffineAugmentor(HardAugmentConfig())
    with torch.no_grad():
        augmentor.values.mean.copy_(torch.tensor([0.1, 0.1, -0.2, -0.1, 0.0, 0.0]))
    found = augmentor.summary()
    assert found["shift across, % of width"]["mean"] == pytest.approx(10.0)
    assert found["stretch across, %"]["mean"] == pytest.approx(-10.0)
    assert found["turn, degrees"]["mean"] == pytest.approx(5.73, abs=0.01)
    narrow = AffineAugmentor(HardAugmentConfig(affine="linear")).summary()
    assert not any("shift" in name for name in narrow) and len(narrow) == 3


def test_color_is_what_its_numbers_say():
    augmentor = build_augmentor(HardAugmentConfig(augmentors=("color",)), seed=0).parts["color"]
    image = images()
    with torch.no_grad():
        augmentor.values.log_std.fill_(-30.0)
        augmentor.values.mean[0] = -0.5  # brightness
    assert torch.allclose(augmentor(image, generator()), 0.5 * image, atol=1e-5)
    with torch.no_grad():
        augmentor.values.mean.zero_()
        augmentor.values.mean[2] = -0.5  # saturation
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(augmentor(image, generator()), 0.5 * image + 0.5 * grey, atol=1e-5)
    with torch.no_grad():
        augmentor.values.mean.zero_()
        augmentor.values.mean[1] = -0.4  # contrast
    centre = grey.mean((2, 3), keepdim=True)
    assert torch.allclose(augmentor(image, generator()), 0.6 * (image - centre) + centre, atol=1e-5)


def test_a_mixture_learns_its_weights_only():
    augmentor, image = MixAugmentor(HardAugmentConfig()), images(20)
    with torch.no_grad():
        augmentor.logits.copy_(torch.tensor([-9.0, 9.0, -9.0, -9.0]))
        drawn = augmentor._drawn(image, generator())
    assert torch.allclose(augmentor(image, generator()), drawn[0], atol=1e-4)
    augmentor.constrain()
    assert augmentor.logits.abs().max() <= 6.0
    assert not any(part.requires_grad for part in drawn) and len({tuple(p.shape) for p in drawn}) == 1
    assert sum(values["mean"] for values in augmentor.summary().values()) == pytest.approx(100.0)


def test_vae_scales_and_divergence():
    raw = torch.linspace(-5, 5, 11)
    assert (scale_of(raw) > 0).all() and scale_of(torch.tensor(2.0)).item() == pytest.approx(3.0, abs=0.01)
    mean, raw, other_mean, other_raw = torch.randn(4, 50, generator=generator())
    expected = kl_divergence(Normal(mean, scale_of(raw)), Normal(other_mean, scale_of(other_raw)))
    assert torch.allclose(gaussian_kl(mean, raw, other_mean, other_raw), expected, rtol=1e-4, atol=1e-5)


def test_vae_learns_in_a_few_steps_and_is_fixed_then():
    augmentor = build_augmentor(HardAugmentConfig(augmentors=("vdvae",), vae_steps=15), seed=0)
    training = Pretraining(augmentor, HardAugmentConfig(augmentors=("vdvae",), vae_steps=15))
    noise, losses = generator(), []
    edit = [p.clone() for p in augmentor.learned()]
    while training.steps_left:
        losses.append(training.step(images(8), noise, lambda values: values).item())
    assert len(losses) == 15 and losses[-1] < losses[0] - 0.2
    assert not any(p.requires_grad for p in augmentor.parts["vdvae"].vae.parameters())
    assert all(torch.equal(a, b) for a, b in zip(edit, augmentor.learned(), strict=True))


def test_vae_blocks_beyond_the_end_take_their_prior():
    vae, image = VDVAE().eval(), images() * 2 - 1
    other = images().flip(0) * 2 - 1
    noise = latent_noise(4, generator(), torch.device("cpu"))
    with torch.no_grad():
        mean, _, kl = vae.decode(vae.encode(image), noise, edit=None, end=0)
        again, _, _ = vae.decode(vae.encode(other), noise, edit=None, end=0)
        seen, _, more = vae.decode(vae.encode(image), noise, edit=None, end=6)
    assert torch.equal(mean, again) and not kl.any()  # nothing of the image is in it
    assert not torch.equal(mean, seen) and (more > 0).all()


def test_vae_edits_only_its_blocks():
    augmentor = moved(VDVAEAugmentor(HardAugmentConfig(vae_blocks=(1, 3))))
    mean = raw = torch.zeros(1, 8, 4, 4)
    changed = [not torch.equal(augmentor.edit(number, mean, raw)[0], mean) for number in range(6)]
    assert changed == [False, True, True, False, False, False]


def test_vae_files(tmp_path):
    made = VDVAEAugmentor(HardAugmentConfig())
    path = tmp_path / "made.safetensors"
    save_vae(made.vae, path)
    config = HardAugmentConfig(augmentors=("vdvae",), vae_file=str(path))
    loaded = build_augmentor(config, seed=3)
    expected = made.vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.parts["vdvae"].vae.state_dict().items())
    assert Pretraining(loaded, config).steps_left == 0 and find_vae(config) == []
    for content, word in ((None, "cannot be read"), (b"nonsense", "does not hold")):
        bad = tmp_path / f"{word}.safetensors"
        if content is not None:
            bad.write_bytes(content)
        found = find_vae(HardAugmentConfig(vae_file=str(bad)))
        assert [problem.key for problem in found] == ["augment.hard.vae_file"] and word in found[0].message


@pytest.mark.parametrize(
    "wrong",
    [
        {"lower": 0.9, "upper": 0.9},
        {"warmup": 0.5, "cooldown": 0.5},
        {"std": 0.5},
        {"vae_blocks": (3, 3)},
        {"augmentors": ()},
        {"augmentors": ("affin",)},
        {"share": 0.0},
        {"shift": 0.1},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValidationError):
        HardAugmentConfig(**wrong)
