"""Many items of different lengths → one batch of fixed shape.

Axes: G groups, R rows, S tokens of a row, M image slots, B items, H W pixels.
"""

from typing import NamedTuple

import numpy as np


class PackedBatch(NamedTuple):
    """Items laid side by side in rows, as segments that do not see each other.

    A group is what one device of the batch axes holds; every index is local to its group. A padded layout is the same
    type with one item per row. NumPy arrays on the host, jax arrays (or tracers) on the device.

    Attributes:
      tokens: int32 [G, R, S]; ids, image placeholders included.
      segments: int32 [G, R, S]; 0 is padding, else the item's number in its row, from 1.
      positions: int32 [G, R, S]; from 0 in each segment.
      pixels: uint8 [G, M, H, W, 3]; image slots, normalised on the device.
      image_start: int32 [G, M]; where the slot's first patch goes in the group's flattened R·S; R·S for an empty slot.
      pool: int32 [G, B]; where the item's last token (<eos>) is in the flattened R·S; 0 for a filler.
      pool_span: int32 [G, B, 2]; the item's first token and one past its last, in the flattened R·S; 0, 0 for a filler.
      valid: bool [G, B]; a real item, or a filler.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray
    image_start: np.ndarray
    pool: np.ndarray
    pool_span: np.ndarray
    valid: np.ndarray


class ContrastiveBatch(NamedTuple):
    """Queries with their candidates, packed, and what the loss must know of them.

    With N pairs in a group and K hard negatives per pair, the group's B = N·(2 + K) items are: N queries, then N
    positives, then N·K negatives (the K of pair 0, the K of pair 1, …). A filler pair has all its items invalid.

    Attributes:
      packed: PackedBatch with B = N·(2 + K).
      candidate_ids: int32 [G, N·(1 + K)]; number of each candidate, equal for equal candidates; -1 for a filler.
      positive_ids: int32 [G, N, P]; all candidates that are right for the query, padded with -1.
    """

    packed: PackedBatch
    candidate_ids: np.ndarray
    positive_ids: np.ndarray
