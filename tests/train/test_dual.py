"""A dual encoder trains as every model does: on any mesh the same, and from the temperature that its weights name."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jfe_jax.config import DataConfig, LossConfig, ModelConfig, OptimizerConfig, TokensConfig, VisionConfig
from jfe_jax.errors import UserError
from jfe_jax.models.registry import build_model
from jfe_jax.train import train_state as states
from jfe_jax.train import validate
from jfe_jax.train.train_step import make_train_step
from tests.support import tiny_training as tiny
from tests.support.stepping import batch, gradients, training


def config(family: str, **changes):
    base = tiny.config()
    text = replace(base.model.text, num_kv_heads=4, positions=16)
    model = ModelConfig(kind="dual", family=family, vision=base.model.vision, text=text, image_token=tiny.IMAGE_TOKEN)
    return tiny.config(
        model=model,
        tokens=TokensConfig(template=family, max_text_tokens=16 - (1 if family == "siglip" else 2)),
        data=DataConfig(pairs=16, rows=16, row_tokens=32, image_slots=32),
        **changes,
    )


def test_loss_and_gradients_on_eight_devices_are_those_of_one():
    alone, spread = (gradients(training(config("siglip"), sizes)) for sizes in ((1, 1, 1), (2, 2, 2)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), alone, spread)


def test_it_learns_and_what_rides_along_stays():
    one = training(config("clip", optimizer=OptimizerConfig(steps=8, learning_rate=1e-2, warmup_steps=0)))
    step, state = make_train_step(one), states.init_train_state(one)
    before = jax.device_get(state.params["logit_scale_"])
    seen = []
    for _ in range(8):
        state, metrics = step(state, batch(one))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.7 * seen[0]
    np.testing.assert_array_equal(state.params["logit_scale_"], before)


@pytest.mark.parametrize(("family", "scale", "temperature"), [("siglip", 3.0, np.exp(-3.0)), ("clip", 9.0, 0.01)])
def test_the_temperature_is_what_the_weights_say_down_to_the_least(family, scale, temperature):
    loss = LossConfig(kind="sigmoid" if family == "siglip" else "infonce", temperature=0)
    made = config(family, loss=loss)
    validate.check(made)
    one = training(made)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), one.model.abstract)
    params["logit_scale_e" if family == "siglip" else "logit_scale_"] += np.float32(scale)
    if family == "siglip":
        params["logit_bias_e"] -= 7
    state = states.init_train_state(one, params)
    np.testing.assert_allclose(np.exp(-state.loss["log_inverse_temperature"]), temperature, rtol=1e-6)
    assert family == "clip" or state.loss["bias"] == -7
    assert state.loss["log_inverse_temperature"].shape == ()


def test_only_a_dual_encoder_brings_a_temperature():
    with pytest.raises(UserError, match=r"loss\.temperature is 0"):
        validate.check(tiny.config(loss=LossConfig(temperature=0)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embed_dim": 8}, "embed_dim 8: SigLIP's embedding"),
        ({"pooling": "mean"}, "pooling 'mean'"),
        ({"text": replace(config("siglip").model.text, num_kv_heads=2)}, "num_kv_heads = num_heads"),
        ({"text": replace(config("siglip").model.text, positions=0)}, "positions is 0"),
        ({"vision": VisionConfig(mean=(0.5,))}, "three numbers"),
        ({"kind": "two_tower", "pooling": "largest"}, "only a dual encoder's text"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, named):
    with pytest.raises(UserError, match=named):
        build_model(replace(config("siglip").model, **change), None)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (TokensConfig(), "laid out as 'siglip'"),
        (TokensConfig(template="siglip"), r"max_text_tokens is 240; SigLIP pads to its 16 positions.*set it to 15"),
    ],
)
def test_a_layout_of_another_model_is_refused(tokens, named):
    with pytest.raises(UserError, match=named):
        replace(config("siglip"), tokens=tokens)
