"""Integer ids of candidates and images.

A candidate's id is dataset·10⁷ + index, as M-BEIR hashes its ids: int32 in the loss, one integer on disk. An image's id
is a 64-bit hash of its path.
"""

import hashlib
import os
from pathlib import Path

IDS_PER_DATASET = 10_000_000
# 214·10⁷ is beyond int32.
MAX_DATASET_ID = 213


def image_name(image: Path, root: Path) -> str:
    """Returns an image's path as its row spells it: relative to the directory."""
    # Called millions of times: slicing is ten times as fast as relpath.
    return os.fspath(image)[len(os.fspath(root)) + 1 :]


def name_id(name: str) -> int:
    """Hashes an image's name to an int64. Never 0, which means no image."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def image_id(image: Path | None, root: Path) -> int:
    """Returns `name_id` of an image's name; 0 without an image."""
    return 0 if image is None else name_id(image_name(image, root))
