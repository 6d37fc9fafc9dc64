"""Prepared data → the batches of training, as one Grain chain.

    a unit's queries → shuffled by index → repeated                  for each unit
    → mixed by weight → positive drawn, pair encoded → packed → prefetched

The batch of a step is a function of the configuration and the step; the iterator's state is a handful of integers.
"""

import atexit
import dataclasses
import difflib
import weakref
import zlib
from pathlib import Path

import grain
import numpy as np
from absl import flags

from jfe_jax.config import Config
from jfe_jax.data.contrastive import BatchShape, PackPairs
from jfe_jax.data.packing import ContrastiveBatch, PackedBatch
from jfe_jax.data.pairs import Caches, EncodePair, UnitQueries
from jfe_jax.data.prepared import Prepared
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError

# Batches made ahead of the step.
_PREFETCH = 3
# P at most. Of a query with more positives, those beyond count as negatives if they happen to be in the batch.
MAX_POSITIVES = 64


def training_batches(
    cfg: Config, *, groups: int, split: str, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless ContrastiveBatch of NumPy arrays, G = groups / process_count.

    `data.pairs`, `data.rows` and `data.image_slots` are of the global batch and split evenly among groups. A step takes
    `data.pairs` pairs; if some do not fit, they come first in the next step, and fillers stand in their places.

    Args:
      groups: of the global batch.
      split: which split of the prepared data.
      process_index, process_count: this process reads every process_count-th pair of the mixture.

    Returns:
      An iterator with `get_state` and `set_state` (small, JSON).

    Raises:
      UserError: the data are missing, a unit or split is unknown, the sizes do not divide or are too small, or the
        tokenizer does not match the model; while iterating, an image cannot be read.
    """
    shape = _shape(cfg, groups, process_count)
    if not 0 <= cfg.data.image_shift < cfg.model.vision.image_size:
        raise UserError(f"data.image_shift: {cfg.data.image_shift} is not from 0 to less than the image's size")
    encoder = ItemEncoder(cfg.tokens, cfg.model.vision, cfg.model.image_token)
    if encoder.vocab_size > cfg.model.text.vocab_size:
        raise UserError(
            f"tokens.tokenizer: ids up to {encoder.vocab_size - 1}, but model.text.vocab_size is "
            f"{cfg.model.text.vocab_size}"
        )
    if encoder.longest > shape.row_tokens:
        raise UserError(
            f"data.row_tokens: {shape.row_tokens} is less than the longest item, {encoder.longest} tokens; raise it or "
            "lower tokens.max_text_tokens"
        )
    prepared = Prepared(Path(cfg.data.path) if cfg.data.path else "")
    weights = _weights(prepared, cfg, split)
    caches = Caches(cfg.data.image_cache_mib << 20)
    sources, most_positives = [], 1
    for name in weights:
        metadata = prepared.metadata(name)
        most_positives = max(most_positives, metadata["max_positives"][split])
        queries = UnitQueries(prepared.queries(name, split), metadata["instructions"], (name, *metadata["pools"]))
        if cfg.data.shuffle:
            # Of the seed and the unit alone: another unit in the mixture leaves this one's order as it is.
            seed = np.random.SeedSequence([cfg.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
            queries = queries.shuffle(seed=int(seed))
        sources.append(queries.repeat())
    shape = dataclasses.replace(shape, positives=min(most_positives, MAX_POSITIVES))
    encode = EncodePair(
        prepared,
        encoder,
        caches,
        seed=cfg.seed,
        instruction_probability=cfg.data.instruction_probability,
        negatives=cfg.data.hard_negatives,
        # Validation sees images as evaluation does.
        image_shift=cfg.data.image_shift if split == cfg.data.split else 0,
    )
    pairs = grain.MapDataset.mix(sources, weights=list(weights.values())).map_with_index(encode)
    batches: grain.IterDataset = PackPairs(pairs, shape, start=process_index, stride=process_count)
    if cfg.data.workers:
        # Grain asks for its flags' values, which absl refuses until somebody has parsed a command line.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(cfg.data.workers, per_worker_buffer_size=_PREFETCH)
        batches = batches.mp_prefetch(options).map(_copy)
        return iter(batches)
    iterator = _Prefetched(iter(batches), _PREFETCH)
    # A reader that is still at work when the interpreter shuts down would abort the process.
    atexit.register(_close, weakref.ref(iterator))
    return iterator


class _Prefetched(grain.experimental.ThreadPrefetchDatasetIterator):
    """Makes batches ahead in a thread. Closed once: grain closes again when the interpreter has forgotten how to."""

    _is_closed = False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            super().close()


def _copy(batch: ContrastiveBatch) -> ContrastiveBatch:
    # Workers hand over shared memory, which must not outlive the iterator.
    packed, *ids = batch
    return ContrastiveBatch(PackedBatch(*map(np.array, packed)), *map(np.array, ids))


def _close(iterator: weakref.ref[grain.DatasetIterator]) -> None:
    alive = iterator()
    if alive is not None:
        alive.close()


def _shape(cfg: Config, groups: int, process_count: int) -> BatchShape:
    data = cfg.data
    if groups % process_count:
        raise UserError(f"the batch's {groups} groups cannot be shared among {process_count} processes")
    for name in ("pairs", "rows", "image_slots"):
        if getattr(data, name) % groups:
            raise UserError(f"data.{name}: {getattr(data, name)} is not divisible by the batch's {groups} groups")
    pairs, rows = data.pairs // groups, data.rows // groups
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
    )


def _weights(prepared: Prepared, cfg: Config, split: str) -> dict[str, float]:
    units = prepared.units(split)
    for name, weight in cfg.data.mixture.items():
        if name not in units:
            near = difflib.get_close_matches(name, units, 1, 0.0)[0]
            raise UserError(
                f"data.mixture: {prepared.path} has no unit {name} with split {split}; did you mean {near}?"
            )
        if weight < 0:
            raise UserError(f"data.mixture: the weight of {name} is negative")
    # In the order of names, whatever the order in the file: the stream depends on it.
    mixture = cfg.data.mixture or {name: float(len(prepared.queries(name, split))) for name in units}
    weights = {name: mixture[name] for name in sorted(mixture) if mixture[name] > 0}
    if not weights:
        raise UserError("data.mixture: every weight is 0")
    return weights
