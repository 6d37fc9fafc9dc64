"""What can be wrong with a training config, found before anything heavy starts."""

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models import embedding_width


def check(config: Config) -> None:
    """Raises UserError for values that cannot work on any machine."""
    optimizer, loss, data = config.optimizer, config.loss, config.data
    width = embedding_width(config.model)
    for bad, problem in (
        (optimizer.steps < 1, f"optimizer.steps is {optimizer.steps}; it has to be 1 or more"),
        (
            not 0 <= optimizer.warmup_steps <= optimizer.steps,
            f"optimizer.warmup_steps is {optimizer.warmup_steps}; it has to be from 0 to optimizer.steps, "
            f"{optimizer.steps}",
        ),
        (optimizer.clip_norm < 0, f"optimizer.clip_norm is {optimizer.clip_norm}; it has to be 0 (none) or more"),
        (
            not 0 < loss.min_temperature <= loss.temperature,
            f"loss.temperature is {loss.temperature}; it has to be above 0 and no less than loss.min_temperature, "
            f"{loss.min_temperature}",
        ),
        (
            loss.grad_cache_chunks < 1,
            f"loss.grad_cache_chunks is {loss.grad_cache_chunks}; it has to be 1 (all at once) or more",
        ),
        (loss.tile_mib < 0, f"loss.tile_mib is {loss.tile_mib}; it has to be 0 (all at once) or more"),
        (
            bool(loss.matryoshka) and not 0 < min(loss.matryoshka) <= max(loss.matryoshka) < width,
            f"loss.matryoshka: {loss.matryoshka} has widths that are not from 1 to less than the embedding's {width}",
        ),
        (
            min(loss.matryoshka.values(), default=1) <= 0,
            f"loss.matryoshka: {loss.matryoshka} has a weight that is not above 0",
        ),
        (config.log_every_steps < 1, f"log_every_steps is {config.log_every_steps}; it has to be 1 or more"),
        (config.checkpoint.keep < 1, f"checkpoint.keep is {config.checkpoint.keep}; it has to be 1 or more"),
        (
            config.val_every_steps > 0 and not data.val_split,
            f"val_every_steps is {config.val_every_steps}, but data.val_split names no split",
        ),
        (config.val_steps < 1, f"val_steps is {config.val_steps}; it has to be 1 or more"),
        (data.pairs < 2, f"data.pairs is {data.pairs}; contrast needs 2 or more"),
    ):
        if bad:
            raise UserError(problem)
