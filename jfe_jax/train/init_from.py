"""What a run starts from: the weights of another, with or without adapters on either side."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from jfe_jax.checkpoint import base_model, model_io
from jfe_jax.checkpoint.base_model import BaseModelRef
from jfe_jax.checkpoint.streaming import read_stored_names
from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.train.train_state import TrainSetup
from jfe_jax.utils import pytrees


class InitialWeights(NamedTuple):
    """Weights before step 0.

    Attributes:
      params: plain dict of the model's parameters; fresh adapters are not among them.
      base: what this run's adapters stand on; None without adapters.
      message: what is worth telling a person, or "".
    """

    params: dict[str, Any]
    base: BaseModelRef | None
    message: str = ""


def load_initial_weights(init: str, training: TrainSetup) -> InitialWeights:
    """Opens the checkpoint `init` as the start of a run.

    Adapters with the same settings (`model.lora`) on both sides are trained on, over the same base. Any others of
    `init` are merged into its weights, and the run's own, if it has any, are fresh ones on top.

    Raises:
      UserError: no readable checkpoint at `init`; or one of another model, whose differing keys are listed; or one that
        trained parameters which this run would neither train nor keep.
    """
    wanted = training.config.model

    def validate(config: Config, place: Path) -> None:
        model_io.check_same_model(replace(config.model, lora=wanted.lora), wanted, str(place))

    loaded = model_io.load_model(init, training.mesh, validate=validate)
    own, params = loaded.config.model.lora, nnx.to_pure_dict(loaded.params)
    run = loaded.tokenizer_dir.parent
    place = run / model_io.CHECKPOINTS / str(loaded.step)
    if own == wanted.lora:
        if not own.rank:
            return InitialWeights(params, None)
        kept = pytrees.flatten(pytrees.select(training.abstract.params, training.checkpointed_mask))
        lost = [name for name in read_stored_names(place / "params") if name not in kept]
        if lost:
            raise UserError(
                f"{place}: trained {', '.join(lost)}, which this run would not keep; add them to optimizer.train, or "
                "change model.lora so that they are merged"
            )
        return InitialWeights(params, base_model.read_base_ref(run), f"{init}: its adapters are trained on")
    base_ref = BaseModelRef(place.absolute(), base_model.fingerprint_params(params)) if wanted.lora.rank else None
    if not own.rank:
        return InitialWeights(params, base_ref)
    return InitialWeights(lora.merge(params, own), base_ref, f"{init}: its adapters are merged into the weights")
