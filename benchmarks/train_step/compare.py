"""Checks that both sides of `train-step` compute the same before they are timed."""

from typing import Any, NamedTuple

import numpy as np

from benchmarks.train_step import weights
from benchmarks.train_step.workload import Batch
from jfe_jax.errors import UserError


class Agreement(NamedTuple):
    """Relative differences of the two sides: losses and gradient norms of `STEPS` steps (largest), the gradients of
    all parameters, and the weights after a step as a share of what the step changed."""

    loss: float
    norm: float
    gradients: float
    weights: float


# Rounding of float32 through some layers; what differs by more is another computation. Where a gradient is rounding
# only (a key's bias has none), Adam's first step goes either way: hence the weights'.
STEPS, LIMITS = 2, Agreement(1e-4, 1e-3, 1e-3, 3e-2)


def compare(ours: Any, theirs: Any, made: list[Batch]) -> Agreement:
    """Takes `STEPS` steps on both sides.

    Args:
      ours, theirs: a `step_jax.Step`, a `step_torch.Step`.
      made: batches.

    Raises:
      UserError: they differ by more than LIMITS: what would be timed is not the same.
    """
    losses, norms = [], []
    for number in range(STEPS):
        batch = made[number % len(made)]
        pair = ours.step(ours.put(batch.packed)), theirs.step(theirs.put(batch.padded))
        losses.append([float(loss) for loss, _ in pair])
        norms.append([float(norm) for _, norm in pair])
        if number == 0:
            gradients, weights = _differences(ours, theirs)
    found = Agreement(*(max(abs(b / a - 1) for a, b in both) for both in (losses, norms)), gradients, weights)
    if not all(one <= limit for one, limit in zip(found, LIMITS, strict=True)):
        raise UserError(f"the two sides do not compute the same: {found}, allowed {LIMITS}")
    return found


def _differences(ours: Any, theirs: Any) -> tuple[float, float]:
    # Relative to the gradients, and to what the step changed: about the learning rate each.
    apart = size = moved = count = 0.0
    for parameter, piece in weights.pieces(theirs.model, ours.shapes):
        their_moment = weights.ours(piece, theirs.optimizer.state[parameter]["exp_avg"]).numpy()
        apart += float(((ours.moment(piece) - their_moment) ** 2).sum())
        size += float((their_moment**2).sum())
        difference = ours.parameter(piece) - weights.ours(piece, parameter.detach()).numpy()
        moved += float((difference**2).sum())
        count += float(np.count_nonzero(their_moment))
    rate = ours.training.config.optimizer.learning_rate
    return (apart / size) ** 0.5, (moved / count) ** 0.5 / rate
