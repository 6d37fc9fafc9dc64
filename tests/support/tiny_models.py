"""Tiny models of the real architecture on a handful of items, each kind once."""

import functools

import jax
import numpy as np
from flax import nnx

from jfe_jax.config import ModelConfig, TextConfig, VisionConfig
from jfe_jax.data.batch import PackedBatch
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.models.registry import build_model

IMAGE_TOKEN, PATCHES, SIDE = 63, 4, 8
BOS, EOS, NEWLINE = 2, 1, 5
KINDS = {
    "fusion": {},
    "score": {"kind": "two_tower", "fusion": "score", "embed_dim": 20},
    "feature": {"kind": "two_tower", "fusion": "feature", "fusion_depth": 1},
}


def config(name: str, **changes) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(image_size=SIDE, patch_size=4, width=24, depth=1, mlp_dim=32, num_heads=2),
        text=TextConfig(vocab_size=64, width=16, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8),
        image_token=IMAGE_TOKEN,
        **KINDS[name],
        **changes,
    )


def item(words: int, image: bool, seed: int) -> EncodedItem:
    """As data/tokens.py lays it out, with the newline."""
    rng = np.random.default_rng(seed)
    tokens = [*[IMAGE_TOKEN] * PATCHES * image, BOS, *rng.integers(6, 60, words), NEWLINE, EOS]
    return EncodedItem(
        np.array(tokens, np.int32), rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) if image else None
    )


def without_text(both: EncodedItem) -> EncodedItem:
    return EncodedItem(np.array([*[IMAGE_TOKEN] * PATCHES, BOS, NEWLINE, EOS], np.int32), both.pixels)


def without_image(both: EncodedItem) -> EncodedItem:
    return EncodedItem(both.tokens[PATCHES:], None)


def packed(items: list[EncodedItem | None], layout: str = "packed", groups: int = 1) -> PackedBatch:
    shape = {"packed": (3, 32), "padded": (8, 16)}[layout]
    return pack(items, groups=groups, rows=shape[0], row_tokens=shape[1], image_slots=6, layout=layout, image_size=SIDE)


@functools.cache
def split(name: str, **changes) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameters. They come from NumPy, norms and biases too: no compilation, and an error in any shows."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(config(name, **changes), nnx.Rngs(0))))
    rng = np.random.default_rng(3)
    return graphdef, jax.tree.map(lambda leaf: (0.25 * rng.normal(size=leaf.shape)).astype(np.float32), abstract)


@functools.cache
def model(name: str, method: str = "__call__", **changes):
    """A function PackedBatch → NumPy array [G, B, E]."""
    graphdef, params = split(name, **changes)
    apply = jax.jit(lambda params, batch: getattr(nnx.merge(graphdef, params), method)(batch))
    return lambda batch: np.asarray(apply(params, batch))
