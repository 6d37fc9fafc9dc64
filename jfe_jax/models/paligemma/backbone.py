"""PaliGemma as a joint fusion encoder: `model.kind: fusion`."""

from collections.abc import Iterator

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.models.base import FlopTerm, HfFormat, Workload
from jfe_jax.models.paligemma.flops import gemma_token_flops, text_attention_flops, tower_terms, vision_terms
from jfe_jax.models.paligemma.hf_format import PaliGemmaFormat
from jfe_jax.models.paligemma.model import FusionEncoder
from jfe_jax.models.validation import check_gemma, require


class PaliGemmaBackbone:
    """PaliGemma 1 and 2: one tower over image and text tokens."""

    bins = True
    attention = ("xla", "cudnn", "splash")
    own_temperature = False
    min_image_slots = 0
    hf_format: HfFormat | None = PaliGemmaFormat()

    def validate(self, cfg: ModelConfig) -> None:
        """Raises UserError if the sizes in `cfg` do not fit together."""
        check_gemma(cfg)
        width = cfg.text.width
        problem = f"model.embed_dim {cfg.embed_dim}: the fusion model's embedding has the tower's width {width}"
        require([(cfg.embed_dim in (0, width), problem)])

    def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the encoder."""
        return FusionEncoder(cfg, rngs)

    def embedding_width(self, cfg: ModelConfig) -> int:
        """Returns the width of the text tower."""
        return cfg.text.width

    def image_takes_tokens(self) -> bool:
        """Returns True: patches replace placeholder tokens."""
        return True

    def token_flops(self, cfg: ModelConfig) -> tuple[float, float]:
        """Returns the FLOPs of a token in a Gemma block."""
        return gemma_token_flops(cfg)

    def flop_terms(self, cfg: ModelConfig, load: Workload) -> Iterator[FlopTerm]:
        """Yields patches, vision tower, projector and text tower."""
        yield from vision_terms(cfg, load, cfg.vision.patches)
        yield FlopTerm("projector", "projector.", load.images * cfg.vision.patches, ("vision.",))
        before = ("vision.", "projector.", "embedder.", "tower.blocks.")
        yield from tower_terms(cfg, load, before, text_attention_flops(cfg, load))
