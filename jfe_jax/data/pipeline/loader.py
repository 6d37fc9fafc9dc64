"""Prepared data → the batches of training, as one Grain chain.

    a unit's queries → shuffled by index → repeated                  for each unit
    → mixed by weight → positive drawn, pair encoded                 in threads, or in worker processes
    → packed → prefetched                                            in a thread

The batch of a step is a function of the configuration, the step and the number of processes, however many workers read;
the iterator's state is a handful of integers.
"""

import atexit
import dataclasses
import weakref
import zlib
from pathlib import Path

import grain
import numpy as np

from jfe_jax.config import Config
from jfe_jax.data.pipeline.batch_builder import BatchShape
from jfe_jax.data.pipeline.mixture import mix, shuffled, weights
from jfe_jax.data.pipeline.pair_batcher import PairBatches
from jfe_jax.data.pipeline.pair_dataset import Caches, EncodePair, TaskQueries
from jfe_jax.data.pipeline.pair_reader import PairReader
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.data.storage.prepared_dataset import PreparedDataset
from jfe_jax.errors import UserError

# Batches made ahead of the step.
_PREFETCH = 3
# P at most. Of a query with more positives, those beyond count as negatives if they happen to be in the batch.
MAX_POSITIVES = 64


def training_batches(
    cfg: Config, *, groups: int, split: str, process_index: int = 0, process_count: int = 1
) -> "_Prefetched":
    """Endless ContrastiveBatch of NumPy arrays, G = groups / process_count.

    `data.pairs`, `data.rows` and `data.image_slots` are of the global batch and split evenly among groups. A step takes
    `data.pairs` pairs; if some do not fit, they come first in the next step, and fillers stand in their places.

    Args:
      groups: of the global batch.
      split: which split of the prepared data.
      process_index, process_count: this process reads every process_count-th pair of the mixture.

    Returns:
      An iterator with `get_state` and `set_state` (small, JSON; "bad" counts unreadable pairs by unit), and the `shape`
      of its batches.

    Raises:
      UserError: the data are missing, a unit or split is unknown, the sizes do not divide or are too small, or the
        tokenizer does not match the model; while iterating, too many images cannot be read.
    """
    shape = batch_shape(cfg, groups, process_count)
    if not 0 <= cfg.data.image_shift < cfg.model.vision.image_size:
        raise UserError(f"data.image_shift: {cfg.data.image_shift} is not from 0 to less than the image's size")
    if cfg.data.homogeneous < 1:
        raise UserError(f"data.homogeneous: {cfg.data.homogeneous}; it has to be 1 (batches are mixed) or more")
    encoder = ItemEncoder(cfg.tokens, cfg.model.vision, cfg.model.image_token)
    if encoder.vocab_size > cfg.model.text.vocab_size:
        raise UserError(
            f"tokens.tokenizer: ids up to {encoder.vocab_size - 1}, but model.text.vocab_size is "
            f"{cfg.model.text.vocab_size}"
        )
    key, room = "row_tokens", shape.row_tokens
    if shape.bins:
        key, room = "bins", max(shape.bins)[0]
    if encoder.longest > room:
        raise UserError(
            f"data.{key}: {room} is less than the longest item, {encoder.longest} tokens; raise it or lower "
            "tokens.max_text_tokens"
        )
    prepared = PreparedDataset(Path(cfg.data.path) if cfg.data.path else "")
    sizes = {name: len(prepared.queries(name, split)) for name in prepared.units(split)}
    shares = weights(cfg.data, sizes, str(prepared.path))
    caches = Caches(cfg.data.image_cache_mib << 20)
    sources, most_positives = [], 1
    for name in shares:
        metadata = prepared.metadata(name)
        most_positives = max(most_positives, metadata["max_positives"][split])
        queries = TaskQueries(prepared.queries(name, split), metadata["instructions"], (name, *metadata["pools"]))
        if cfg.data.shuffle:
            # Of the seed and the unit alone: another unit in the mixture leaves this one's order as it is.
            seed = np.random.SeedSequence([cfg.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
            queries = shuffled(queries, int(seed))
        sources.append(queries.repeat())
    shape = dataclasses.replace(shape, positives=min(most_positives, MAX_POSITIVES))
    encode = EncodePair(
        prepared,
        encoder,
        caches,
        seed=cfg.seed,
        instruction_probability=cfg.data.instruction_probability,
        negatives=cfg.data.hard_negatives,
        wanted_modality=cfg.data.negative_modality == "positive",
        # Validation sees images as evaluation does.
        image_shift=cfg.data.image_shift if split == cfg.data.split else 0,
    )
    pairs = mix(sources, list(shares.values()), cfg.data.homogeneous).map_with_index(encode)
    batches = PairBatches(
        PairReader(pairs, cfg.data.workers), shape, process_index, process_count, cfg.data.max_bad_share
    )
    iterator = _Prefetched(batches, shape)
    # A reader that is still at work when the interpreter shuts down would abort the process.
    atexit.register(_close, weakref.ref(iterator))
    return iterator


class _Prefetched(grain.experimental.ThreadPrefetchDatasetIterator):
    """Makes batches ahead in a thread. Closed once: grain closes again when the interpreter has forgotten how to."""

    _is_closed = False

    def __init__(self, batches: PairBatches, shape: BatchShape):
        super().__init__(batches, _PREFETCH)
        self.shape = shape

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            super().close()


def _close(iterator: weakref.ref[grain.DatasetIterator]) -> None:
    alive = iterator()
    if alive is not None:
        alive.close()


def batch_shape(cfg: Config, groups: int, process_count: int) -> BatchShape:
    """Sizes of a process's batches, with room for one positive of a query.

    Raises:
      UserError: the global sizes in `cfg.data` do not divide among the groups.
    """
    data = cfg.data
    if groups % process_count:
        raise UserError(f"the batch's {groups} groups cannot be shared among {process_count} processes")
    for name in ("pairs", "rows", "image_slots"):
        if getattr(data, name) % groups:
            raise UserError(f"data.{name}: {getattr(data, name)} is not divisible by the batch's {groups} groups")
    pairs, rows = data.pairs // groups, data.rows // groups
    bins = _bins(cfg, groups)
    if data.layout == "padded" and rows < pairs * (2 + data.hard_negatives):
        raise UserError(
            f"data.rows: {data.rows} is too few for the padded layout, which needs a row for each of the "
            f"{data.pairs * (2 + data.hard_negatives)} items"
        )
    return BatchShape(
        groups=groups // process_count,
        pairs=pairs,
        negatives=data.hard_negatives,
        positives=1,
        rows=rows,
        row_tokens=data.row_tokens,
        image_slots=data.image_slots // groups,
        image_size=cfg.model.vision.image_size,
        layout=data.layout,
        bins=bins,
    )


def _bins(cfg: Config, groups: int) -> tuple[tuple[int, int], ...]:
    # Of each group.
    data = cfg.data
    if not data.bins:
        return ()
    if data.layout == "padded":
        raise UserError("data.bins: only for packed items, not with data.layout padded")
    for length, count in data.bins.items():
        if length < 1 or count < 1 or count % groups:
            raise UserError(f"data.bins: {count} bins of {length} tokens do not divide among {groups} groups")
    group = data.rows // groups * data.row_tokens
    if max(data.bins) > group:
        raise UserError(f"data.bins: {max(data.bins)} is more than the {group} tokens of a group's rows")
    room, tokens = sum(length * count for length, count in data.bins.items()), data.rows * data.row_tokens
    if room < tokens:
        raise UserError(f"data.bins: they have room for {room} tokens, fewer than data.rows · row_tokens, {tokens}")
    return tuple((length, count // groups) for length, count in sorted(data.bins.items()))
