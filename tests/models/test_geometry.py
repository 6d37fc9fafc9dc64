"""The true 3B geometry, without its arrays."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import SiglipConfig, SiglipModel

from jfe_jax import config
from jfe_jax.data.batch import PackedBatch
from jfe_jax.models.layers.blocks import count_parameters
from jfe_jax.models.registry import build_model, embedding_width

CONFIGS = Path(__file__).parents[2] / "configs" / "paligemma_3b"
# google/paligemma-3b-pt-224 as published
PARAMETERS = 2_923_466_480


def abstract(cfg):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(cfg, nnx.Rngs(0))))
    return graphdef, params


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_paligemma_has_its_published_size(stage):
    cfg = config.load(CONFIGS / f"{stage}.yaml").model
    assert count_parameters(abstract(cfg)[1]) == PARAMETERS


@pytest.mark.parametrize("fusion", ["score", "feature"])
def test_the_baseline_has_as_many_parameters(fusion):
    cfg = config.load(CONFIGS / "two_tower.yaml").model
    depth = cfg.text.depth - cfg.fusion_depth if fusion == "feature" else cfg.text.depth
    cfg = dataclasses.replace(cfg, fusion=fusion, text=dataclasses.replace(cfg.text, depth=depth))
    assert abs(count_parameters(abstract(cfg)[1]) / PARAMETERS - 1) < 0.05


@pytest.mark.parametrize("name", ["stage1", "two_tower"])
def test_a_batch_goes_through_the_true_geometry(name):
    cfg = config.load(CONFIGS / f"{name}.yaml").model
    graphdef, params = abstract(cfg)
    g, r, s, m, b = 2, 2, 640, 3, 4
    side = cfg.vision.image_size
    shapes = (
        *[((g, r, s), np.int32)] * 3,
        ((g, m, side, side, 3), np.uint8),
        ((g, m), np.int32),
        ((g, b), np.int32),
        ((g, b, 2), np.int32),
        ((g, b), bool),
    )
    batch = PackedBatch(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    out = jax.eval_shape(lambda params, batch: nnx.merge(graphdef, params)(batch), params, batch)
    assert (out.shape, out.dtype) == ((g, b, embedding_width(cfg)), np.float32)


def test_the_dual_encoder_has_as_many_parameters_as_transformers_class():
    cfg = config.load(CONFIGS.parent / "siglip_so400m" / "dual.yaml").model
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    with torch.device("meta"):
        theirs = SiglipModel(
            SiglipConfig(text_config=tower, vision_config=tower | {"image_size": 224, "patch_size": 14})
        )
    assert count_parameters(abstract(cfg)[1]) == sum(weight.numel() for weight in theirs.parameters())
