"""How far our dual encoder is from transformers', number by number."""

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
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.hf import mapping
from jfe_jax.hf.load import load_hf
from jfe_jax.models.heads.pooling import unit
from jfe_jax.models.registry import build_model
from tests.support import siglip_clip_oracle as oracle
from tests.support.paligemma_parity import relative

LAYOUTS = ("packed", "padded")


class Pair(NamedTuple):
    """The oracle, and ours from the files that it saved; `run` gives what `_outputs` does, and a gradient."""

    model: torch.nn.Module
    config: Config
    params: nnx.State
    run: jax.stages.Wrapped


def pair(name: str, directory: Path) -> Pair:
    """One of `oracle.MODELS`, saved to `directory` and read from there."""
    model = oracle.tiny(**oracle.MODELS[name])
    config, params = load_hf(oracle.save(model, directory))
    graphdef = graph(config)
    weights = _weights(len(oracle.items(model)), config)

    def scalar(params, batch):
        found = _outputs(nnx.merge(graphdef, params), batch)
        return jnp.sum(found["embedding"][0] * weights), found

    # Forward and backward, both layouts: one compilation.
    return Pair(model, config, params, jax.jit(jax.grad(scalar, has_aux=True)))


def graph(config: Config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))


def batch_of(model: torch.nn.Module, layout: str) -> PackedBatch:
    items = list(oracle.items(model).values())
    return pack(items, groups=1, rows=len(items), row_tokens=80, image_slots=4, layout=layout)


def errors(two: Pair, layout: str) -> Iterator[tuple[str, str, float]]:
    """(item's name, measure, relative error ‖ours − theirs‖ / ‖theirs‖)."""
    batch = batch_of(two.model, layout)
    found = jax.tree.map(lambda one: np.asarray(one)[0], two.run(two.params, batch)[1])
    for number, (name, item) in enumerate(oracle.items(two.model).items()):
        start, end = batch.pool_span[0, number]
        with torch.no_grad():
            theirs = oracle.features(two.model, item)
            if "text" in theirs:
                rows = found["text states"].reshape(-1, found["text states"].shape[-1])
                yield name, "text states", relative(rows[start:end], oracle.text_hidden(two.model, item))
                yield name, "text features", relative(found["text features"][number], theirs["text"])
            if "image" in theirs:
                slot = int(np.flatnonzero(batch.image_start[0] == start)[0])
                states = oracle.image_hidden(two.model, item)
                yield name, "image states", relative(found["image states"][slot], states)
                yield name, "image features", relative(found["image features"][slot], theirs["image"])
            yield name, "embedding", relative(found["embedding"][number], oracle.pooled(two.model, item))


def gradient_errors(two: Pair) -> Iterator[tuple[str, float]]:
    """(tensor's name, relative error of the gradient of a scalar of all embeddings).

    A key's bias has a gradient of zero, as a softmax does not see what all keys share, so that its error is relative to
    rounding: 1e-2 of all gradients' norm.
    """
    items = oracle.items(two.model)
    ours = two.run(two.params, batch_of(two.model, "packed"))[0]
    ours = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(ours)}
    two.model.zero_grad()
    weights = torch.from_numpy(_weights(len(items), two.config))
    sum(oracle.pooled(two.model, item) @ row for item, row in zip(items.values(), weights, strict=True)).backward()
    theirs = {mapping.canonical(name): weight.grad for name, weight in two.model.named_parameters()}
    pieces = mapping.pieces({name: leaf.shape for name, leaf in ours.items()})
    assert theirs.keys() == pieces.keys()
    floor = 1e-2 * np.sqrt(sum(float((grad**2).sum()) for grad in theirs.values() if grad is not None))
    for name, piece in pieces.items():
        leaf = np.asarray(ours[piece.entry.ours] if piece.layer is None else ours[piece.entry.ours][piece.layer])
        if theirs[name] is None:
            # logit_scale and logit_bias are of the losses, no embedding depends on them.
            assert name.startswith("logit_") and not leaf.any(), name
            continue
        wanted = piece.entry.to_ours(theirs[name].numpy(), piece.shape)
        size = np.linalg.norm(wanted)
        yield name, float(np.linalg.norm(leaf - wanted) / (floor if name.endswith("k_proj.bias") else size))


def bfloat16_errors(two: Pair) -> Iterator[tuple[str, float, float]]:
    """(item's name, relative error, cosine) of the embeddings computed in bfloat16."""
    model = dataclasses.replace(two.config.model, dtype="bfloat16")
    graphdef, batch = graph(dataclasses.replace(two.config, model=model)), batch_of(two.model, "packed")
    ours = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))(two.params, batch)[0]
    assert ours.dtype == np.float32
    for row, (name, item) in zip(np.asarray(ours), oracle.items(two.model).items(), strict=False):
        with torch.no_grad():
            theirs = oracle.pooled(two.model, item)
        yield name, relative(row, theirs), float(row @ theirs.numpy() / np.linalg.norm(row))


def _outputs(model: nnx.Module, batch: PackedBatch) -> dict[str, jax.Array]:
    texts, images = model.text_states(batch), model.image_states(batch.pixels)
    text_vectors, image_vectors = model.text_embeddings(texts, batch), model.image_embeddings(images)
    return {
        "text states": texts,
        "image states": images,
        "text features": text_vectors,
        "image features": image_vectors,
        "embedding": unit(model.combine(text_vectors, image_vectors, batch)),
    }


def _weights(items: int, config: Config) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(items, config.model.embed_dim)).astype(np.float32)
