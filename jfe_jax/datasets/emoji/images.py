"""Reads the vendors' pictures and writes them as RGB PNG files, each distinct picture once.

Axes: H W pixels.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jfe_jax.datasets.emoji.labels import Emoji, normalize_code
from jfe_jax.errors import UserError

DIRECTORY = "mbeir_images/emoji_images"


@dataclass(frozen=True)
class Picture:
    """One vendor's drawing of one emoji.

    Attributes:
      emoji: the emoji it shows.
      style: the vendor, "google" (Noto) or "twitter" (Twemoji).
      image: index of its pixels in `Gallery.pixels`; equal for pictures with identical pixels.
    """

    emoji: Emoji
    style: str
    image: int


@dataclass(frozen=True)
class Gallery:
    """All pictures of all vendors.

    Attributes:
      pictures: by vendor, then in the labels' order.
      pixels: uint8 [H, W, 3] of each distinct image, on white.
      paths: path of the image, relative to the data set's root.
    """

    pictures: list[Picture]
    pixels: list[np.ndarray]
    paths: list[str]


def find_images(directory: Path) -> dict[str, Path]:
    """Returns the image file of each code (see `normalize_code`)."""
    return {normalize_code(path.stem): path for path in sorted(directory.glob("*.png"))}


def read_gallery(emoji: list[Emoji], files: dict[str, dict[str, Path]]) -> Gallery:
    """Decodes the images of `files` (style → code → file) of all `emoji`.

    Raises:
      UserError: an image cannot be read.
    """
    pictures, pixels, paths = [], [], []
    known: dict[bytes, int] = {}
    for style, of_style in files.items():
        for one in emoji:
            if one.code not in of_style:
                continue
            content = _flatten_on_white(of_style[one.code])
            image = known.setdefault(content.tobytes(), len(pixels))
            if image == len(pixels):
                pixels.append(content)
                paths.append(f"{DIRECTORY}/{style}/{one.code.lower()}.png")
            pictures.append(Picture(one, style, image))
    return Gallery(pictures, pixels, paths)


def write_emoji_images(gallery: Gallery, root: Path, size: int) -> None:
    """Writes every distinct image as a PNG of `size` by `size` under `root`."""
    for style in {picture.style for picture in gallery.pictures}:
        (root / DIRECTORY / style).mkdir(parents=True, exist_ok=True)
    for content, path in zip(gallery.pixels, gallery.paths, strict=True):
        image = Image.fromarray(content)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        image.save(root / path, compress_level=6)


def pictures_by_image(gallery: Gallery) -> dict[int, list[Picture]]:
    """Groups the pictures by image."""
    found = defaultdict(list)
    for picture in gallery.pictures:
        found[picture.image].append(picture)
    return dict(found)


def _flatten_on_white(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            drawn = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"{file}: not an image ({error}); delete its directory to fetch it again") from error
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(drawn)
    return np.asarray(paper.convert("RGB"))
