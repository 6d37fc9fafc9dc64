"""What can be wrong with a training config, found before anything heavy starts."""

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models.registry import get_backbone
from jfe_jax.utils.local_paths import require_checkpoint_path


def check(config: Config) -> None:
    """Raises UserError for values that cannot work on any machine."""
    require_checkpoint_path(config.output, "output")
    optimizer, loss, data, checkpoint = config.optimizer, config.loss, config.data, config.checkpoint
    backbone = get_backbone(config.model)
    width = backbone.embedding_width(config.model)
    own_temperature = loss.temperature == 0 and backbone.own_temperature
    for bad, problem in (
        (optimizer.steps < 1, f"optimizer.steps is {optimizer.steps}; it has to be 1 or more"),
        (
            not 0 <= optimizer.warmup_steps <= optimizer.steps,
            f"optimizer.warmup_steps is {optimizer.warmup_steps}; it has to be from 0 to optimizer.steps, "
            f"{optimizer.steps}",
        ),
        (
            not 0 < optimizer.decay_fraction <= 1,
            f"optimizer.decay_fraction is {optimizer.decay_fraction}; it has to be above 0 and at most 1",
        ),
        (
            optimizer.second_moment_dtype == "bfloat16" and optimizer.b2 > 0.99,
            f"optimizer.b2 is {optimizer.b2}, but a second moment in bfloat16 cannot hold changes of less than 0.4 %; "
            "lower it to 0.99 or less, or set optimizer.second_moment_dtype to float32",
        ),
        (
            optimizer.max_skipped_steps < 1,
            f"optimizer.max_skipped_steps is {optimizer.max_skipped_steps}; it has to be 1 (stop at the first) or more",
        ),
        (
            min(optimizer.learning_rate_factors.values(), default=0) < 0,
            f"optimizer.learning_rate_factors: {optimizer.learning_rate_factors} has a factor below 0",
        ),
        (optimizer.clip_norm < 0, f"optimizer.clip_norm is {optimizer.clip_norm}; it has to be 0 (none) or more"),
        (
            loss.min_temperature <= 0 or not (own_temperature or loss.temperature >= loss.min_temperature),
            f"loss.temperature is {loss.temperature}; it has to be above 0 and no less than loss.min_temperature, "
            f"{loss.min_temperature}",
        ),
        (
            loss.grad_cache_chunks < 1,
            f"loss.grad_cache_chunks is {loss.grad_cache_chunks}; it has to be 1 (all at once) or more",
        ),
        (loss.tile_mib <= 0, f"loss.tile_mib is {loss.tile_mib}; it has to be above 0"),
        (loss.keep_mib < 0, f"loss.keep_mib is {loss.keep_mib}; it has to be 0 (none) or more"),
        (
            bool(loss.matryoshka) and not 0 < min(loss.matryoshka) <= max(loss.matryoshka) < width,
            f"loss.matryoshka: {loss.matryoshka} has widths that are not from 1 to less than the embedding's {width}",
        ),
        (
            min(loss.matryoshka.values(), default=1) <= 0,
            f"loss.matryoshka: {loss.matryoshka} has a weight that is not above 0",
        ),
        (config.log_every_steps < 1, f"log_every_steps is {config.log_every_steps}; it has to be 1 or more"),
        (checkpoint.keep < 1, f"checkpoint.keep is {checkpoint.keep}; it has to be 1 or more"),
        (
            checkpoint.keep_every_steps < 0
            or checkpoint.keep_every_steps % (checkpoint.every_steps or optimizer.steps) != 0,
            f"checkpoint.keep_every_steps is {checkpoint.keep_every_steps}; it has to be 0 (none) or a multiple of "
            f"checkpoint.every_steps, {checkpoint.every_steps}",
        ),
        (checkpoint.keep_best < 0, f"checkpoint.keep_best is {checkpoint.keep_best}; it has to be 0 (none) or more"),
        (
            checkpoint.keep_best > 0 and not data.val_split,
            f"checkpoint.keep_best is {checkpoint.keep_best}, but data.val_split names no split to tell the best on",
        ),
        (
            config.val_every_steps > 0 and not data.val_split,
            f"val_every_steps is {config.val_every_steps}, but data.val_split names no split",
        ),
        (config.val_steps < 1, f"val_steps is {config.val_steps}; it has to be 1 or more"),
        (
            config.model.lora.rank > 0 and not config.init,
            "model.lora: adapters stand on trained weights; give a checkpoint as init",
        ),
        (
            bool(data.bins) and not backbone.bins,
            "data.bins: this backbone's attention does not work on bins; leave them out",
        ),
        (data.pairs < 2, f"data.pairs is {data.pairs}; contrast needs 2 or more"),
    ):
        if bad:
            raise UserError(problem)
