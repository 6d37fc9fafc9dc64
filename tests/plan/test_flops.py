"""The formula against what a compiled tiny model multiplies, and against counting by hand."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jfe_jax import config as configs
from jfe_jax import sharding
from jfe_jax.config import MeshConfig, OptimizerConfig
from jfe_jax.models import count_parameters
from jfe_jax.plan import flops
from jfe_jax.plan.costs import work
from jfe_jax.plan.hlo import Module
from jfe_jax.train import state as states
from jfe_jax.train.step import encode
from tests.train import tiny

STAGE2 = configs.load(Path(__file__).parents[2] / "configs" / "paligemma_3b" / "stage2.yaml")


def test_by_hand():
    text = tiny.config().model.text
    # Width 32, 4 heads of 8, 1 kv head, MLP 64: query and output 2·32·32, key and value 2·32·8, MLP 3·32·64.
    assert flops.text_layer(text, 48) == (2 * (2048 + 512 + 6144), 2 * 2 * 48 * 32)
    assert flops.vision_layer(tiny.config().model.vision) == (2 * (4 * 256 + 2 * 512), 2 * 2 * 4 * 16)


def test_six_flops_a_parameter_and_token():
    """The rule of thumb, for the matrices: 2 forward, 4 backward."""
    tower = next(part for part in flops.parts(STAGE2) if part.name == "tower")
    training = states.prepare(STAGE2, sharding.make_mesh(MeshConfig(data=1)))
    blocks = training.abstract.params["tower"]["blocks"]
    matrices = count_parameters({k: v for k, v in blocks.items() if "norm" not in k})
    tokens = STAGE2.data.rows * STAGE2.data.row_tokens
    assert tower.training - 3 * tower.attention == pytest.approx(6 * matrices * tokens, rel=1e-9)
    # Both directions: nothing halved.
    text = STAGE2.model.text
    assert tower.attention == 4 * 512 * text.num_heads * text.head_dim * text.depth * tokens


def test_what_is_frozen_costs_less():
    def total(*freeze):
        return {p.name: p for p in flops.parts(replace(STAGE2, optimizer=OptimizerConfig(freeze=freeze)))}

    everything, some = total(), total("vision")
    assert some["vision"].training == everything["vision"].forward
    # The projector is trained, so the gradient goes all the way through the tower, but not into the images.
    assert some["projector"].training == 2 * some["projector"].forward
    assert some["tower"].training == everything["tower"].training
    alone = total("vision", "projector", "embedder", "tower")
    assert alone["tower"].training == alone["tower"].forward


def test_the_formula_is_what_is_compiled():
    """Nothing recomputed: the compiled products are the formula's, but for small ones that XLA writes otherwise."""
    config = tiny.config()
    there = states.prepare(config, sharding.make_mesh(MeshConfig(data=1)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(config, 1))

    def total(params, packed):
        return encode(there, params, packed).sum()

    program = jax.jit(jax.grad(total)).lower(there.abstract.params, batch.packed).compile().as_text()
    assert work(Module(program)).flops == pytest.approx(flops.training_flops(config), rel=0.01)
