"""Items: queries and candidates of every modality share one type.

Axes: S tokens, H W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed; at least one of `text` and `image` is given.

    Attributes:
      text: text of the query or of the candidate; None or "" if there is none.
      image: encoded image bytes, a path to an image file, or pixels as uint8 [height, width, 3]; None if there is none.
      instruction: describes the kind of candidate that is sought; only queries have one. It is prepended to the text.
    """

    text: str | None = None
    image: bytes | Path | np.ndarray | None = None
    instruction: str | None = None

    @property
    def modality(self) -> str:
        """Returns M-BEIR's name of the item's modality: "text", "image" or "image,text"."""
        names = [name for name, there in (("image", self.image is not None), ("text", bool(self.text))) if there]
        return ",".join(names)


class EncodedItem(NamedTuple):
    """An item in the form that the model takes as input.

    Attributes:
      tokens: int32 [S]; an item with an image begins with that image's placeholders.
      pixels: uint8 [H, W, 3], or None if the item has no image.
    """

    tokens: np.ndarray
    pixels: np.ndarray | None
