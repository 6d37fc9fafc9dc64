"""A tiny config made ready to step on a mesh of fake devices."""

import jax

from jfe_jax.config import MeshConfig
from jfe_jax.parallel import sharding
from jfe_jax.train import train_state as states
from jfe_jax.train.train_step import loss_of
from tests.support import tiny_training as tiny


def training(config, sizes=(1, 1, 1)):
    mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    return states.make_train_setup(config, mesh)


def batch(training, seed=0):
    return sharding.put_batch(tiny.batch(training.config, sharding.group_count(training.mesh), seed), training.mesh)


def gradients(training):
    state = states.init_train_state(training)
    tree = states.trainable(state.params, state.loss)
    function = jax.jit(jax.value_and_grad(lambda tree, batch: loss_of(training, tree, batch)[0]))
    with jax.set_mesh(training.mesh):
        return jax.device_get(function(tree, batch(training)))
