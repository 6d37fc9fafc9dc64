"""Counts the real tokens among those that a step computes, in each layout, on M-BEIR's training mix.

Tasks are as frequent as in M-BEIR's up-sampled training union. Texts have the lengths that `synthetic_mbeir` draws, in
ids of PaliGemma's tokenizer, and an image takes 256 tokens. The packed layouts are the loader's own batches.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.common.result import Progress, Result, table
from benchmarks.common.tokenizer import IMAGE_TOKEN, paligemma_tokenizer
from benchmarks.data import synthetic_mbeir
from benchmarks.data.mbeir_units import MODALITIES, PROMPTS, UNITS, shares
from jfe_jax.config import TokensConfig, VisionConfig
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.batch_builder import BatchShape, EncodedPair
from jfe_jax.data.pipeline.pair_batcher import PairBatches
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.datasets.npm import cache_directory

BUCKETS = (32, 64, 128, 192, 256, 288, 320, 384, 512, 640)
GROUPS, GROUP_TOKENS = 4, 10_240
# Pairs, rows, their tokens and image slots of a device, of which a host has GROUPS.
STAGE2_NAME, STAGE2 = "configs/paligemma_3b/stage2.yaml: 64 pairs, rows of 1,152", (16, 6, 1152, 22)
_ONE_PIXEL = np.zeros((1, 1, 3), np.uint8)


class Row(NamedTuple):
    """A layout: the share of its tokens that are real, pairs a step, and how many shapes have to be compiled."""

    layout: str
    real: float
    pairs: float
    shapes: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the number of steps."""
    parser.add_argument("--steps", type=int, default=100)


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Measures every layout."""
    formats = {"layout": "", "real tokens": ".1%", "pairs a step": ".1f", "shapes": ""}
    with progress("layouts", 9) as done:
        rows = []
        for row in measure(args.steps):
            rows.append([row.layout, float(row.real), float(row.pairs), row.shapes])
            done(1)
    return Result(
        tables=[table(formats, rows)],
        packages=["tokenizers"],
        method=f"means of {args.steps} steps of {GROUPS} groups of {GROUP_TOKENS:,} tokens",
    )


def measure(steps: int, pairs: int = 20_000) -> Iterator[Row]:
    """Measures `steps` steps of each layout, each of GROUPS groups of GROUP_TOKENS tokens."""
    drawn = draw(pairs)
    lengths = np.array([len(item.tokens) for pair in drawn for item in pair.items])
    images = np.mean([item.pixels is not None for pair in drawn for item in pair.items])
    batch = round(GROUPS * GROUP_TOKENS / (2 * lengths.mean()))
    whole = lengths[: len(lengths) // (2 * batch) * 2 * batch].reshape(-1, 2 * batch)
    yield Row("an item a row, rows of the longest there is", lengths.mean() / lengths.max(), batch, "1")
    yield Row(
        "an item a row, rows of the batch's longest", whole.sum() / (whole.max(1) * 2 * batch).sum(), batch, "many"
    )
    bucketed = np.array(BUCKETS)[np.searchsorted(BUCKETS, lengths)]
    yield Row(
        f"an item a row, {len(BUCKETS)} buckets of lengths", lengths.sum() / bucketed.sum(), batch, str(len(BUCKETS))
    )
    # The rows are what runs out: that a step has no room for more pairs is what is wanted here.
    logging.disable(logging.WARNING)
    try:
        shapes = {
            f"packed, rows of {row_tokens:,}": (
                round(1.5 * batch / GROUPS),
                GROUP_TOKENS // row_tokens,
                row_tokens,
                round(1.25 * 2 * images * batch / GROUPS),
            )
            for row_tokens in (640, 1024, 1152, 1280, 2048)
        }
        for name, (per_group, rows, row_tokens, slots) in (shapes | {STAGE2_NAME: STAGE2}).items():
            shape = BatchShape(
                groups=GROUPS,
                pairs=per_group,
                negatives=0,
                positives=1,
                rows=rows,
                row_tokens=row_tokens,
                image_slots=slots,
                image_size=1,
                layout="packed",
            )
            batches = PairBatches(_Drawn(drawn), shape, 0, 1, 0.0)
            made = [next(batches) for _ in range(steps)]
            real = np.mean([(one.packed.segments > 0).mean() for one in made])
            count = np.mean([one.packed.valid.sum() / 2 for one in made])
            yield Row(name, float(real), float(count), "1")
    finally:
        logging.disable(logging.NOTSET)


def draw(count: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs of M-BEIR's mix with their tokens; the pixels stand for an image."""
    rng = np.random.default_rng(seed)
    tokenizer = paligemma_tokenizer(cache_directory(), lambda line: print(line, file=sys.stderr))
    encoder = ItemEncoder(TokensConfig(tokenizer=str(tokenizer), max_text_tokens=380), VisionConfig(), IMAGE_TOKEN)
    chosen = rng.choice(len(UNITS), count, p=shares())
    words = synthetic_mbeir.vocabulary(rng)
    pairs: list[EncodedPair] = [None] * count
    for number, unit in enumerate(UNITS):
        places = np.flatnonzero(chosen == number)
        sides = []
        for kind, mean, prompt in zip(
            MODALITIES[unit.task],
            (unit.query_words, unit.candidate_words),
            (PROMPTS[number % 4], None),
            strict=True,
        ):
            texts = synthetic_mbeir.texts(len(places), mean, rng, words) if mean else [None] * len(places)
            image = "image" in kind
            sides.append([EncodedItem(encoder.tokens(t, prompt, image), _ONE_PIXEL if image else None) for t in texts])
        for place, query, candidate in zip(places, *sides, strict=True):
            pairs[place] = EncodedPair(f"{unit.number}:{place}", (query, candidate), (int(place),), (0,), (int(place),))
    return pairs


class _Drawn:
    """Pairs by index, over and over, in place of `reading.PairReader`."""

    def __init__(self, pairs: list[EncodedPair]):
        self._pairs, self._next, self._stride = pairs, 0, 1

    def at(self, index: int) -> EncodedPair:
        return self._pairs[index % len(self._pairs)]

    def start(self, start: int, stride: int) -> None:
        self._next, self._stride = start, stride

    def __next__(self) -> EncodedPair:
        self._next += self._stride
        return self.at(self._next - self._stride)

    def close(self) -> None:
        pass
