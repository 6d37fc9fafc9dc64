"""Suggests bins for a run: `data.bins` from the lengths of its items."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jfe_jax.config import Config
from jfe_jax.data.processor import ItemEncoder

# Bin lengths are these quantiles of the item lengths, weighted by tokens; the last is the longest item.
_TOKEN_QUANTILES = (0.75, 0.95, 1.0)
# Bin lengths are rounded up to a multiple of this many tokens, the tile size of each attention implementation.
_LENGTH_MULTIPLE = {"xla": 32, "cudnn": 64, "splash": 128}
# Number of batches drawn; share of them that need no more bins of a length than are suggested.
_DRAWS, _COUNT_QUANTILE = 64, 0.75


class Suggestion(NamedTuple):
    """For `data.bins`, and what it is worth.

    Attributes:
      bins: of the global batch.
      full: share of the rows' tokens that are real without bins.
      attention: what attention multiplies over bins, as a share of what it does over rows.
    """

    bins: dict[int, int]
    full: float
    attention: float


def suggest_for_run(cfg: Config, groups: int, steps: int) -> Suggestion:
    """Suggests bins from the items of a run's first steps.

    Args:
      groups: of the batch, one for each device of the mesh's batch axes.

    Raises:
      UserError: as `loader.training_batches`.
    """
    # Reading a run needs what counting lengths does not: grain, TFDS.
    from jfe_jax.data.pipeline.loader import training_batches

    data = cfg.data
    batches = training_batches(replace(cfg, data=replace(data, bins={})), groups=groups, split=data.split)
    lengths, real = [], []
    try:
        for _ in range(steps):
            packed = next(batches).packed
            lengths += np.diff(packed.pool_span[packed.valid]).ravel().tolist()
            real.append(float((packed.segments > 0).mean()))
    finally:
        batches.close()
    tokens = data.rows // groups * data.row_tokens
    longest = ItemEncoder(cfg.tokens, cfg.model.vision, cfg.model.image_token).longest
    bins = {size: groups * count for size, count in suggest(lengths, tokens, cfg.model.attention, longest).items()}
    attention = sum(count * size**2 for size, count in bins.items()) / (data.rows * data.row_tokens**2)
    return Suggestion(bins, float(np.mean(real)), attention)


def suggest(lengths: Sequence[int], tokens: int, attention: str, longest: int = 0) -> dict[int, int]:
    """Lengths and numbers of bins for batches of `tokens` tokens, of items as long as `lengths`.

    Some batches of such items are packed, the longest first, into bins that are opened as they are needed.

    Args:
      attention: of `ModelConfig`; splash for instance takes multiples of 128.
      longest: what an item may have, if that is more than the longest of `lengths`.

    Raises:
      ValueError: no lengths, or one that is longer than `tokens`.
    """
    if not lengths or max(lengths) > tokens:
        raise ValueError(f"{len(lengths)} items, the longest of {max(lengths, default=0)} tokens; batches of {tokens}")
    ordered = np.sort(np.asarray(lengths))
    share = np.cumsum(ordered) / ordered.sum()
    of_share = (ordered[min(np.searchsorted(share, one), len(ordered) - 1)] for one in _TOKEN_QUANTILES)
    step = _LENGTH_MULTIPLE[attention]
    sizes = sorted({min(tokens, -(-int(length) // step) * step) for length in (*of_share, longest) if length})
    random = np.random.default_rng(0)
    counts = []
    for _ in range(_DRAWS):
        drawn = random.choice(ordered, 1 + int(2 * tokens / ordered.mean()))
        counts.append(_count_bins(drawn[np.cumsum(drawn) <= tokens].tolist(), sizes))
    found = np.ceil(np.quantile(counts, _COUNT_QUANTILE, axis=0)).astype(int)
    # The longest item needs a bin, though few batches contain it.
    found[-1] = max(found[-1], 1)
    # The bins must hold at least a full batch.
    missing = tokens - int(found @ sizes)
    found[0] += max(0, -(-missing // sizes[0]))
    return {size: int(count) for size, count in zip(sizes, found, strict=True) if count}


def _count_bins(lengths: list[int], sizes: list[int]) -> list[int]:
    # Counts the bins of each size that these items open. An item goes into the fullest open bin with room (best fit);
    # otherwise it opens the smallest bin that holds it.
    left: list[int] = []
    counts = dict.fromkeys(sizes, 0)
    for length in sorted(lengths, reverse=True):
        at = bisect_left(left, length)
        if at < len(left):
            room = left.pop(at)
        else:
            room = sizes[bisect_left(sizes, length)]
            counts[room] += 1
        insort(left, room - length)
    return [counts[size] for size in sizes]
