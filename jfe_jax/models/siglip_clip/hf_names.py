"""The names of the tensors of `SiglipModel` and `CLIPModel` in Hugging Face files, read in both directions."""

import re
from collections.abc import Collection, Iterator

from jfe_jax.models.hf_spec import Entry, TensorNames, block, linear

VISION, TEXT = "vision_model.", "text_model."
# What prefixes a name can have in the table; files spell each in one way.
ROOTS = (VISION, TEXT, "visual_projection.", "text_projection.", "logit_scale", "logit_bias")
# Of files that were saved from a model around this one.
SPELLING = (re.compile(rf"^(?:clip|siglip|model)\.(?={'|'.join(map(re.escape, ROOTS))})"), "")


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}.scale_d", f"{theirs}.weight"), Entry(f"{ours}.bias_d", f"{theirs}.bias")


def _towers() -> Iterator[Entry]:
    yield Entry("vision.patch_yxcd", f"{VISION}embeddings.patch_embedding.weight", convolution=True)
    yield Entry("vision.position_pd", f"{VISION}embeddings.position_embedding.weight")
    yield from block("vision.blocks.", f"{VISION}encoder.layers.{{layer}}.")
    yield from _norm("vision.norm", f"{VISION}post_layernorm")
    yield Entry("text.table_vd", f"{TEXT}embeddings.token_embedding.weight")
    yield Entry("text.position_sd", f"{TEXT}embeddings.position_embedding.weight")
    yield from block("text.blocks.", f"{TEXT}encoder.layers.{{layer}}.")
    yield from _norm("text.norm", f"{TEXT}final_layer_norm")


def _head() -> Iterator[Entry]:
    ours, theirs = "image_head.", f"{VISION}head."
    yield Entry(f"{ours}probe_eed", f"{theirs}probe")
    # Query, key and value in one matrix, one below the other.
    yield Entry(f"{ours}in_dinh", f"{theirs}attention.in_proj_weight", inner=1)
    yield Entry(f"{ours}in_bias_inh", f"{theirs}attention.in_proj_bias")
    yield linear(f"{ours}out_nhd", f"{theirs}attention.out_proj", inner=2)
    yield Entry(f"{ours}out_bias_d", f"{theirs}attention.out_proj.bias")
    yield from _norm(f"{ours}norm", f"{theirs}layernorm")
    for weight, bias, short in (("up_df", "up_bias_f", "fc1"), ("down_fd", "down_bias_d", "fc2")):
        yield linear(f"{ours}{weight}", f"{theirs}mlp.{short}")
        yield Entry(f"{ours}{bias}", f"{theirs}mlp.{short}.bias")


SIGLIP: tuple[Entry, ...] = (
    *_towers(),
    Entry("vision.patch_bias_d", f"{VISION}embeddings.patch_embedding.bias"),
    *_head(),
    linear("text_head.kernel_cd", f"{TEXT}head"),
    Entry("text_head.bias_d", f"{TEXT}head.bias"),
    Entry("logit_scale_e", "logit_scale"),
    Entry("logit_bias_e", "logit_bias"),
)
CLIP: tuple[Entry, ...] = (
    *_towers(),
    Entry("vision.class_d", f"{VISION}embeddings.class_embedding"),
    # The misspelling is the files'.
    *_norm("vision.first_norm", f"{VISION}pre_layrnorm"),
    linear("image_projection_de", "visual_projection"),
    linear("text_projection_de", "text_projection"),
    Entry("logit_scale_", "logit_scale"),
)


def _table(paths: Collection[str]) -> tuple[Entry, ...] | None:
    # The last line of each is one that other models do not have.
    return next((table for table in (SIGLIP, CLIP) if table[-1].ours in paths), None)


NAMES = TensorNames(ROOTS, (SPELLING,), None, _table)
