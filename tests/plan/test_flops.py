"""The formula against what a compiled tiny model multiplies, and against counting by hand."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jfe_jax import config as configs
from jfe_jax import sharding
from jfe_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TextConfig, VisionConfig
from jfe_jax.data.packing import PackedBatch
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


def test_the_formula_is_what_xla_counts():
    """`cost_analysis` of the whole gradient, element by element included: so a little more, and with no loop in it."""
    model = ModelConfig(
        vision=VisionConfig(image_size=56, width=256, depth=3, mlp_dim=1024, num_heads=4),
        text=TextConfig(vocab_size=64, width=256, depth=2, mlp_dim=2048, num_heads=4, num_kv_heads=1, head_dim=64),
        image_token=63,
    )
    data = DataConfig(pairs=16, rows=8, row_tokens=128, image_slots=16)
    config = tiny.config(model=model, data=data)
    there = states.prepare(config, sharding.make_mesh(MeshConfig(data=1)))
    row, side = (1, data.rows, data.row_tokens), model.vision.image_size
    shapes = (row, row, row, (1, 16, side, side, 3), (1, 16), (1, 32), (1, 32, 2), (1, 32))
    kinds = (np.int32, np.int32, np.int32, np.uint8, np.int32, np.int32, np.int32, bool)
    packed = PackedBatch(*(jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)))

    def total(params, packed):
        return encode(there, params, packed).sum()

    counted = jax.jit(jax.grad(total)).lower(there.abstract.params, packed).cost_analysis()["flops"]
    assert 1 < counted / flops.training_flops(config) < 1.02


def test_items_that_fill_rows_cost_what_the_rows_do():
    config = tiny.config()
    rows, row_tokens, slots = config.data.rows, config.data.row_tokens, config.data.image_slots
    whole = flops.of_items([row_tokens] * rows, slots)
    assert flops.training_flops(config, whole) == flops.training_flops(config)
    # Half as long: half of the matrices' work, a quarter of attention's.
    half = {part.name: part for part in flops.parts(config, flops.of_items([row_tokens // 2] * rows, slots))}
    full = {part.name: part for part in flops.parts(config)}
    assert half["tower"].matrices == full["tower"].matrices / 2
    assert half["tower"].attention == full["tower"].attention / 4
    assert half["vision"] == full["vision"]
