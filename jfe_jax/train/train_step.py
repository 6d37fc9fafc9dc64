"""One optimizer step, and the loss without one, as compiled functions over (state, batch)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jfe_jax.data.batch import ContrastiveBatch, PackedBatch
from jfe_jax.losses import contrastive
from jfe_jax.losses.contrastive import Metrics
from jfe_jax.models.abstract_model import shardings_of
from jfe_jax.parallel import sharding
from jfe_jax.train import grad_cache
from jfe_jax.train.optimizer import trained_mask
from jfe_jax.train.schedules import learning_rate
from jfe_jax.train.train_state import TrainSetup, TrainState, trainable


def make_train_step(training: TrainSetup) -> Callable[[TrainState, ContrastiveBatch], tuple[TrainState, Metrics]]:
    """Compiled step: (state, batch on the mesh) → (next state, metrics); the old state's memory is reused.

    If loss or gradients are not finite, parameters and optimizer stay as they are, and `state.skipped` counts it.

    The batch is as `sharding.put_batch` lays it out for `loss.grad_cache_chunks`.

    Metrics are float32 scalars, those of `losses.contrastive_loss` (before the update) and "temperature",
    "learning_rate", "gradient_norm" (of what is trained, before clipping), "skipped" (steps until now) and
    "skipped_in_row".
    """
    config, rate = training.config, learning_rate(training.config.optimizer)
    trained = trained_mask(config, training.model.axes)

    def step(state: TrainState, batch: ContrastiveBatch) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(training.mesh.abstract_mesh):
            tree = trainable(state.params, state.loss)
            grads, metrics = gradients(training, tree, batch, trained)
            # The optimizer's tree is the whole one; what it is given for the frozen ones is not looked at.
            whole = combine(grads, jax.tree.map(lambda _: jnp.zeros(()), tree))
            updates, optimizer = training.optimizer.update(whole, state.optimizer, tree)
            updates, moving = partition(updates, trained), partition(tree, trained)
            tree = combine(optax.apply_updates(moving, updates), tree)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        after = (tree["model"], contrastive.clamp(tree["loss"], config.loss), optimizer)
        before = (state.params, state.loss, state.optimizer)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        total, in_row = state.skipped[0] + ~finite, jnp.where(finite, 0, state.skipped[1] + 1)
        metrics |= {
            # The schedule counts the steps that were taken.
            "learning_rate": jnp.float32(rate(state.step - state.skipped[0])),
            "gradient_norm": norm,
            "skipped": total.astype(jnp.float32),
            "skipped_in_row": in_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, jnp.stack([total, in_row]), *after), metrics

    state = shardings_of(training.abstract)
    return jax.jit(
        step,
        in_shardings=(state, sharding.batch_sharding(training.mesh, config.loss.grad_cache_chunks)),
        out_shardings=(state, sharding.replicated(training.mesh)),
        donate_argnums=0,
    )


def compile_ahead(step: Callable[..., Any], *abstract: Any) -> Future[Any]:
    """Traces a compiled function here and compiles it in a thread, while the caller makes or reads its arguments.

    A call with arguments like the abstract ones finds the program there. The result is what the compiler raised.
    """
    lowered = step.lower(*abstract)
    pool = ThreadPoolExecutor(1, "compile")
    try:
        return pool.submit(lowered.compile)
    finally:
        pool.shutdown(wait=False)


def make_eval_step(training: TrainSetup) -> Callable[[TrainState, ContrastiveBatch], Metrics]:
    """Compiled loss: (state, batch on the mesh) → metrics of `losses.contrastive_loss`."""

    def step(state: TrainState, batch: ContrastiveBatch) -> Metrics:
        with jax.sharding.use_abstract_mesh(training.mesh.abstract_mesh):
            return loss_of(training, trainable(state.params, state.loss), batch)[1]

    return jax.jit(
        step,
        in_shardings=(
            shardings_of(training.abstract),
            sharding.batch_sharding(training.mesh, training.config.loss.grad_cache_chunks),
        ),
        out_shardings=sharding.replicated(training.mesh),
    )


def gradients(
    training: TrainSetup, tree: dict[str, Any], batch: ContrastiveBatch, trained: dict[str, Any]
) -> tuple[dict[str, Any], Metrics]:
    """Gradients, None where `trained` says that a leaf stays, and metrics; to be traced under a mesh in context.

    Nothing of the others' gradients is computed or kept.
    """
    moving = partition(tree, trained)
    if training.config.loss.grad_cache_chunks == 1:
        return jax.grad(lambda moving: loss_of(training, combine(moving, tree), batch), has_aux=True)(moving)
    shardings = partition(shardings_of(training.abstract.params), trained["model"])
    to_model, to_loss, metrics = grad_cache.gradients(
        lambda moving, packed: encode(training, combine(moving, tree["model"]), packed),
        lambda loss, embeddings: loss_from_embeddings(training, combine(loss, tree["loss"]), embeddings, batch),
        moving["model"],
        moving["loss"],
        batch.packed,
        # Each device carries its own share of the sum.
        lambda total: jax.lax.with_sharding_constraint(total, shardings),
    )
    return trainable(to_model, to_loss), metrics


def loss_of(training: TrainSetup, tree: dict[str, Any], batch: ContrastiveBatch) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of the tree that is trained (`state.trainable`); to be traced under a mesh in context."""
    if training.config.loss.grad_cache_chunks == 1:
        embeddings = encode(training, tree["model"], batch.packed)
    else:
        embeddings = jax.lax.map(lambda packed: encode(training, tree["model"], packed), batch.packed)
    return loss_from_embeddings(training, tree["loss"], embeddings, batch)


