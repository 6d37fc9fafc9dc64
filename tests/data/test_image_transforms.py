import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from jfe_jax.data import image_transforms
from jfe_jax.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("shape", [(50, 40), (16, 16), (20, 90)])
def test_pixels_are_those_of_siglips_processor(shape):
    from transformers.models.siglip import SiglipImageProcessorPil

    picture = noise(*shape)
    theirs = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    wanted = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = image_transforms.to_pixels(encoded(picture), 32)
    assert got.dtype == np.uint8 and got.shape == (32, 32, 3)
    # Both in 0..1: at most one of 255 steps apart.
    assert np.abs(got / 255 - (wanted + 1) / 2).max() <= 1 / 255


@pytest.mark.parametrize(
    "shape", [(50, 40), (40, 50), (32, 32), (16, 16), (20, 90), (33, 32), (32, 70), (1, 5), (300, 200), (700, 1000)]
)
def test_pixels_are_those_of_torchvisions_resizing(shape):
    """To the bit; its kernel for 8 bits is torch's own, which is called here as torchvision calls it."""
    import torch

    picture = noise(*shape)
    channels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(channels, size=[32, 32], mode="bicubic", antialias=True)
    got = image_transforms.to_pixels(encoded(picture), 32, resampler="torchvision")
    np.testing.assert_array_equal(got, wanted[0].permute(1, 2, 0).numpy())
    assert got.dtype == np.uint8 and not got.flags.writeable
    if shape[0] <= shape[1]:
        # Pillow then goes the same way, with finer weights.
        assert np.abs(got.astype(int) - image_transforms.to_pixels(encoded(picture), 32)).max() <= 2


def test_a_resampler_that_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"goes with .* stretch only"):
        image_transforms.check_resampler("torchvision", "crop")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    image_transforms.check_resampler("pillow", "stretch")
    with pytest.raises(UserError, match="needs cykooz-resizer"):
        image_transforms.check_resampler("torchvision", "stretch")


def test_file_bytes_and_pixels_are_the_same_image(tmp_path):
    picture = noise(12, 12)
    file = tmp_path / "one.png"
    picture.save(file)
    wanted = np.asarray(picture)
    for source in (file, file.read_bytes(), wanted):
        np.testing.assert_array_equal(image_transforms.to_pixels(source, 12), wanted)


def test_exif_orientation_is_applied():
    picture = noise(10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image_transforms.decode(encoded(picture, exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    wanted = [[[255, 255, 255], [255, 0, 0]]]
    np.testing.assert_array_equal(np.asarray(image_transforms.decode(encoded(clear))), wanted)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(np.asarray(image_transforms.decode(encoded(palette, transparency=0))), wanted)
    grey = Image.new("LA", (1, 1), (0, 0))
    np.testing.assert_array_equal(np.asarray(image_transforms.decode(encoded(grey))), [[[255] * 3]])


@pytest.mark.parametrize(
    ("image", "kind", "wanted"),
    [
        (Image.new("P", (1, 1), 5), "PNG", None),
        (Image.fromarray(np.array([[0x8040]], np.uint16)), "PNG", 0x80),
        (Image.fromarray(np.array([[0xFFFF]], np.uint16)), "TIFF", 0xFF),
        (Image.new("L", (1, 1), 77), "PNG", 77),
        (Image.new("1", (1, 1), 1), "PNG", 255),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 128)), "JPEG", 127),
    ],
)
def test_every_mode_becomes_rgb(image, kind, wanted):
    got = image_transforms.decode(encoded(image, kind))
    assert got.mode == "RGB"
    if wanted is not None:
        np.testing.assert_allclose(np.asarray(got)[0, 0], wanted, atol=2)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (33, 17), (80, 121)])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 95}, {"restart_marker_rows": 1}])
def test_a_plain_jpeg_has_pillows_pixels(monkeypatch, shape, sampling, options):
    """To the bit, though Pillow does not decode it."""
    content = encoded(noise(*shape), "JPEG", subsampling=sampling, **options)
    with Image.open(io.BytesIO(content)) as opened:
        wanted = np.asarray(opened)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(np.asarray(image_transforms.decode(content)), wanted)
    for resampler in ("pillow", "torchvision"):
        got = image_transforms.to_pixels(content, 16, resampler=resampler)
        np.testing.assert_array_equal(got, image_transforms.to_pixels(wanted, 16, resampler=resampler))


@pytest.mark.parametrize(
    ("mode", "options"), [("L", {}), ("CMYK", {}), ("RGB", {"keep_rgb": True}), ("RGB", {"exif": Image.Exif()})]
)
def test_any_other_jpeg_is_pillows(mode, options):
    if "exif" in options:
        options["exif"][0x0112] = 8
    content = encoded(noise(24, 33).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(content)) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    np.testing.assert_array_equal(image_transforms.to_pixels(content, 24), image_transforms.to_pixels(wanted, 24))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_cut_short_is_named(tmp_path, kind):
    content = encoded(noise(40, 40), kind)
    file = tmp_path / "broken"
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"broken: cannot be read as an image"):
        image_transforms.decode(file)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png: cannot be read as an image \(unknown format\)"):
        image_transforms.decode(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"image of query 0:1: cannot be read as an image \(unknown format\)"):
        image_transforms.decode(b"", "image of query 0:1")
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        image_transforms.decode(tmp_path / "gone.png")
    with pytest.raises(UserError, match="uint8"):
        image_transforms.decode(np.zeros((2, 2), np.float32))


def test_an_image_that_is_no_file_says_itself_what_is_wrong():
    class Gone:
        def read_bytes(self):
            raise UserError("a.tar: damaged")

    with pytest.raises(UserError, match=r"^a\.tar: damaged$"):
        image_transforms.decode(Gone())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("factor", [1.2, 4])
def test_a_decompression_bomb_is_refused(monkeypatch, factor, kind):
    content = encoded(noise(20, 20), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(400 / factor))
    with warnings.catch_warnings():
        # As at run time, where the test suite's own filters are not there.
        warnings.resetwarnings()
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        with pytest.raises(UserError, match="400 pixels"):
            image_transforms.decode(content)
