"""The late-fusion baselines: `model.kind: two_tower`."""

from collections.abc import Iterator

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.models.base import FlopTerm, HfFormat, Workload
from jfe_jax.models.paligemma.flops import gemma_token_flops, text_attention_flops, vision_terms
from jfe_jax.models.two_tower.model import TwoTowerEncoder
from jfe_jax.models.validation import check_gemma


class TwoTowerBackbone:
    """PaliGemma's towers side by side, merged by a sum or by fusion layers."""

    bins = True
    attention = ("xla", "cudnn", "splash")
    own_temperature = False
    min_image_slots = 1
    hf_format: HfFormat | None = None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises UserError if the sizes in `cfg` do not fit together."""
        check_gemma(cfg)

    def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the encoder."""
        return TwoTowerEncoder(cfg, rngs)

    def embedding_width(self, cfg: ModelConfig) -> int:
        """Returns `embed_dim`, or the width of the text tower."""
        return cfg.embed_dim or cfg.text.width

    def image_takes_tokens(self) -> bool:
        """Returns True: patches replace placeholder tokens."""
        return True

    def token_flops(self, cfg: ModelConfig) -> tuple[float, float]:
        """Returns the FLOPs of a token in a Gemma block."""
        return gemma_token_flops(cfg)

    def flop_terms(self, cfg: ModelConfig, load: Workload) -> Iterator[FlopTerm]:
        """Yields both towers, then what merges them."""
        vision, text = cfg.vision, cfg.text
        patches, layer_attention = load.images * vision.patches, text_attention_flops(cfg, load)
        words = ("embedder.", "tower.blocks.")
        yield from vision_terms(cfg, load, vision.patches)
        if cfg.fusion == "score":
            # Each head's weighted mean of the patches has the patches and their weights as operands.
            mean = 2 * patches * vision.num_heads * vision.width
            yield FlopTerm("image_probe", "image_pool.probe_", patches, ("vision.",), mean)
            yield FlopTerm("image_pool", "image_pool.", load.images, ("vision.", "image_pool.probe_"))
        else:
            yield FlopTerm("projector", "projector.", patches, ("vision.",))
        yield FlopTerm("tower", "tower.", load.tokens, words, text.depth * layer_attention)
        if cfg.fusion == "feature":
            before = ("vision.", "projector.", "embedder.", "tower.", "image_mark_", "text_mark_", "fusion.blocks.")
            yield FlopTerm("fusion", "fusion.", load.tokens, before, cfg.fusion_depth * layer_attention)
            yield FlopTerm("projection", "projection.", load.items, (*before, "fusion."))
        else:
            yield FlopTerm("projection", "projection.", load.items, ("embedder.", "tower."))
