"""A trained model as one call: items in, embeddings out.

Axes: B items, E embedding; G R S M as in data/packing.py.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jfe_jax import config as config_lib
from jfe_jax.config import Config, MeshConfig
from jfe_jax.data import packing
from jfe_jax.data.items import EncodedItem, Item
from jfe_jax.data.packing import PackedBatch
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError
from jfe_jax.sharding import batch_sharding, group_count, make_mesh, replicated

BATCH_TOKENS = 4096
PIXEL_CACHE_MIB = 256
# A batch computes a quarter, a half, three quarters or all of its image slots, whichever is enough.
_SLOT_STEPS = 4


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
        self._encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
        self._pixels: collections.OrderedDict[Path, np.ndarray] = collections.OrderedDict()
        self._forward = jax.jit(lambda params, packed: nnx.merge(graphdef, params)(packed))
        row_tokens = max(config.data.row_tokens, self._encoder.longest)
        self._rows = max(1, BATCH_TOKENS // row_tokens)
        shortest_with_image = config.model.vision.patches + 2
        # Where an image takes no tokens, as many as would fit if it did.
        dual = config.model.kind == "dual"
        slots = BATCH_TOKENS // shortest_with_image if dual else self._rows * (row_tokens // shortest_with_image)
        self._shape = {
            "groups": group_count(self.mesh),
            "items_per_group": self._rows * row_tokens // 8,
            "rows": self._rows,
            "row_tokens": row_tokens,
            "image_slots": max(1, slots),
            "image_size": config.model.vision.image_size,
        }

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
            from jfe_jax.blueprint import blueprint, shardings_of
            from jfe_jax.hf.load import load_hf

            config, params = load_hf(path)
            plan = blueprint(config.model, mesh)
            # On the devices once, not at every call.
            params = nnx.State(jax.device_put(nnx.to_pure_dict(params), shardings_of(plan.abstract)))
            return cls(config, plan.graphdef, params, path=path, mesh=mesh)
        from jfe_jax import checkpoint

        loaded = checkpoint.load_model(path, mesh)
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
        return self._encoder.cut_texts

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
        # Items of one modality side by side: a batch of texts then computes no image slots.
        order = np.array(sorted(range(len(items)), key=lambda number: items[number].modality), np.int64)
        embeddings = None
        waiting: collections.deque = collections.deque()

        def take_first():
            nonlocal embeddings
            rows, places, numbers = waiting.popleft()
            rows = np.asarray(rows, np.float32)
            if embeddings is None:
                embeddings = np.zeros((len(items), rows.shape[-1]), np.float32)
            embeddings[numbers] = rows[places]
            if progress:
                progress(len(numbers))

        for packed, numbers in packing.batches(self._encoded(items, order, names), **self._shape):
            places = np.nonzero(numbers >= 0)
            chosen = order[numbers[places]]
            waiting.append((self._embed(packed, alone=len(chosen) == len(items)), places, chosen))
            # The next batch is read and packed while the device computes this one.
            if len(waiting) > 1:
                take_first()
        while waiting:
            take_first()
        return np.zeros((0, self.width), np.float32) if embeddings is None else embeddings

    @property
    def width(self) -> int:
        """E."""
        from jfe_jax.models import embedding_width

        return embedding_width(self.config.model)

    def _encoded(
        self, items: Sequence[Item], order: Sequence[int], names: Sequence[str] | None
    ) -> Iterator[EncodedItem]:
        for number in order:
            item = items[number]
            name = names[number] if names is not None else f"item {number}"
            if item.image is None and not item.text and not item.instruction:
                raise UserError(f"{name}: neither text nor image; give it one of them")
            pixels = None if item.image is None else self._pixels_of(item.image, name)
            yield EncodedItem(self._encoder.tokens(item.text, item.instruction, pixels is not None), pixels)

    def _pixels_of(self, image: bytes | Path | np.ndarray, name: str) -> np.ndarray:
        if isinstance(image, bytes | np.ndarray):
            return self._encoder.pixels(image, name)
        pixels = self._pixels.get(image)
        if pixels is None:
            pixels = self._pixels[image] = self._encoder.pixels(image, name)
            if len(self._pixels) * pixels.nbytes > PIXEL_CACHE_MIB * 2**20:
                self._pixels.popitem(last=False)
        else:
            self._pixels.move_to_end(image)
        return pixels

    def _embed(self, packed: PackedBatch, alone: bool) -> jax.Array:
        """[G, B, E] of a batch that holds all items there are (`alone`), or some of them."""
        if self._alone is not None and not packed.valid[1:].any():
            # Groups are filled one after the other: the last batch seldom needs them all.
            first = jax.tree.map(lambda part: part[:1], packed)
            return self._forward(self._alone, self._trimmed(first, alone))
        with jax.set_mesh(self.mesh):
            return self._forward(self._params, jax.device_put(self._trimmed(packed), batch_sharding(self.mesh)))

    def _trimmed(self, packed: PackedBatch, alone: bool = False) -> PackedBatch:
        """Fewer image slots, and fewer rows for a call that needs only one; few shapes in all, so few compilations."""
        rows, row_tokens = packed.tokens.shape[1:]
        slots = packed.pixels.shape[1]
        used = int((packed.image_start < rows * row_tokens).sum(1).max())
        step = -(-slots // _SLOT_STEPS)
        if alone and not packed.segments[:, 1:].any():
            rows, step = 1, max(1, row_tokens // (self.config.model.vision.patches + 2))
        kept = max(1, min(slots, -(-used // step) * step))
        return packed._replace(
            tokens=packed.tokens[:, :rows],
            segments=packed.segments[:, :rows],
            positions=packed.positions[:, :rows],
            pixels=packed.pixels[:, :kept],
            image_start=np.minimum(packed.image_start[:, :kept], rows * row_tokens),
        )
