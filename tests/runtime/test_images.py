from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionkd.errors import RequestError, UnreadableImageError
from visionkd.runtime.images import TruncatedImageError, decode_rgb, find_images, is_image_name, walk


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_rgb_png_is_unchanged(tmp_path):
    image = noise()
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        decoded = decode_rgb(source)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(np.asarray(decode_rgb(file)), np.asarray(image))


def test_wrong_suffix_is_decoded_by_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(), "PNG"))
    assert decode_rgb(tmp_path / "a.jpg").size == (32, 24)


def test_alpha_shows_white():
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    first, second = np.asarray(decode_rgb(encoded(image, "PNG")))[0]
    assert first.tolist() == [255, 255, 255]
    np.testing.assert_allclose(second, [227, 127, 127], atol=1)


def test_grey_with_alpha_shows_white():
    image = Image.new("LA", (2, 1), (10, 0))
    image.putpixel((1, 0), (10, 255))
    assert np.asarray(decode_rgb(encoded(image, "PNG"))).tolist() == [[[255] * 3, [10] * 3]]


def test_palette_with_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode_rgb(encoded(image, "PNG"))).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    transparent = decode_rgb(encoded(image, "PNG", transparency=0))
    assert np.asarray(transparent).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(file_format):
    values = np.array([[0, 257 * 100, 65535, 128]], dtype=np.uint16)
    decoded = np.asarray(decode_rgb(encoded(Image.fromarray(values), file_format)))
    assert decoded[0, :, 0].tolist() == [0, 100, 255, 0]
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_floating_point_grey():
    shares = decode_rgb(encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)), "TIFF"))
    assert np.asarray(shares)[0, :, 0].tolist() == [0, 128, 255, 0]
    values = decode_rgb(encoded(Image.fromarray(np.array([[0.0, 100.0, 300.0]], dtype=np.float32)), "TIFF"))
    assert np.asarray(values)[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(decode_rgb(encoded(image, "JPEG", quality=95)))[8, 8]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_rgb(mode):
    decoded = decode_rgb(encoded(noise().convert(mode), "PNG"))
    assert decoded.mode == "RGB"
    assert (np.asarray(decoded)[..., 0] == np.asarray(decoded)[..., 1]).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(file_format):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    decoded = decode_rgb(encoded(image, file_format, exif=exif))
    assert decoded.size == (20, 40)
    pixels = np.asarray(decoded)[..., 0]
    assert pixels[:18].min() > 200 and pixels[22:].max() < 50


def test_broken_exif_is_ignored():
    decoded = decode_rgb(encoded(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"))
    assert decoded.size == (32, 24)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file(file_format, share):
    content = encoded(noise(64, 64), file_format)
    with pytest.raises(TruncatedImageError, match="'x.jpg': the file is truncated"):
        decode_rgb(content[: int(len(content) * share)], name="x.jpg")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0garbage", b"\x89PNG\r\n\x1a\n", b"\0" * 99]
)
def test_not_an_image(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="a.jpg"):
        decode_rgb(tmp_path / "a.jpg")


def test_corrupted_inside():
    content = bytearray(encoded(noise(64, 64), "PNG"))
    content[200:260] = bytes(60)
    with pytest.raises(UnreadableImageError):
        decode_rgb(bytes(content))


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        decode_rgb(encoded(noise(), "PNG"))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        decode_rgb(tmp_path / "none.jpg")
    with pytest.raises(UnreadableImageError, match="directory"):
        decode_rgb(tmp_path)


def test_no_permission():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "a.png")
        noise().save(file)
        file.chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read everything: become nobody for a moment
            os.seteuid(65534)
        try:
            with pytest.raises(UnreadableImageError, match="permission denied"):
                decode_rgb(file)
        finally:
            os.seteuid(user)


def test_names_of_images():
    assert is_image_name("a.JPG") and is_image_name("b.jpeg") and is_image_name("c.d.png")
    assert not any(map(is_image_name, (".DS_Store", "._a.jpg", "notes.txt", "jpg", "Thumbs.db")))


def test_find_images(tmp_path):
    for name in (
        "b/2.png",
        "b/1.png",
        "b/deep/3.jpg",
        "c/.hidden.png",
        "c/._4.png",
        "c/x.txt",
        "__MACOSX/5.png",
        "odd.dat",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "odd.dat", str(tmp_path / "b" / "2.png"), tmp_path, str(tmp_path / "b" / "*.png")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "odd.dat",
        "b/2.png",
        "b/1.png",
        "b/deep/3.jpg",
    ]
    assert len(find_images([str(tmp_path / "b" / "**" / "*.jpg")])) == 1


def test_find_images_lists_every_problem(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError) as caught:
        find_images([tmp_path / "none.jpg", tmp_path / "empty", str(tmp_path / "*.gif")])
    assert len(caught.value.problems) == 3
    assert "does not exist" in str(caught.value) and "no images in" in str(caught.value)
    assert "nothing matches" in str(caught.value)


def test_walk_survives_link_loops(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "round").symlink_to("round")
    (tmp_path / "a" / "nowhere.png").symlink_to("missing.png")
    assert [name for name, is_dir, _ in walk(tmp_path) if not is_dir] == ["a/b/1.png"]


def test_walk_follows_links(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "1.png").write_bytes(b"123")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "pool")
    assert list(walk(tmp_path / "data")) == [
        ("cat", True, 0), ("cat/1.png", False, 3), ("dog", True, 0), ("dog/1.png", False, 3),
    ]  # fmt: skip


def test_walk_ends_in_a_thicket_of_links(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / name / other).symlink_to(tmp_path / other)
    assert sum(1 for _ in walk(tmp_path)) < 5000
