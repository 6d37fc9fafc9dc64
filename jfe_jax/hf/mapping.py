"""Our parameters ↔ PaliGemma's tensors in Hugging Face files: one table, read in both directions.

A torch Linear is [out, in] and knows no heads; ours is [in axes…, out axes…]. Both are the same numbers in another
order, so a tensor that goes out and comes back is the same to the bit. `{layer}` in a name stands for the index along
our stacked axis L.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jfe_jax.errors import UserError

VISION, TEXT, PROJECTOR = "vision_tower.", "language_model.model.", "multi_modal_projector."


class Entry(NamedTuple):
    """One parameter.

    Attributes:
      ours: dotted path in the model.
      theirs: name in the file, `{layer}` if stacked.
      inner: how many of our leading axes (after L) are the torch matrix's `in`; 0 if the axes stand in the same order.
      convolution: theirs is a convolution's [out, colours, y, x].
    """

    ours: str
    theirs: str
    inner: int = 0
    convolution: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the torch tensor for one layer of ours, of `shape` without L."""
        if self.convolution:
            return (shape[3], shape[2], shape[0], shape[1])
        if self.inner:
            return (_size(shape[self.inner :]), _size(shape[: self.inner]))
        return (_size(shape),) if "bias" in self.theirs else shape

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One layer's torch tensor in our order, of `shape`."""
        return self.part(shape, tuple(slice(0, size) for size in shape), tensor.__getitem__)

    def part(
        self, shape: tuple[int, ...], index: tuple[slice, ...], fetch: Callable[[tuple[slice, ...]], np.ndarray]
    ) -> np.ndarray:
        """A part of one layer of ours, for which no more of the torch tensor is read than contains it.

        Args:
          shape: of our whole layer.
          index: a slice with start and stop for each of our axes.
          fetch: gives a part of the torch tensor.
        """
        if self.convolution:
            everything = (slice(None),) * 4
            return fetch(everything).transpose(2, 3, 1, 0)[index]
        if len(shape) == len(self.their_shape(shape)) and not self.inner:
            return fetch(index)
        inner, outer = _span(shape[: self.inner], index[: self.inner]), _span(shape[self.inner :], index[self.inner :])
        if not self.inner:
            return fetch((outer.flat,)).reshape(outer.shape)[outer.rest]
        block = fetch((outer.flat, inner.flat)).T
        return block.reshape(*inner.shape, *outer.shape)[(*inner.rest, *outer.rest)]

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer of ours as a contiguous torch tensor."""
        if self.convolution:
            return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        shape = self.their_shape(array.shape)
        return np.ascontiguousarray(array.reshape(shape[::-1]).T if self.inner else array.reshape(shape))


def _linear(ours: str, theirs: str, inner: int = 1) -> Entry:
    return Entry(ours, f"{theirs}.weight", inner)


def _vision_block() -> Iterator[Entry]:
    ours, theirs = "vision.blocks.", f"{VISION}encoder.layers.{{layer}}."
    for name, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield _linear(f"{ours}attention.{name}_dnh", f"{theirs}self_attn.{short}")
        yield Entry(f"{ours}attention.{name}_bias_nh", f"{theirs}self_attn.{short}.bias")
    yield _linear(f"{ours}attention.out_nhd", f"{theirs}self_attn.out_proj", inner=2)
    yield Entry(f"{ours}attention.out_bias_d", f"{theirs}self_attn.out_proj.bias")
    for name, norm in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        yield Entry(f"{ours}{name}.scale_d", f"{theirs}{norm}.weight")
        yield Entry(f"{ours}{name}.bias_d", f"{theirs}{norm}.bias")
    for weight, bias, short in (("up_df", "up_bias_f", "fc1"), ("down_fd", "down_bias_d", "fc2")):
        yield _linear(f"{ours}{weight}", f"{theirs}mlp.{short}")
        yield Entry(f"{ours}{bias}", f"{theirs}mlp.{short}.bias")


def _text_block() -> Iterator[Entry]:
    ours, theirs = "tower.blocks.", f"{TEXT}layers.{{layer}}."
    for name, short in (("query_dnh", "q_proj"), ("key_dkh", "k_proj"), ("value_dkh", "v_proj")):
        yield _linear(f"{ours}attention.{name}", f"{theirs}self_attn.{short}")
    yield _linear(f"{ours}attention.out_nhd", f"{theirs}self_attn.o_proj", inner=2)
    for name, short in (("gate_df", "gate_proj"), ("up_df", "up_proj"), ("down_fd", "down_proj")):
        yield _linear(f"{ours}{name}", f"{theirs}mlp.{short}")
    yield Entry(f"{ours}attention_norm.scale_d", f"{theirs}input_layernorm.weight")


def _norms(**names: str) -> tuple[Entry, ...]:
    ours, theirs = "tower.blocks.", f"{TEXT}layers.{{layer}}."
    return tuple(Entry(f"{ours}{name}.scale_d", f"{theirs}{other}.weight") for name, other in names.items())


# The same name is another norm in the two: Gemma 1's comes before the MLP, Gemma 2's after attention.
_GEMMA_1 = _norms(mlp_norm="post_attention_layernorm")
_GEMMA_2 = _norms(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_COMMON: tuple[Entry, ...] = (
    Entry("vision.patch_yxcd", f"{VISION}embeddings.patch_embedding.weight", convolution=True),
    Entry("vision.patch_bias_d", f"{VISION}embeddings.patch_embedding.bias"),
    Entry("vision.position_pd", f"{VISION}embeddings.position_embedding.weight"),
    *_vision_block(),
    Entry("vision.norm.scale_d", f"{VISION}post_layernorm.weight"),
    Entry("vision.norm.bias_d", f"{VISION}post_layernorm.bias"),
    _linear("projector.kernel_cd", f"{PROJECTOR}linear"),
    Entry("projector.bias_d", f"{PROJECTOR}linear.bias"),
    Entry("embedder.table_vd", f"{TEXT}embed_tokens.weight"),
    *_text_block(),
    Entry("tower.norm.scale_d", f"{TEXT}norm.weight"),
)

# Spellings of other versions of transformers, rewritten from left to right into the table's.
_SPELLINGS = (
    (re.compile(r"^(base_model\.)?model\.(?=language_model|vision_tower|multi_modal_projector)"), ""),
    (re.compile(r"^vision_tower\.vision_model\."), VISION),
    (re.compile(r"^language_model\.(?!model\.|lm_head)"), TEXT),
)
# No weights of their own: the output matrix is the embedding table, an encoder needs neither; buffers of old files.
_IGNORED = re.compile(r"(^|\.)lm_head\.weight$|\.position_ids$|\.rotary_emb\.inv_freq$")


def canonical(name: str) -> str | None:
    """A file's tensor name as the table spells it; None if the encoder has no use for it by design."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return None if _IGNORED.search(name) else name


