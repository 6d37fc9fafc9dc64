"""The names of PaliGemma's tensors in Hugging Face files: one table, read in both directions.

`{layer}` in a name stands for the index along our stacked axis L.
"""

import re
from collections.abc import Collection, Iterator

from jfe_jax.models.hf_spec import Entry, TensorNames, block, linear

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
)
# No weights of their own: the output matrix is the embedding table, an encoder needs neither; buffers of old files.
_IGNORED = re.compile(r"(^|\.)lm_head\.weight$|\.position_ids$|\.rotary_emb\.inv_freq$")


def _table(paths: Collection[str]) -> tuple[Entry, ...] | None:
    if "projector.kernel_cd" not in paths:
        return None
    return (*_COMMON, *(_GEMMA_2 if _GEMMA_2[0].ours in paths else _GEMMA_1))


NAMES = TensorNames((VISION, TEXT, PROJECTOR), _SPELLINGS, _IGNORED, _table)
