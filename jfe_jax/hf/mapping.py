"""Our parameters ↔ PaliGemma's tensors in Hugging Face files: one table, read in both directions.

`{layer}` in a name stands for the index along our stacked axis L.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from jfe_jax.errors import UserError
from jfe_jax.models.hf_spec import Entry, block, linear
from jfe_jax.models.siglip_clip import hf_names

VISION, TEXT, PROJECTOR = "vision_tower.", "language_model.model.", "multi_modal_projector."


def _text_block() -> Iterator[Entry]:
    ours, theirs = "tower.blocks.", f"{TEXT}layers.{{layer}}."
    for name, short in (("query_dnh", "q_proj"), ("key_dkh", "k_proj"), ("value_dkh", "v_proj")):
        yield linear(f"{ours}attention.{name}", f"{theirs}self_attn.{short}")
    yield linear(f"{ours}attention.out_nhd", f"{theirs}self_attn.o_proj", inner=2)
    for name, short in (("gate_df", "gate_proj"), ("up_df", "up_proj"), ("down_fd", "down_proj")):
        yield linear(f"{ours}{name}", f"{theirs}mlp.{short}")
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
    *block("vision.blocks.", f"{VISION}encoder.layers.{{layer}}."),
    Entry("vision.norm.scale_d", f"{VISION}post_layernorm.weight"),
    Entry("vision.norm.bias_d", f"{VISION}post_layernorm.bias"),
    linear("projector.kernel_cd", f"{PROJECTOR}linear"),
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
    hf_names.SPELLING,
)
# No weights of their own: the output matrix is the embedding table, an encoder needs neither; buffers of old files.
_IGNORED = re.compile(r"(^|\.)lm_head\.weight$|\.position_ids$|\.rotary_emb\.inv_freq$")


def canonical(name: str) -> str | None:
    """A file's tensor name as the table spells it; None if the encoder has no use for it by design."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return None if _IGNORED.search(name) else name


def prefixes(names: Iterable[str]) -> dict[str, str]:
    """How these names spell the table's VISION, TEXT, PROJECTOR (of a dual encoder, `dual_names.ROOTS`); one that is
    spelt in several ways is left out."""
    found: dict[str, set[str]] = {}
    for name in names:
        known = canonical(name) or ""
        for root in (VISION, TEXT, PROJECTOR, *hf_names.ROOTS):
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
    table = _table(shapes)
    unknown = sorted(shapes.keys() - {entry.ours for entry in table})
    if unknown:
        raise UserError(f"no Hugging Face name for {', '.join(unknown)}; two towers of one's own have no layout there")
    found = {}
    for entry in table:
        shape = shapes[entry.ours]
        for layer in range(shape[0]) if entry.stacked else (None,):
            found[entry.theirs.format(layer=layer)] = Piece(entry, layer, shape[1:] if entry.stacked else shape)
    return found


def _table(shapes: Collection[str]) -> tuple[Entry, ...]:
    for dual in (hf_names.SIGLIP, hf_names.CLIP):
        # Each has a last line that the other models have not.
        if dual[-1].ours in shapes:
            return dual
    return (*_COMMON, *(_GEMMA_2 if _GEMMA_2[0].ours in shapes else _GEMMA_1))
