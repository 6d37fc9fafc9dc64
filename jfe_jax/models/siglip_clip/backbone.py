"""SigLIP's and CLIP's dual encoders: `model.kind: dual`."""

from collections.abc import Iterator

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.models.base import FlopTerm, HfFormat, Workload
from jfe_jax.models.paligemma.flops import text_attention_flops, vision_terms
from jfe_jax.models.siglip_clip.hf_format import SiglipClipFormat
from jfe_jax.models.siglip_clip.model import DualEncoder
from jfe_jax.models.validation import check_towers, require


class SiglipClipBackbone:
    """A text tower and an image tower, whose embeddings are summed."""

    bins = False
    attention = ("xla",)
    own_temperature = True
    min_image_slots = 1
    hf_format: HfFormat | None = SiglipClipFormat()

    def validate(self, cfg: ModelConfig) -> None:
        """Raises UserError if the sizes in `cfg` do not fit together.

        Pixels beyond the last full patch are left out, as in siglip-so400m-patch14-384.
        """
        check_towers(cfg)
        text, width = cfg.text, cfg.vision.width
        require(
            (
                (text.positions > 0, "model.text.positions is 0; a dual encoder's text tower has learned positions"),
                (
                    (text.num_kv_heads, text.head_dim * text.num_heads) == (text.num_heads, text.width),
                    f"model.text: a dual encoder's text tower has num_kv_heads = num_heads ({text.num_heads}) and "
                    f"head_dim = width / num_heads ({text.width / text.num_heads:g})",
                ),
                (cfg.pooling != "mean", "model.pooling 'mean': a dual encoder's text is pooled at one token"),
                (
                    cfg.family == "clip" or cfg.embed_dim in (0, width),
                    f"model.embed_dim {cfg.embed_dim}: SigLIP's embedding has the vision tower's width {width}",
                ),
            )
        )

    def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the encoder."""
        return DualEncoder(cfg, rngs)

    def embedding_width(self, cfg: ModelConfig) -> int:
        """Returns `embed_dim`, or the width of the vision tower."""
        return cfg.embed_dim or cfg.vision.width

    def image_takes_tokens(self) -> bool:
        """Returns False: an image has its slot, and no tokens."""
        return False

    def token_flops(self, cfg: ModelConfig) -> tuple[float, float]:
        """Returns the FLOPs of a token in a block with full heads and a plain MLP."""
        text = cfg.text
        return 2.0 * text.width * (4 * text.width + 2 * text.mlp_dim), 4.0 * text.width

    def flop_terms(self, cfg: ModelConfig, load: Workload) -> Iterator[FlopTerm]:
        """Yields both towers, each with its head."""
        clip = cfg.family == "clip"
        # CLIP has a class token in addition to its patches.
        yield from vision_terms(cfg, load, cfg.vision.patches + clip)
        if clip:
            yield FlopTerm("image_head", "image_projection_", load.images, ("vision.",))
        else:
            yield from _map_head_terms(cfg, load.images)
        before = ("text.table_", "text.position_", "text.blocks.")
        yield FlopTerm("text", "text.", load.tokens, before, cfg.text.depth * text_attention_flops(cfg, load))
        # SigLIP's, or CLIP's.
        yield FlopTerm("text_head", "text_", load.items, ("text.",))


def _map_head_terms(cfg: ModelConfig, images: float) -> Iterator[FlopTerm]:
    patches, width = cfg.vision.patches, cfg.vision.width
    # A third of it makes the probe's query, the others key and value of every patch.
    yield FlopTerm("image_probe", "image_head.in_dinh", images * (1 + 2 * patches) / 3, ("vision.",))
    before = ("vision.", "image_head.probe_", "image_head.in_")
    yield FlopTerm("image_head", "image_head.", images, before, images * 4 * patches * width)
