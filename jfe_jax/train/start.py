"""What a run starts from: the weights of another, with or without adapters on either side."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from jfe_jax import base, checkpoint, trees
from jfe_jax.base import Base
from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.streaming import stored_names
from jfe_jax.train.state import Training


class Start(NamedTuple):
    """Weights before step 0.

    Attributes:
      params: plain dict of the model's parameters; fresh adapters are not among them.
      base: what this run's adapters stand on; None without adapters.
      note: what is worth telling a person, or "".
    """

    params: dict[str, Any]
    base: Base | None
    note: str = ""


def start_from(init: str, training: Training) -> Start:
    """Opens the checkpoint `init` as the start of a run.

    Adapters with the same settings (`model.lora`) on both sides are trained on, over the same base. Any others of
    `init` are merged into its weights, and the run's own, if it has any, are fresh ones on top.

    Raises:
      UserError: no readable checkpoint at `init`; or one of another model, whose differing keys are listed; or one that
        trained parameters which this run would neither train nor keep.
    """
    wanted = training.config.model

    def accept(config: Config, place: Path) -> None:
        checkpoint.refuse_other_model(replace(config.model, lora=wanted.lora), wanted, str(place))

    loaded = checkpoint.load_model(init, training.mesh, accept=accept)
    own, params = loaded.config.model.lora, nnx.to_pure_dict(loaded.params)
    run = loaded.tokenizer_dir.parent
    place = run / checkpoint.CHECKPOINTS / str(loaded.step)
    if own == wanted.lora:
        if not own.rank:
            return Start(params, None)
        kept = trees.flatten(trees.select(training.abstract.params, training.kept))
        lost = [name for name in stored_names(place / "params") if name not in kept]
        if lost:
            raise UserError(
                f"{place}: trained {', '.join(lost)}, which this run would not keep; add them to optimizer.train, or "
                "change model.lora so that they are merged"
            )
        return Start(params, base.read(run), f"{init}: its adapters are trained on")
    stands_on = Base(place.absolute(), base.fingerprint(params)) if wanted.lora.rank else None
    if not own.rank:
        return Start(params, stands_on)
    return Start(lora.merge(params, own), stands_on, f"{init}: its adapters are merged into the weights")
