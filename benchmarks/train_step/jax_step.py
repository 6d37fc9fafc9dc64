"""Our side of `train-step`: the product's own step on batches that its own packer filled."""

from typing import Any

import jax
import numpy as np
import optax

from benchmarks.train_step import weights
from jfe_jax.config import Config, MeshConfig
from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.hf.mapping import Piece
from jfe_jax.parallel import sharding
from jfe_jax.train import train_state as states
from jfe_jax.train.train_step import make_train_step
from jfe_jax.utils.pytrees import flatten


class Step:
    """A run's state on one device; `step(batch)` takes one step of `train.step`."""

    def __init__(self, config: Config):
        mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.training = states.make_train_setup(config, mesh)
        self.shapes = weights.shapes_of(self.training.model.abstract)
        self.state = states.init_train_state(self.training, weights.for_jax(self.training.model.abstract))
        self._step = make_train_step(self.training)

    def put(self, batch: ContrastiveBatch) -> ContrastiveBatch:
        """A batch on the device."""
        return jax.block_until_ready(sharding.put_batch(batch, self.training.mesh))

    def step(self, batch: ContrastiveBatch) -> tuple[jax.Array, jax.Array]:
        """Loss, and the norm of the gradients before clipping."""
        self.state, metrics = self._step(self.state, batch)
        return metrics["loss"], metrics["gradient_norm"]

    def wait(self) -> None:
        """Until the last step is done, its update included."""
        jax.block_until_ready(self.state)

    def peak(self) -> int:
        """Bytes of the device's memory, at most until now; 0 where nobody counts them."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    def name(self) -> str:
        """The device's."""
        return jax.devices()[0].device_kind

    def parameter(self, piece: Piece) -> np.ndarray:
        """One tensor of the weights as they are now."""
        return self._part(self.state.params, piece)

    def moment(self, piece: Piece) -> np.ndarray:
        """One tensor of Adam's first moment: after one step, 1 - b1 of the clipped gradient."""
        return self._part(optax.tree.get(self.state.optimizer, "mu")["model"], piece)

    def _part(self, tree: dict[str, Any], piece: Piece) -> np.ndarray:
        leaf = flatten(tree)[piece.entry.ours]
        return np.asarray(leaf if piece.layer is None else leaf[piece.layer])
