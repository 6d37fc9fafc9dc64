"""A run small enough for a test: the real architecture with random weights on random items."""

import numpy as np

from jfe_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    VisionConfig,
)
from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import Packer

VOCABULARY, IMAGE_TOKEN, PATCHES = 64, 63, 4


def config(**changes) -> Config:
    """Widths that every mesh of 8 divides; 16 pairs."""
    tree = {
        "model": ModelConfig(
            vision=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=4),
            text=TextConfig(
                vocab_size=VOCABULARY, width=32, depth=1, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=8
            ),
            image_token=IMAGE_TOKEN,
        ),
        "data": DataConfig(pairs=16, rows=16, row_tokens=32, image_slots=32),
        "loss": LossConfig(),
        "optimizer": OptimizerConfig(steps=6, learning_rate=1e-2, warmup_steps=2),
    }
    return Config(**(tree | changes))


def batch(config: Config, groups: int, seed: int = 0) -> ContrastiveBatch:
    """Random pairs, the same whatever `groups` is; every third query has an image, and some candidates are equal."""
    data, random = config.data, np.random.default_rng(seed)
    each, k = data.pairs // groups, data.hard_negatives
    packer = Packer(
        groups=groups,
        rows=data.rows // groups,
        row_tokens=data.row_tokens,
        image_slots=data.image_slots // groups,
        image_size=config.model.vision.image_size,
        layout=data.layout,
        bins=tuple((length, count // groups) for length, count in data.bins.items()),
    )
    ids, modality = (np.full((data.pairs, 1 + k), -1, np.int32) for _ in range(2))
    positives = np.full((data.pairs, 3), -1, np.int32)
    for pair in range(data.pairs):
        group, index = divmod(pair, each)
        query = _item(random, image=pair % 3 == 0)
        candidates = [_item(random, image=pair % 2 == 0) for _ in range(1 + k)]
        ids[pair] = random.integers(0, data.pairs, 1 + k)
        modality[pair] = 2 if pair % 2 == 0 else 0
        positives[pair, :2] = ids[pair, 0], random.integers(0, data.pairs)
        at = [each + index, *(2 * each + index * k + i for i in range(k))]
        assert packer.add(group, [(index, query), *zip(at, candidates, strict=True)])

    def flat(x: np.ndarray) -> np.ndarray:
        x = x.reshape(groups, each, 1 + k)
        return np.concatenate([x[..., 0], x[..., 1:].reshape(groups, -1)], axis=1)

    positives = positives.reshape(groups, each, 3)
    return ContrastiveBatch(packer.finish(each * (2 + k)), flat(ids), flat(modality), positives)


def _item(random: np.random.Generator, *, image: bool) -> EncodedItem:
    text = random.integers(4, IMAGE_TOKEN, random.integers(2, 6)).astype(np.int32)
    tokens = np.concatenate([np.full(PATCHES * image, IMAGE_TOKEN, np.int32), text])
    pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8) if image else None
    return EncodedItem(tokens, pixels)
