"""The formula against what a compiled tiny model multiplies, and against counting by hand."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jfe_jax import config as configs
from jfe_jax.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TokensConfig,
    VisionConfig,
)
from jfe_jax.data.batch import PackedBatch
from jfe_jax.models.layers.blocks import count_parameters
from jfe_jax.parallel import sharding
from jfe_jax.plan import flops
from jfe_jax.plan.hlo import HloModule
from jfe_jax.plan.hlo_costs import count_hlo_costs
from jfe_jax.train import train_state as states
from jfe_jax.train.optimizer import trained_mask
from jfe_jax.train.train_step import encode
from jfe_jax.utils import pytrees
from tests.support import tiny_training as tiny

STAGE2 = configs.load(Path(__file__).parents[2] / "configs" / "paligemma_3b" / "stage2.yaml")


def test_by_hand():
    """16 rows of 32 tokens; 32 images of 4 patches of 4·4·3 pixels; 32 items."""
    found = {part.name: part for part in flops.count_module_flops(mean_pooled())}
    # Width 32, 4 heads of 8, 1 kv head, MLP 64: query and output 2·32·32, key and value 2·32·8, MLP 3·32·64.
    tower = found["tower"]
    assert (tower.matrices, tower.attention) == (512 * 2 * (2048 + 512 + 6144), 512 * 2 * 2 * 32 * 32)
    assert tower.training == 3 * tower.forward
    # Width 16, MLP 32.
    vision = found["vision"]
    assert (vision.matrices, vision.attention) == (128 * 2 * (4 * 256 + 2 * 512), 128 * 2 * 2 * 4 * 16)
    # No gradient goes to the pixels.
    assert found["patches"].training == 2 * found["patches"].forward == 2 * 128 * 2 * 48 * 16
    assert found["projector"].training == 3 * 128 * 2 * 16 * 32
    # The only layer is the last: keys and values of all tokens, the rest of one token of each item, in rows of 32.
    last = {part.name: part for part in flops.count_module_flops(tiny.config())}
    assert (last["tower_keys"].matrices, last["tower_keys"].attention) == (512 * 2 * 512, 0)
    assert (last["tower"].matrices, last["tower"].attention) == (32 * 2 * (2048 + 6144), 32 * 2 * 2 * 32 * 32)


def mean_pooled():
    """Whose last layer computes all tokens, as every other."""
    return tiny.config(model=replace(tiny.config().model, pooling="mean"))


def test_six_flops_a_parameter_and_token():
    """The rule of thumb, for the matrices: 2 forward, 4 backward."""
    tower = next(part for part in flops.count_module_flops(STAGE2) if part.name == "tower")
    training = states.make_train_setup(STAGE2, sharding.make_mesh(MeshConfig(data=1)))
    blocks = training.abstract.params["tower"]["blocks"]
    matrices = count_parameters({k: v for k, v in blocks.items() if "norm" not in k})
    tokens = STAGE2.data.rows * STAGE2.data.row_tokens
    assert tower.training - 3 * tower.attention == pytest.approx(6 * matrices * tokens, rel=1e-9)
    # Both directions: nothing halved.
    text = STAGE2.model.text
    assert tower.attention == 4 * STAGE2.data.row_tokens * text.num_heads * text.head_dim * text.depth * tokens


def test_what_is_frozen_costs_less():
    def total(*freeze):
        return {p.name: p for p in flops.count_module_flops(replace(STAGE2, optimizer=OptimizerConfig(freeze=freeze)))}

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
    there = states.make_train_setup(config, sharding.make_mesh(MeshConfig(data=1)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(config, 1))

    def total(params, packed):
        return encode(there, params, packed).sum()

    program = jax.jit(jax.grad(total)).lower(there.abstract.params, batch.packed).compile().as_text()
    assert count_hlo_costs(HloModule(program)).flops == pytest.approx(flops.count_training_flops(config), rel=0.01)


def test_adapters_train_instead_of_their_kernels():
    base = mean_pooled()
    some = replace(base.model, lora=LoraConfig(rank=4, targets=("attention.query",)))
    found = {
        part.name: part
        for part in flops.count_module_flops(
            replace(base, model=some, optimizer=replace(base.optimizer, train=("projector",)))
        )
    }
    whole = {part.name: part for part in flops.count_module_flops(base)}
    # A is 32·4 and B 4·32.
    adapters = 512 * 2 * (32 * 4 + 4 * 32)
    tower = found["tower"]
    assert (tower.matrices, tower.learned) == (whole["tower"].matrices + adapters, adapters)
    assert (found["vision"].training, tower.through) == (whole["vision"].forward, True)
    assert found["projector"].training == 2 * found["projector"].forward


def adapted(base, targets, train):
    adapters = LoraConfig(rank=4, targets=targets)
    return replace(base, model=replace(base.model, lora=adapters), optimizer=replace(base.optimizer, train=train))


def late(fusion):
    base = wide()
    return replace(base, model=replace(base.model, kind="two_tower", fusion=fusion, fusion_depth=1, embed_dim=24))


def wide():
    """So wide that what is done element by element is little beside the products."""
    model = ModelConfig(
        vision=VisionConfig(image_size=56, width=256, depth=3, mlp_dim=1024, num_heads=4),
        text=TextConfig(vocab_size=64, width=256, depth=2, mlp_dim=2048, num_heads=4, num_kv_heads=1, head_dim=64),
        image_token=63,
    )
    return tiny.config(model=model, data=DataConfig(pairs=16, rows=8, row_tokens=128, image_slots=16))


def dual(family):
    base, template = wide(), {"siglip": 1, "clip": 2}[family]
    text = replace(base.model.text, num_kv_heads=4, mlp_dim=1024, positions=128)
    return replace(
        base,
        model=replace(base.model, kind="dual", family=family, text=text, embed_dim=256),
        tokens=TokensConfig(template=family, max_text_tokens=128 - template),
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(wide(), id="fusion"),
        pytest.param(adapted(wide(), ("attention", "mlp"), ("projector",)), id="adapters"),
        pytest.param(late("score"), id="score"),
        pytest.param(
            adapted(late("score"), ("vision", "mlp.up"), ("patch_yxcd", "table_vd")), id="score with adapters"
        ),
        pytest.param(late("feature"), id="feature"),
        pytest.param(dual("siglip"), id="siglip"),
        pytest.param(dual("clip"), id="clip"),
    ],
)
def test_the_formula_is_what_xla_counts(config):
    """`cost_analysis` of the whole gradient, element by element included: so a little more, and with no loop in it."""
    data, side = config.data, config.model.vision.image_size
    there = states.make_train_setup(config, sharding.make_mesh(MeshConfig(data=1)))
    row = (1, data.rows, data.row_tokens)
    shapes = (row, row, row, (1, 16, side, side, 3), (1, 16), (1, 32), (1, 32, 2), (1, 32))
    kinds = (np.int32, np.int32, np.int32, np.uint8, np.int32, np.int32, np.int32, bool)
    packed = PackedBatch(*(jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)))
    moving = pytrees.select(there.abstract.params, trained_mask(config, there.model.axes)["model"])

    def total(moving, params, packed):
        return encode(there, pytrees.overlay(params, moving), packed).sum()

    counted = jax.jit(jax.grad(total)).lower(moving, there.abstract.params, packed).cost_analysis()["flops"]
    assert 1 < counted / flops.count_training_flops(config) < 1.02


def test_items_that_fill_rows_cost_what_the_rows_do():
    config = mean_pooled()
    rows, row_tokens, slots = config.data.rows, config.data.row_tokens, config.data.image_slots
    whole = flops.items_workload([row_tokens] * rows, slots)
    assert flops.count_training_flops(config, whole) == flops.count_training_flops(config)
    # Half as long: half of the matrices' work, a quarter of attention's.
    half = {
        part.name: part
        for part in flops.count_module_flops(config, flops.items_workload([row_tokens // 2] * rows, slots))
    }
    full = {part.name: part for part in flops.count_module_flops(config)}
    assert half["tower"].matrices == full["tower"].matrices / 2
    assert half["tower"].attention == full["tower"].attention / 4
    assert half["vision"] == full["vision"]
    # What is pooled attends to its own item, in a row to all of it.
    config = replace(config, model=tiny.config().model)
    pairs = config.data.pairs
    one, other = (
        flops.count_module_flops(config, load)[-1]
        for load in (None, flops.items_workload([row_tokens // 4] * 2 * pairs, 0))
    )
    assert (one.name, other.matrices, other.attention) == ("tower", one.matrices, one.attention / 4)
