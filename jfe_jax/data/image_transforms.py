"""Decodes and resizes images to pixels as SiglipImageProcessor and CLIPImageProcessor do with Pillow.

Axes: H W pixels.
"""

import importlib.util
import io
import threading
import warnings
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jfe_jax.errors import UserError

# Pillow only warns of an image between one and two times its limit; here such an image is an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
# First bytes of a JPEG, and its marker APP1, which never occurs in compressed pixel data.
_JPEG, _EXIF = b"\xff\xd8\xff", b"\xff\xe1"
_LARGEST_RESIZED = 1 << 25
# One resizer per thread, because a resizer has a lock.
_RESIZER = threading.local()


class ReadableImage(Protocol):
    """An image that is not a separate file, such as one in an archive; `str` gives its location."""

    def read_bytes(self) -> bytes: ...


def decode(image: "bytes | Path | ReadableImage | np.ndarray", name: str = "image") -> Image.Image:
    """Opens an image as RGB.

    EXIF orientation is applied, palettes are resolved, 16-bit gray is scaled to 8 bits, and transparency is composited
    on white.

    Args:
      image: encoded bytes, a file, one stored elsewhere, or uint8 [height, width, 3].
      name: name in errors of an image that has no file name.

    Raises:
      UserError: the file is missing, not an image, cut short, or has more pixels than Pillow's limit (89 million).
    """
    decoded = _decode(image, name)
    return Image.fromarray(decoded) if isinstance(decoded, np.ndarray) else decoded


def _decode(image: "bytes | Path | ReadableImage | np.ndarray", name: str) -> Image.Image | np.ndarray:
    """Decodes as `decode` does, but returns some images as uint8 [height, width, 3]."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{name}: pixels must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
        return image
    if not isinstance(image, bytes):
        name = str(image)
    # Images that are not files raise their own errors.
    content = image.read_bytes() if not isinstance(image, bytes | Path) else image
    try:
        content = content if isinstance(content, bytes) else content.read_bytes()
        pixels = _decode_jpeg(content)
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened) if _may_be_rotated(opened) else opened)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such image file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: cannot be read as an image (unknown format)") from error
    except Exception as error:  # Pillow's readers raise whatever the broken file makes them stumble over.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be read as an image ({reason})") from error


def to_pixels(
    image: "bytes | Path | ReadableImage | np.ndarray",
    size: int,
    name: str = "image",
    resize: Literal["stretch", "crop"] = "stretch",
    resampler: Literal["pillow", "torchvision"] = "pillow",
) -> np.ndarray:
    """Decodes and resizes (bicubic) → uint8 [size, size, 3], read-only.

    Args:
      image, name: as for `decode`.
      resize: "stretch" does not keep the aspect ratio, as SigLIP and PaliGemma; "crop" makes the shorter side `size`
        and takes the center, as CLIP.
      resampler: whose resizing, see `config.VisionConfig`; "torchvision" stretches only.

    Raises:
      UserError: as `decode`.
    """
    rgb = _decode(image, name)
    width, height = rgb.shape[1::-1] if isinstance(rgb, np.ndarray) else rgb.size
    if resampler == "torchvision" and (width, height) != (size, size):
        return _as_torchvision(rgb.tobytes(), width, height, size)
    if (width, height) != (size, size):
        rgb = Image.fromarray(rgb) if isinstance(rgb, np.ndarray) else rgb
        rgb = _center_crop(rgb, size) if resize == "crop" else rgb.resize((size, size), Image.Resampling.BICUBIC)
    # A view: what the caller gave stays as it is.
    pixels = np.asarray(rgb).view()
    # Caches hand out the same array many times.
    pixels.flags.writeable = False
    return pixels


def shift(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Shifts uint8 [H, W, 3] by a number of pixels (negative: up, left); the border repeats the outermost pixels."""
    rows, columns = (np.arange(size) for size in pixels.shape[:2])
    return pixels[(rows - down).clip(0, len(rows) - 1)][:, (columns - right).clip(0, len(columns) - 1)]


def check_resampler(resampler: str, resize: str) -> None:
    """Raises UserError if images cannot be resized so."""
    if resampler != "torchvision":
        return
    if resize != "stretch":
        raise UserError("model.vision.resampler: torchvision goes with model.vision.resize: stretch only; take pillow")
    if importlib.util.find_spec("cykooz_resizer") is None:
        raise UserError("model.vision.resampler: torchvision needs cykooz-resizer; pip install it, or take pillow")


def _as_torchvision(rgb: bytes, width: int, height: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3], read-only: rows first, then columns, with weights of 16 bits and 8 bits in between.

    (Pillow has weights of 22 bits and begins with the columns where the image is higher than wide.)
    """
    from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

    if not hasattr(_RESIZER, "resizer"):
        _RESIZER.resizer = Resizer()
        _RESIZER.options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom))
    pixels = ImageData(width, height, PixelType.U8x3, rgb)
    for shape in ((size, height), (size, size)):
        if shape != (pixels.width, pixels.height):
            resized = ImageData(*shape, PixelType.U8x3)
            _RESIZER.resizer.resize(pixels, resized, _RESIZER.options)
            pixels = resized
    return np.frombuffer(pixels.get_buffer(), np.uint8).reshape(size, size, 3)


def _decode_jpeg(content: bytes) -> np.ndarray | None:
    """Decodes a JPEG to the same uint8 [height, width, 3] as Pillow, in two thirds of its time.

    Returns None for any other file, and for a JPEG that is broken, gray or CMYK, above Pillow's limit, or that may have
    to be rotated because it has an EXIF or XMP marker. Pillow decodes or rejects those.
    """
    if not content.startswith(_JPEG) or _EXIF in content:
        return None
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        limit = Image.MAX_IMAGE_PIXELS
        if colours != "YCbCr" or (limit is not None and height * width > limit):
            return None
        return simplejpeg.decode_jpeg(content)
    except ValueError:
        return None


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` and takes the center, rounding where CLIPImageProcessor rounds."""
    full = [size * side // min(image.size) for side in image.size]
    first = [(side - size) // 2 for side in full]
    if full[0] * full[1] <= _LARGEST_RESIZED:
        left, top = first
        return image.resize(full, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    # A very long image, most of which would be resized in vain. (Not done always: Pillow may then round differently.)
    scale = [side / resized for side, resized in zip(image.size, full, strict=True)]
    left, top = (start * by for start, by in zip(first, scale, strict=True))
    right, bottom = ((start + size) * by for start, by in zip(first, scale, strict=True))
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, right, bottom))


def _may_be_rotated(image: Image.Image) -> bool:
    # Looking for EXIF in a JPEG without any takes a tenth of its decoding time.
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return False
    return _ORIENTATION in image.getexif()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16 bits at 255.
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
