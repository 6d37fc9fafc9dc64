"""Contrastive batches in M-BEIR's mix of modalities and lengths, or of one length: as our loader packs them, and as
PaliGemma's processor pads them.

Axes: N pairs, B items, S tokens of the longest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.data.mbeir_units import MODALITIES, PROMPTS, UNITS, lengths, shares
from jfe_jax.config import Config
from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.batch_builder import BatchShape, EncodedPair, build_batch

# Of PaliGemma's tokenizer on the texts of `mbeir_like`; <bos>, newline and <eos> around a text; the longest text.
TOKENS_PER_WORD, TEMPLATE, LONGEST = 1.18, 3, 380
BOS, EOS, FIRST_WORD = 2, 1, 4
# Share of the tokens of packed rows that are real.
FILLED = 0.98


@dataclass(frozen=True)
class Padded:
    """Items one a row, right-padded to the longest, as a processor gives them.

    Attributes:
      tokens: int64 [B, S].
      mask: int64 [B, S]; 1 for a token.
      lengths: int64 [B].
      pixels: float32 [images, 3, H, W], from -1 to 1, of the items that have an image, in order.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray


def mixed(config: Config, count: int, seed: int = 0) -> list[EncodedPair]:
    """`count` pairs whose units come as often as in M-BEIR's training union, with texts of their lengths."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number, place in enumerate(rng.choice(len(UNITS), count, p=shares())):
        unit = UNITS[place]
        prompt = len(PROMPTS[place % len(PROMPTS)].split())
        items = []
        for kind, mean, more in zip(
            MODALITIES[unit.task], (unit.query_words, unit.candidate_words), (prompt, 0), strict=True
        ):
            words = int(lengths(1, mean, rng)[0]) if mean else 0
            text = min(LONGEST, round(TOKENS_PER_WORD * (words + more)))
            items.append(_item(config, rng, text, "image" in kind))
        pairs.append(EncodedPair(str(number), tuple(items), (number,), (0,), (number,)))
    return pairs


def equal(config: Config, count: int, seed: int = 0) -> list[EncodedPair]:
    """`count` pairs of items that all have an image and fill a row of `config.data.row_tokens`."""
    rng = np.random.default_rng(seed)
    text = config.data.row_tokens - config.model.vision.patches - TEMPLATE
    return [
        EncodedPair(str(n), tuple(_item(config, rng, text, True) for _ in range(2)), (n,), (0,), (n,))
        for n in range(count)
    ]


def packed(config: Config, pairs: Sequence[EncodedPair], batches: int) -> list[tuple[ContrastiveBatch, list[int]]]:
    """The first `batches` batches, each with the places in `pairs` of what it holds, in order.

    As the loader fills them.

    Raises:
      ValueError: too few pairs.
    """
    data = config.data
    shape = BatchShape(
        groups=1,
        pairs=data.pairs,
        negatives=0,
        positives=1,
        rows=data.rows,
        row_tokens=data.row_tokens,
        image_slots=data.image_slots,
        image_size=config.model.vision.image_size,
        layout=data.layout,
        bins=tuple(data.bins.items()),
    )
    made, waiting, stream = [], {}, iter(enumerate(pairs))
    for _ in range(batches):
        try:
            builder, waiting = build_batch(shape, sorted(waiting.items()), stream)
        except StopIteration:
            raise ValueError(f"{len(pairs)} pairs are too few for {batches} batches of {data.pairs}") from None
        made.append((builder.finish(), sorted(builder.indices[0])))
    return made


def shaped(config: Config, pairs: Sequence[EncodedPair]) -> Config:
    """`config` with image slots for the pairs that its rows hold on average, and places for more of them than that.

    So rows and slots run out together, and are what a batch is full by, as in configs/paligemma_3b. In the padded
    layout, whose rows hold one item each: exactly as many pairs as fit.
    """
    data = config.data
    if data.layout == "padded":
        count = data.rows // 2
        images = max(sum(item.pixels is not None for item in pair.items) for pair in pairs) * count
        return replace(config, data=replace(data, pairs=count, image_slots=images))
    items = [item for pair in pairs for item in pair.items]
    count = FILLED * data.rows * data.row_tokens * len(pairs) / sum(len(item.tokens) for item in items)
    images = count * sum(item.pixels is not None for item in items) / len(pairs)
    return replace(config, data=replace(data, pairs=math.ceil(1.25 * count), image_slots=round(images)))


def padded(items: Sequence[EncodedItem]) -> Padded:
    """Items one a row, as long as the longest of them."""
    sizes = np.array([len(item.tokens) for item in items])
    tokens = np.zeros((len(items), sizes.max()), np.int64)
    for row, item in zip(tokens, items, strict=True):
        row[: len(item.tokens)] = item.tokens
    images = [item.pixels for item in items if item.pixels is not None]
    pixels = np.stack(images).astype(np.float32) / 127.5 - 1 if images else np.zeros((0, 3, 1, 1), np.float32)
    mask = (np.arange(tokens.shape[1]) < sizes[:, None]).astype(np.int64)
    return Padded(tokens, mask, sizes, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if images else pixels)


def _item(config: Config, rng: np.random.Generator, text: int, image: bool) -> EncodedItem:
    vision, marker = config.model.vision, config.model.image_token
    words = rng.integers(FIRST_WORD, marker, text + 1)
    tokens = np.concatenate([np.full(vision.patches * image, marker), [BOS], words, [EOS]]).astype(np.int32)
    side = vision.image_size
    return EncodedItem(tokens, rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if image else None)
