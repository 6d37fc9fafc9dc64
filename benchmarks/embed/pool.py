"""A pool of items to embed, of M-BEIR's modalities, lengths and image sizes, and a random model that embeds it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from benchmarks.data import synthetic_mbeir
from benchmarks.data.mbeir_units import PROMPTS
from benchmarks.train_step import weights
from jfe_jax.config import Config, MeshConfig, ModelConfig, TokensConfig
from jfe_jax.data.processor import train_tokenizer

ITEMS = "items.jsonl"


def write_pool(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` lines of `jfe embed` and their images: queries with a prompt, and candidates, in a random order."""
    # Rows are rounded for each unit: a few more than wanted, to draw from.
    synthetic_mbeir.write(folder, count + 64, seed=seed)
    items = []
    for pattern, side in (("cand_pool/local/*.jsonl", ""), ("query/train/*.jsonl", "query_")):
        for file in sorted(folder.glob(pattern)):
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                prompt = PROMPTS[len(items) % len(PROMPTS)] if side else None
                items.append(
                    {"text": row[f"{side}txt"], "image": row[f"{side}img_path"], "instruction": prompt}
                )  # fmt: skip
    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    lines = (json.dumps({"id": str(number), **items[place]}) for number, place in enumerate(chosen))
    (folder / ITEMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / ITEMS


def linked(folder: Path, target: Path) -> Path:
    """The same pool under another path, its files shared: nothing remembers an image by its name."""
    shutil.copytree(folder, target, copy_function=os.link)
    return target / ITEMS


def write_export(folder: Path, model: ModelConfig, texts: list[str]) -> Config:
    """A random model as sentence-transformers opens it, and a tokenizer trained on `texts`.

    Its weights are stored in `model.dtype`; no run directory is made.
    """
    import jax

    from jfe_jax.checkpoint.streaming import StreamedArray
    from jfe_jax.hf.save import Outgoing, save_hf
    from jfe_jax.models.abstract_model import blueprint
    from jfe_jax.parallel import sharding
    from jfe_jax.utils.pytrees import flatten

    tokenizer = folder.parent / "tokenizer"
    train_tokenizer(texts, model.text.vocab_size, tokenizer)
    config = Config(model=model, tokens=TokensConfig(tokenizer=str(tokenizer)))
    # In the host's memory, whatever else computes.
    host = sharding.make_mesh(MeshConfig(data=1), jax.devices("cpu")[:1])
    arrays = {}
    for name, leaf in flatten(weights.for_jax(blueprint(model, host).abstract)).items():
        array = StreamedArray(leaf.shape, np.dtype(leaf.dtype), np.asarray(leaf).__getitem__)
        arrays[name] = array.astype(jax.numpy.dtype(model.dtype))
    save_hf(Outgoing(config, arrays, tokenizer, 0), folder, layout="sentence-transformers")
    return config
