"""Whether two candidates show and say the same: what a miner must not call wrong.

Images are compared by a hash that keeps colour: 16 x 16 averages of the picture. Two images are the same if these
differ by little on the mean, which survives another encoding, another size and other metadata. (Hashes of gradients
alone, as dHash, take a picture for the same when only its colours are others: a hard negative, and not a duplicate.)
"""

import collections
import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image

from jfe_jax.data.formats.mbeir import Candidate
from jfe_jax.data.image_transforms import decode
from jfe_jax.data.storage.image_store import DirectoryImages, ImageLookup, StoredImage

_SIDE = 16
# Of 768 bytes each.
_KEPT = 1 << 18


class Duplicates:
    """Compares candidates; image hashes are kept.

    Args:
      image_difference: mean difference of the averages, of 255, up to which two images are the same.
      images: where they are; files if not given.
    """

    def __init__(self, image_difference: float, images: ImageLookup | None = None):
        self._difference, self._images = image_difference, images or DirectoryImages()
        self._hashes: collections.OrderedDict[Path, np.ndarray] = collections.OrderedDict()

    def same(self, one: Candidate, other: Candidate) -> bool:
        """Both have the same parts, the texts are equal but for case and punctuation, and so are the images.

        Raises:
          UserError: an image cannot be read.
        """
        if one.modality != other.modality or _plain(one.text) != _plain(other.text):
            return False
        if one.image is None or one.image == other.image:
            return True
        difference = self._hash(one.image).astype(np.int16) - self._hash(other.image)
        return bool(np.abs(difference).mean() <= self._difference)

    def _hash(self, image: Path) -> np.ndarray:
        known = self._hashes.get(image)
        if known is None:
            known = self._hashes[image] = image_hash(self._images.get(image))
            if len(self._hashes) > _KEPT:
                self._hashes.popitem(last=False)
        else:
            self._hashes.move_to_end(image)
        return known


def image_hash(image: Path | StoredImage) -> np.ndarray:
    """uint8 [16, 16, 3]: averages of the picture's cells."""
    return np.asarray(decode(image).resize((_SIDE, _SIDE), Image.Resampling.BOX))


@functools.lru_cache(1 << 14)
def _plain(text: str | None) -> str:
    return " ".join(re.findall(r"\w+", (text or "").casefold()))
