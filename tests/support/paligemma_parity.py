"""How far the fusion model is from transformers' PaliGemma, number by number."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jfe_jax.config import Config
from jfe_jax.data.batch import PackedBatch
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.hf import mapping
from jfe_jax.hf.load import load_hf
from jfe_jax.models.heads.pooling import pool, unit
from jfe_jax.models.registry import build_model
from tests.support import paligemma_oracle as oracle

LAYOUTS = ("packed", "padded")
POOLINGS = ("last", "mean")


class Pair(NamedTuple):
    """The oracle, ours from the files that it saved, and what both are given."""

    model: torch.nn.Module
    config: Config
    params: nnx.State
    items: dict[str, EncodedItem]


def pair(name: str, directory: Path) -> Pair:
    """One of `oracle.MODELS`, saved to `directory` and read from there."""
    settings = oracle.MODELS[name]
    model = oracle.tiny(**settings)
    return Pair(
        model,
        *load_hf(oracle.save(model, directory)),
        oracle.items(side=settings.get("side", oracle.SIDE)),
    )


def batch_of(two: Pair, layout: str) -> PackedBatch:
    """All items, several to a row or one."""
    patches = two.config.model.vision.patches
    rows, row_tokens = (2, 64 + 3 * patches) if layout == "packed" else (6, 24 + patches)
    items = list(two.items.values())
    return pack(items, groups=1, rows=rows, row_tokens=row_tokens, image_slots=4, layout=layout)


def errors(two: Pair, layout: str) -> Iterator[tuple[str, str, float]]:
    """(item's name, measure, relative error ‖ours − theirs‖ / ‖theirs‖)."""
    graphdef, batch = _graph(two.config), batch_of(two, layout)
    states = jax.jit(lambda params, batch: nnx.merge(graphdef, params).hidden(batch))(two.params, batch)
    ours = {how: np.asarray(unit(pool(states, batch, how)))[0] for how in POOLINGS}
    states = np.asarray(states).reshape(-1, states.shape[-1])
    for number, (name, item) in enumerate(two.items.items()):
        start, end = batch.pool_span[0, number]
        with torch.no_grad():
            yield name, "states", relative(states[start:end], oracle.hidden(two.model, item))
            for how, vectors in ours.items():
                yield name, f"{how} pooled", relative(vectors[number], oracle.pooled(two.model, item, how))


def gradient_errors(two: Pair) -> Iterator[tuple[str, float]]:
    """(tensor's name, relative error of the gradient of a scalar of all embeddings).

    A key's bias has a gradient of zero, as a softmax does not see what all keys share, so that its error is relative to
    rounding: 1e-2 of all gradients' norm.
    """
    weights = np.random.default_rng(1).normal(size=(len(two.items), two.config.model.text.width)).astype(np.float32)
    graphdef, batch = _graph(two.config), batch_of(two, "packed")

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(nnx.merge(graphdef, params)(batch)[0] * weights)

    ours = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(gradient(two.params))}
    two.model.zero_grad()
    sum(
        oracle.pooled(two.model, item, "last") @ torch.from_numpy(row)
        for item, row in zip(two.items.values(), weights, strict=True)
    ).backward()
    theirs = {mapping.canonical(name): weight.grad for name, weight in two.model.named_parameters()}
    pieces = mapping.pieces({name: leaf.shape for name, leaf in ours.items()})
    floor = 1e-2 * np.sqrt(sum(float((grad**2).sum()) for grad in theirs.values() if grad is not None))
    for name, piece in pieces.items():
        leaf = np.asarray(ours[piece.entry.ours] if piece.layer is None else ours[piece.entry.ours][piece.layer])
        wanted = piece.entry.to_ours(theirs[name].numpy(), piece.shape)
        size = floor if name.endswith("k_proj.bias") else np.linalg.norm(wanted)
        yield name, float(np.linalg.norm(leaf - wanted) / size)


def bfloat16_errors(two: Pair) -> Iterator[tuple[str, float, float]]:
    """(item's name, relative error, cosine) of the embeddings computed in bfloat16."""
    model = dataclasses.replace(two.config.model, dtype="bfloat16")
    graphdef, batch = _graph(dataclasses.replace(two.config, model=model)), batch_of(two, "packed")
    ours = np.asarray(jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))(two.params, batch))[0]
    assert ours.dtype == np.float32
    for row, (name, item) in zip(ours, two.items.items(), strict=True):
        with torch.no_grad():
            theirs = oracle.pooled(two.model, item, "last")
        yield name, relative(row, theirs), float(row @ theirs.numpy())


def relative(ours: np.ndarray, theirs: torch.Tensor) -> float:
    return float(np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs.numpy()))


def _graph(config: Config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))
