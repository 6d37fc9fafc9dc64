"""One optimizer step, and the loss without one, as compiled functions over (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jfe_jax import sharding
from jfe_jax.blueprint import shardings_of
from jfe_jax.data.packing import ContrastiveBatch
from jfe_jax.train import losses
from jfe_jax.train.optimizer import trained_mask
from jfe_jax.train.schedules import learning_rate
from jfe_jax.train.state import Training, TrainState, trainable

Metrics = dict[str, jax.Array]


def make_train_step(training: Training) -> Callable[[TrainState, ContrastiveBatch], tuple[TrainState, Metrics]]:
    """Compiled step: (state, batch on the mesh) → (next state, metrics); the old state's memory is reused.

    Metrics are float32 scalars, those of `losses.contrastive_loss` (before the update) and "temperature",
    "learning_rate", "gradient_norm" (of what is trained, before clipping).
    """
    config, rate = training.config, learning_rate(training.config.optimizer)
    trained = trained_mask(config, training.model.axes)

    def step(state: TrainState, batch: ContrastiveBatch) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(training.mesh.abstract_mesh):
            tree = trainable(state.params, state.loss)
            grads, metrics = jax.grad(lambda tree: loss_of(training, tree, batch), has_aux=True)(tree)
            updates, optimizer = training.optimizer.update(grads, state.optimizer, tree)
            tree = optax.apply_updates(tree, updates)
        # Without the frozen ones' gradients, which then need not be computed.
        moving = jax.tree.map(lambda gradient, moves: gradient if moves else None, grads, trained)
        metrics |= {"learning_rate": jnp.float32(rate(state.step)), "gradient_norm": optax.tree.norm(moving)}
        loss = losses.clamp(tree["loss"], config.loss)
        return TrainState(state.step + 1, tree["model"], loss, optimizer), metrics

    state = shardings_of(training.abstract)
    return jax.jit(
        step,
        in_shardings=(state, sharding.batch_sharding(training.mesh)),
        out_shardings=(state, sharding.replicated(training.mesh)),
        donate_argnums=0,
    )


def make_eval_step(training: Training) -> Callable[[TrainState, ContrastiveBatch], Metrics]:
    """Compiled loss: (state, batch on the mesh) → metrics of `losses.contrastive_loss`."""

    def step(state: TrainState, batch: ContrastiveBatch) -> Metrics:
        with jax.sharding.use_abstract_mesh(training.mesh.abstract_mesh):
            return loss_of(training, trainable(state.params, state.loss), batch)[1]

    return jax.jit(
        step,
        in_shardings=(shardings_of(training.abstract), sharding.batch_sharding(training.mesh)),
        out_shardings=sharding.replicated(training.mesh),
    )


def loss_of(training: Training, tree: dict[str, Any], batch: ContrastiveBatch) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of the tree that is trained (`state.trainable`); to be traced under a mesh in context."""
    embeddings = nnx.merge(training.model.graphdef, tree["model"])(batch.packed)
    embeddings = sharding.constrain(embeddings, ("group", None, "embed"))
    n = batch.positive_ids.shape[-2]
    pairs = losses.Pairs(
        embeddings[:, :n],
        embeddings[:, n:],
        batch.candidate_ids,
        batch.candidate_modality,
        batch.positive_ids,
        batch.packed.valid[:, :n],
        batch.packed.valid[:, n:],
    )
    loss, metrics = losses.contrastive_loss(pairs, tree["loss"], training.config.loss)
    return loss, metrics | {"temperature": jnp.exp(-tree["loss"]["log_inverse_temperature"])}