def encode(training: TrainSetup, params: dict[str, Any], packed: PackedBatch) -> jax.Array:
    """Embeddings float32 [G, B, E] of a batch, or of a chunk of one."""
    return sharding.constrain(nnx.merge(training.model.graphdef, params)(packed), ("group", None, "embed"))


def loss_from_embeddings(
    training: TrainSetup, parameters: dict[str, jax.Array], embeddings: jax.Array, batch: ContrastiveBatch
) -> tuple[jax.Array, Metrics]:
    """Loss and metrics from embeddings [G, B, E], or with the chunks in front, as the batch has them."""
    chunked = training.config.loss.grad_cache_chunks > 1
    n = batch.positive_ids.shape[-2]
    at = batch.positive_ids.ndim - 2

    def part(x: jax.Array, start: int, stop: int) -> jax.Array:
        # [(K,) G, …] → [G, (K ·) …]: some of each group's; a device's groups stay with it.
        x = jax.lax.slice_in_dim(x, start, stop, axis=at)
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) if chunked else x

    def candidates(x: jax.Array, start: int = 0) -> jax.Array:
        # The positives of all chunks, then the negatives of all.
        return jnp.concatenate([part(x, start, start + n), part(x, start + n, x.shape[at])], axis=1)

    pairs = contrastive.ContrastiveInputs(
        part(embeddings, 0, n),
        candidates(embeddings, n),
        candidates(batch.candidate_ids),
        candidates(batch.candidate_modality),
        part(batch.positive_ids, 0, n),
        part(batch.packed.valid, 0, n),
        candidates(batch.packed.valid, n),
    )
    loss, metrics = contrastive.contrastive_loss(pairs, parameters, training.config.loss)
    return loss, metrics | {"temperature": jnp.exp(-parameters["log_inverse_temperature"])}


def partition(tree: Any, trained: Any) -> Any:
    """The leaves that move, None in place of the others."""
    return jax.tree.map(lambda leaf, moves: leaf if moves else None, tree, trained)


def combine(part: Any, whole: Any) -> Any:
    """`part` with the leaves of `whole` where it has None."""
    return jax.tree.map(lambda own, other: other if own is None else own, part, whole, is_leaf=lambda x: x is None)
