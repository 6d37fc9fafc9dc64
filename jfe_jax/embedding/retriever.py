"""A trained model as one call: items in, embeddings out.

Axes: B items, E embedding; G R S M as in data/packing.py.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jfe_jax import config as config_lib
from jfe_jax.config import Config, MeshConfig
from jfe_jax.data.batch import PackedBatch
from jfe_jax.data.item import Item
from jfe_jax.embedding.batch_shapes import ACCELERATOR, CPU
from jfe_jax.embedding.batching import BatchMaker
from jfe_jax.models.layers.blocks import apart, together
from jfe_jax.parallel.sharding import batch_sharding, group_count, make_mesh, replicated
from jfe_jax.utils.background_iterator import prefetch

_BATCHES_AHEAD = 2


class Retriever:
    """Embeds items with a trained model, on all devices of this process: each has its groups of every batch.

    Attributes:
      mesh: the devices.
      config: the model's resolved configuration.
      path, step: where it was loaded from, and the training step it was saved at.
      fingerprint: 16 hex digits that change with the weights, the architecture or the tokenizer.
    """

    def __init__(
        self,
        config: Config,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        *,
        path: Path,
        step: int = 0,
        mesh: Mesh | None = None,
    ):
        self.config, self.path, self.step = config, Path(path), step
        self._graphdef = graphdef
        self.mesh = mesh or make_mesh(MeshConfig(data=-1), jax.local_devices())
        devices = set(self.mesh.devices.flat)
        leaves = jax.tree.leaves(params)
        if any(not isinstance(leaf, jax.Array) or leaf.sharding.device_set != devices for leaf in leaves):
            params = jax.device_put(params, replicated(self.mesh))
        self._params, self._alone = params, None
        if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            # The same weights as the first device has them: what fits into one group runs there.
            self._alone = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, params)
        on_cpu = self.mesh.devices.flat[0].platform == "cpu" and config.model.attention != "splash"
        if on_cpu and self._alone is not None:
            self._alone = apart(self._alone)
        self._batches = BatchMaker(config, group_count(self.mesh), CPU if on_cpu else ACCELERATOR)
        self._forward = jax.jit(lambda params, packed: nnx.merge(graphdef, together(params))(packed))

    @classmethod
    def load(cls, path: str | Path, mesh: Mesh | None = None) -> "Retriever":
        """Opens a run directory, one of its step directories, or a Hugging Face directory.

        Args:
          mesh: of this process's devices; if not given, each of them has all of the model. One that no device holds
            alone needs `sharding.make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())`.

        Raises:
          UserError: there is no model at `path`, or it does not fit its configuration.
        """
        path = Path(path)
        mesh = mesh or make_mesh(MeshConfig(data=-1), jax.local_devices())
        if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
            from jfe_jax.hf.load import load_hf
            from jfe_jax.models.abstract_model import blueprint, shardings_of

            config, params = load_hf(path)
            plan = blueprint(config.model, mesh)
            # On the devices once, not at every call.
            params = nnx.State(jax.device_put(nnx.to_pure_dict(params), shardings_of(plan.abstract)))
            return cls(config, plan.graphdef, params, path=path, mesh=mesh)
        from jfe_jax.checkpoint import model_io

        loaded = model_io.load_model(path, mesh)
        tokens = dataclasses.replace(loaded.config.tokens, tokenizer=str(loaded.tokenizer_dir))
        own = dataclasses.replace(loaded.config, tokens=tokens)
        return cls(own, loaded.graphdef, loaded.params, path=path, step=loaded.step, mesh=mesh)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the architecture, the tokenizer and every weight."""
        # How it is computed does not change what it is.
        model = dataclasses.replace(self.config.model, remat="none", dtype="float32")
        digest = hashlib.sha256(config_lib.to_yaml(model).encode())
        digest.update((Path(self.config.tokens.tokenizer) / "tokenizer.json").read_bytes())
        settings = dataclasses.replace(self.config.tokens, tokenizer="")
        digest.update(config_lib.to_yaml(settings).encode())
        for name, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(self._params)):
            digest.update(f"{jax.tree_util.keystr(name)} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf, np.float32))
        return digest.hexdigest()[:16]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

    @property
    def cut_texts(self) -> int:
        """Texts cut to `tokens.max_text_tokens` so far."""
        return self._batches.encoder.cut_texts

    def encode(
        self,
        items: Sequence[Item],
        *,
        names: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """float32 [B, E]: unit rows, in the order of `items`.

        Args:
          items: what to embed.
          names: what errors call each item; its number if not given.
          progress: called with the number of items done since its last call.

        Raises:
          UserError: an item is empty or its image cannot be read.
        """
        embeddings = np.zeros((len(items), self.width), np.float32)
        waiting: collections.deque = collections.deque()

        def take_first():
            rows, places, numbers = waiting.popleft()
            embeddings[numbers] = np.asarray(rows, np.float32)[places]
            if progress:
                progress(len(numbers))

        # The next batches are read and packed while the devices compute this one.
        for packed, numbers in prefetch(self._batches.batches(items, names), _BATCHES_AHEAD):
            places = np.nonzero(numbers >= 0)
            waiting.append((self._embed(packed), places, numbers[places]))
            if len(waiting) > 1:
                take_first()
        while waiting:
            take_first()
        return embeddings

    @property
    def width(self) -> int:
        """E."""
        from jfe_jax.models.registry import embedding_width

        return embedding_width(self.config.model)

    def _embed(self, packed: PackedBatch) -> jax.Array:
        """[G, B, E]; [1, B, E] of a batch whose items all are in the first group."""
        if self._alone is not None and not packed.valid[1:].any():
            # Groups are filled one after the other: the last batch seldom needs them all.
            return self._forward(self._alone, jax.tree.map(lambda part: part[:1], packed))
        with jax.set_mesh(self.mesh):
            return self._forward(self._params, jax.device_put(packed, batch_sharding(self.mesh)))
