"""Learning rate by step."""

import optax

from jfe_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Warm-up in a straight line to `learning_rate`, then cosine, line, constant or WSD to `end_fraction` of it.

    Step 0 already moves: the warm-up's first value is learning_rate / warmup_steps. The last value is reached at
    `steps`. "wsd" (warm-up, stable, decay: Hu et al. 2024, "MiniCPM", 4.1) stays up until `decay_fraction` of all steps
    are left, and then goes down in a line.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    end, decay_steps = peak * config.end_fraction, max(config.steps - warmup, 1)
    last = min(max(round(config.steps * config.decay_fraction), 1), decay_steps)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(peak, end, last, transition_begin=decay_steps - last),
    }[config.schedule]()
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])
