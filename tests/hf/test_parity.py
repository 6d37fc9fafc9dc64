"""The fusion model against transformers' PaliGemma: states, embeddings, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jfe_jax.data.packing import PackedBatch, pack
from jfe_jax.hf import mapping
from jfe_jax.hf.load import load_hf
from jfe_jax.models import build_model
from jfe_jax.models.pooling import pool, unit
from tests.hf import oracle

ITEMS = oracle.items()
LAYOUTS = {
    "packed": {"rows": 2, "row_tokens": 64, "image_slots": 4, "layout": "packed"},
    "padded": {"rows": 6, "row_tokens": 40, "image_slots": 3, "layout": "padded"},
}


MODELS = {
    "Gemma 1, 1 kv head": {"kv_heads": 1},
    "Gemma 1, 2 kv heads": {"kv_heads": 2},
    "Gemma 2": {"kv_heads": 2, "text": oracle.GEMMA_2},
    "Gemma 2, no cap and no window": {
        "kv_heads": 1,
        "text": oracle.GEMMA_2 | {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 3},
    },
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def pair(request, tmp_path_factory):
    """The oracle, and ours loaded from what it saved."""
    model = oracle.tiny(**request.param)
    directory = oracle.save(model, tmp_path_factory.mktemp("hf"))
    return model, *load_hf(directory)


def packed_items(layout: str) -> PackedBatch:
    return pack(list(ITEMS.values()), groups=1, **LAYOUTS[layout])


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def graph(config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_and_embeddings_agree(pair, layout):
    model, config, params = pair
    graphdef, batch = graph(config), packed_items(layout)
    states = jax.jit(lambda params, batch: nnx.merge(graphdef, params).hidden(batch))(params, batch)
    ours = {how: np.asarray(unit(pool(states, batch, how)))[0] for how in ("last", "mean")}
    states = np.asarray(states).reshape(-1, states.shape[-1])
    for number, (name, item) in enumerate(ITEMS.items()):
        start, end = batch.pool_span[0, number]
        with torch.no_grad():
            assert relative(states[start:end], oracle.hidden(model, item).numpy()) <= 1e-5, name
            for how, vectors in ours.items():
                assert relative(vectors[number], oracle.pooled(model, item, how).numpy()) <= 1e-5, (name, how)


def test_bfloat16_stays_close(pair):
    model, config, params = pair
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    graphdef, batch = graph(config), packed_items("packed")
    ours = np.asarray(jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))(params, batch))[0]
    assert ours.dtype == np.float32
    for number, (name, item) in enumerate(ITEMS.items()):
        with torch.no_grad():
            theirs = oracle.pooled(model, item, "last").numpy()
        assert relative(ours[number], theirs) <= 2e-2, name
        assert ours[number] @ theirs >= 0.999, name


def test_gradients_agree(pair):
    model, config, params = pair
    weights = np.random.default_rng(1).normal(size=(len(ITEMS), config.model.text.width)).astype(np.float32)
    graphdef, batch = graph(config), packed_items("packed")

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(nnx.merge(graphdef, params)(batch)[0] * weights)

    ours = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(gradient(params))}
    model.zero_grad()
    sum(
        oracle.pooled(model, item, "last") @ torch.from_numpy(row)
        for item, row in zip(ITEMS.values(), weights, strict=True)
    ).backward()
    theirs = {mapping.canonical(name): weight.grad for name, weight in model.named_parameters()}
    pieces = mapping.pieces({name: leaf.shape for name, leaf in ours.items()})
    # The gradient of a key's bias is zero, a softmax does not see what all keys share: rounding is all there is.
    noise = 1e-6 * np.sqrt(sum(float((grad**2).sum()) for grad in theirs.values() if grad is not None))
    for name, piece in pieces.items():
        leaf = np.asarray(ours[piece.entry.ours] if piece.layer is None else ours[piece.entry.ours][piece.layer])
        wanted = piece.entry.to_ours(theirs[name].numpy(), piece.shape)
        assert np.linalg.norm(leaf - wanted) <= 1e-4 * np.linalg.norm(wanted) + noise, name