def prefixes(names: Iterable[str]) -> dict[str, str]:
    """How these names spell the table's VISION, TEXT and PROJECTOR; one that is spelt in several ways is left out."""
    found: dict[str, set[str]] = {}
    for name in names:
        known = canonical(name) or ""
        for root in (VISION, TEXT, PROJECTOR):
            rest = known.removeprefix(root)
            if known.startswith(root):
                found.setdefault(root, set()).add(name.removesuffix(rest))
    return {root: spellings.pop() for root, spellings in found.items() if len(spellings) == 1}


class Piece(NamedTuple):
    """One torch tensor and where it goes.

    Attributes:
      entry: its line of the table.
      layer: index along L; None if the parameter is not stacked.
      shape: of our part, without L.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]


def pieces(shapes: dict[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Every torch tensor of a model, by name.

    Args:
      shapes: shape of each of our parameters by dotted path.

    Raises:
      UserError: a parameter that the table does not know: the model has no Hugging Face layout.
    """
    table = (*_COMMON, *(_GEMMA_2 if _GEMMA_2[0].ours in shapes else _GEMMA_1))
    unknown = sorted(shapes.keys() - {entry.ours for entry in table})
    if unknown:
        raise UserError(f"no Hugging Face name for {', '.join(unknown)}; only the fusion model has a layout there")
    found = {}
    for entry in table:
        shape = shapes[entry.ours]
        for layer in range(shape[0]) if entry.stacked else (None,):
            found[entry.theirs.format(layer=layer)] = Piece(entry, layer, shape[1:] if entry.stacked else shape)
    return found


class _Span(NamedTuple):
    """A part of several axes, widened so that it is one run of them flattened: all axes but the first are whole.

    Attributes:
      flat: the run.
      shape: of what it holds.
      rest: takes the part out of that.
    """

    flat: slice
    shape: tuple[int, ...]
    rest: tuple[slice, ...]


def _span(shape: tuple[int, ...], index: tuple[slice, ...]) -> _Span:
    if not shape:
        return _Span(slice(0, 1), (), ())
    row = _size(shape[1:])
    first = index[0]
    held = (first.stop - first.start, *shape[1:])
    return _Span(slice(first.start * row, first.stop * row), held, (slice(None), *index[1:]))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
