"""Tiny random models of the real architecture, and their tokenizer."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jfe_jax.config import Config, DataConfig, ModelConfig, TextConfig, TokensConfig, VisionConfig
from jfe_jax.data.processor import train_tokenizer
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.models.registry import build_model

TEXTS = ["a red square on white", "turn it blue", "find the picture that matches this text"]


def tiny_config(tokenizer: Path, kind: str = "fusion", *, image_token: int = 299, vocab_size: int = 300) -> Config:
    return Config(
        model=ModelConfig(
            kind=kind,
            vision=VisionConfig(image_size=16, patch_size=8, width=16, depth=1, mlp_dim=32, num_heads=2),
            text=TextConfig(vocab_size=vocab_size, width=16, depth=2, mlp_dim=32, num_heads=2, head_dim=8),
            image_token=image_token,
            embed_dim=16 if kind == "two_tower" else 0,
        ),
        tokens=TokensConfig(tokenizer=str(tokenizer), max_text_tokens=60),
        data=DataConfig(row_tokens=128),
    )


def tiny_retriever(folder: Path, kind: str = "fusion", seed: int = 0) -> Retriever:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(TEXTS, 300, tokenizer)
    config = tiny_config(tokenizer, kind)
    return random_retriever(config, folder / f"{kind}-{seed}", seed)


def random_retriever(config: Config, path: Path, seed: int) -> Retriever:
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))
    random = np.random.default_rng(seed)
    # Drawn by NumPy: the models' own initialisers take many times longer to compile than all that is tested here.
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.25, leaf.shape), leaf.dtype), abstract)
    return Retriever(config, graphdef, params, path=path, step=seed)


def save(retriever: Retriever, path: Path) -> Path:
    """The retriever's model as a run directory."""
    from jfe_jax.checkpoint.model_io import save_model

    config = dataclasses.replace(retriever.config, output=str(path))
    save_model(path, config, retriever._params, Path(config.tokens.tokenizer))
    return path


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@contextlib.contextmanager
def quiet(name: str, total: int):
    """Progress that nobody watches."""
    yield lambda count: None
