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

from jfe_jax import config as config_lib
from jfe_jax.config import Config
from jfe_jax.data import packing
from jfe_jax.data.items import EncodedItem, Item
from jfe_jax.data.packing import PackedBatch
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError

BATCH_TOKENS = 4096
PIXEL_CACHE_MIB = 256
# A batch computes a quarter, a half, three quarters or all of its image slots, whichever is enough.
_SLOT_STEPS = 4
_FINGERPRINT_SAMPLES = 4096


class Retriever:
    """Embeds items with a trained model.

    Attributes:
      config: the model's resolved configuration.
      path, step: where it was loaded from, and the training step it was saved at.
      fingerprint: 16 hex digits that change with the weights, the architecture or the tokenizer.
    """

    def __init__(self, config: Config, graphdef: nnx.GraphDef, params: nnx.State, *, path: Path, step: int = 0):
        self.config, self.path, self.step = config, Path(path), step
        self._graphdef, self._params = graphdef, params
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
            "groups": 1,
            "items_per_group": self._rows * row_tokens // 8,
            "rows": self._rows,
            "row_tokens": row_tokens,
            "image_slots": max(1, slots),
            "image_size": config.model.vision.image_size,
        }

    @classmethod
    def load(cls, path: str | Path) -> "Retriever":
        """Opens a run directory, one of its step directories, or a Hugging Face directory.

        Raises:
          UserError: there is no model at `path`, or it does not fit its configuration.
        """
        path = Path(path)
        if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
            from jfe_jax.hf.load import load_hf
            from jfe_jax.models import build_model

            config, params = load_hf(path)
            graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))
            # On the device once, not at every call.
            return cls(config, graphdef, jax.tree.map(jax.numpy.asarray, params), path=path)
        from jfe_jax import checkpoint

        loaded = checkpoint.load_model(path)
        tokens = dataclasses.replace(loaded.config.tokens, tokenizer=str(loaded.tokenizer_dir))
        own = dataclasses.replace(loaded.config, tokens=tokens)
        return cls(own, loaded.graphdef, loaded.params, path=path, step=loaded.step)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the architecture, the tokenizer and a fixed sample of every weight."""
        # How it is computed does not change what it is.
        model = dataclasses.replace(self.config.model, remat="none", dtype="float32")
        digest = hashlib.sha256(config_lib.to_yaml(model).encode())
        digest.update((Path(self.config.tokens.tokenizer) / "tokenizer.json").read_bytes())
        settings = dataclasses.replace(self.config.tokens, tokenizer="")
        digest.update(config_lib.to_yaml(settings).encode())
        for name, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(self._params)):
            flat = leaf.reshape(-1)
            stride = max(1, flat.size // _FINGERPRINT_SAMPLES)
            digest.update(f"{jax.tree_util.keystr(name)} {leaf.shape}".encode())
            digest.update(np.asarray(flat[::stride], np.float32).tobytes())
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
        order = sorted(range(len(items)), key=lambda number: items[number].modality)
        embeddings = None
        waiting: collections.deque = collections.deque()

        def take_first():
            nonlocal embeddings
            rows, places, numbers = waiting.popleft()
            rows = np.asarray(rows, np.float32)[0]
            if embeddings is None:
                embeddings = np.zeros((len(items), rows.shape[-1]), np.float32)
            embeddings[numbers] = rows[places]
            if progress:
                progress(len(numbers))

        for packed, numbers in packing.batches(self._encoded(items, order, names), **self._shape):
            places = np.flatnonzero(numbers[0] >= 0)
            chosen = np.array(order, np.int64)[numbers[0][places]]
            packed = self._trimmed(packed, alone=len(places) == len(items))
            waiting.append((self._forward(self._params, packed), places, chosen))
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
        if not isinstance(image, Path):
            return self._encoder.pixels(image, name)
        pixels = self._pixels.get(image)
        if pixels is None:
            pixels = self._pixels[image] = self._encoder.pixels(image, name)
            if len(self._pixels) * pixels.nbytes > PIXEL_CACHE_MIB * 2**20:
                self._pixels.popitem(last=False)
        else:
            self._pixels.move_to_end(image)
        return pixels

    def _trimmed(self, packed: PackedBatch, alone: bool) -> PackedBatch:
        """Fewer image slots, and fewer rows for a call that needs only one; few shapes in all, so few compilations."""
        rows, row_tokens = packed.tokens.shape[1:]
        slots = packed.pixels.shape[1]
        used = int((packed.image_start[0] < rows * row_tokens).sum())
        step = -(-slots // _SLOT_STEPS)
        if alone and not packed.segments[0, 1:].any():
            rows, step = 1, max(1, row_tokens // (self.config.model.vision.patches + 2))
        kept = max(1, min(slots, -(-used // step) * step))
        return packed._replace(
            tokens=packed.tokens[:, :rows],
            segments=packed.segments[:, :rows],
            positions=packed.positions[:, :rows],
            pixels=packed.pixels[:, :kept],
            image_start=np.minimum(packed.image_start[:, :kept], rows * row_tokens),
        )
