"""Learning rate by step."""

import optax

from jfe_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Warm-up in a straight line to `learning_rate`, then cosine, line or constant to `end_fraction` of it.

    Step 0 already moves: the warm-up's first value is learning_rate / warmup_steps. The last value is reached at
    `steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(config.steps - warmup, 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * config.end_fraction, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])
