"""Types of a batch: packed items, the bins that attention runs on, and the contrastive batch of a step.

Axes: G groups, R rows, S tokens of a row, M image slots, B items, H W pixels, W bins of L tokens, N pairs of a group,
K hard negatives of a pair, P positives of a query.
"""

from typing import Literal, NamedTuple

import numpy as np

Layout = Literal["packed", "padded"]


class AttentionBins(NamedTuple):
    """Segments of the flattened R·S that attention runs on instead of rows. Each item fits entirely in one bin.

    Rows are then only storage for the tokens. Bins hold more tokens than the batch has, so that items fit without gaps
    between them; the surplus costs attention time only.

    Attributes:
      token_index: int32 [G, W, L] for each length L; index in the flattened R·S of the token in each bin position; R·S
        for an empty position.
      inverse_index: int32 [G, R, S]; each token's bin position, counted through all of `token_index`; the total number
        of bin positions for padding.
    """

    token_index: tuple[np.ndarray, ...]
    inverse_index: np.ndarray


class PackedBatch(NamedTuple):
    """Items packed next to each other in rows, as segments that do not attend to each other.

    A group is the part of the batch on one device of the batch axes; every index is local to its group. A padded layout
    uses the same type with one item per row. Arrays are NumPy on the host and jax arrays (or tracers) on the device.

    Attributes:
      tokens: int32 [G, R, S]; token ids, image placeholders included.
      segments: int32 [G, R, S]; 0 is padding, otherwise the item's number in its row (with bins, in its group), from 1.
      positions: int32 [G, R, S]; from 0 in each segment.
      pixels: uint8 [G, M, H, W, 3]; image slots, normalized on the device.
      image_start: int32 [G, M]; index of the slot's first patch in the group's flattened R·S; R·S for an empty slot.
      pool: int32 [G, B]; index of the item's last token (<eos>) in the flattened R·S; 0 for a padding item.
      pool_span: int32 [G, B, 2]; the item's first token and one past its last, in the flattened R·S; 0, 0 for a padding
        item.
      valid: bool [G, B]; True for a real item, False for a padding item.
      bins: bins that attention runs on; None if it runs on rows.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray
    image_start: np.ndarray
    pool: np.ndarray
    pool_span: np.ndarray
    valid: np.ndarray
    bins: AttentionBins | None = None


class ContrastiveBatch(NamedTuple):
    """Packed queries and candidates, with the labels that the loss needs.

    With N pairs in a group and K hard negatives per pair, the group's B = N·(2 + K) items are: N queries, then N
    positives, then N·K negatives (the K of pair 0, the K of pair 1, …). All items of a padding pair are invalid.

    Attributes:
      packed: PackedBatch with B = N·(2 + K).
      candidate_ids: int32 [G, N·(1 + K)]; id of each candidate, equal for equal candidates; -1 for padding.
      candidate_modality: int32 [G, N·(1 + K)]; index of each candidate's modality in MODALITIES; -1 for padding.
      positive_ids: int32 [G, N, P]; ids of all positives of the query, padded with -1.
    """

    packed: PackedBatch
    candidate_ids: np.ndarray
    candidate_modality: np.ndarray
    positive_ids: np.ndarray
