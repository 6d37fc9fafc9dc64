"""The `model` section: towers, pooling, compute dtype, adapters."""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu_tanh", "gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP's vision transformer, or CLIP's.

    Attributes:
      activation: of the MLPs; "quick_gelu" is x · sigmoid(1.702 x).
      resize: how an image becomes `image_size` square: "stretch" does not keep its aspect ratio; "crop" resizes its
        shorter side and takes the centre.
      resampler: whose bicubic resizing the pixels equal, bit for bit: "pillow"'s, or "torchvision"'s, transformers'
        default where it is installed, which takes a fifth of the time. They differ by 1 of 255 in some pixels, and by
        more where an image is higher than wide.
      mean, std: of red, green and blue, each from 0 to 1, that pixels are normalised with.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    norm_eps: float = 1e-6
    activation: Activation = "gelu_tanh"
    resize: Literal["stretch", "crop"] = "stretch"
    resampler: Literal["pillow", "torchvision"] = "pillow"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Gemma's blocks, run in both directions; or the text tower of a dual encoder.

    The defaults are Gemma 1's; `post_norms` to `sliding_window` are what Gemma 2 adds, the rest is of dual encoders,
    whose heads are always width / num_heads wide and have no rotary positions.

    Attributes:
      post_norms: normalise what attention and MLP give, too, before it is added.
      query_pre_attn_scalar: queries are divided by its square root; 0 takes `head_dim`.
      attn_logit_softcap: attention logits go through cap · tanh(logit / cap); 0 for no cap.
      sliding_window: in layers 0, 2, 4, … a token attends to those at most so many tokens away, before or after it; 0
        for no window. (transformers' definition for a Gemma 2 that attends in both directions.)
      positions: learned positions, the longest text in tokens.
      activation: of the MLPs.
    """

    vocab_size: int = 257216
    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    post_norms: bool = False
    query_pre_attn_scalar: int = 0
    attn_logit_softcap: float = 0.0
    sliding_window: int = 0
    positions: int = 0
    activation: Activation = "gelu_tanh"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: a kernel W becomes W + scale · A B, and W stays as it is (arXiv 2106.09685). No dropout.

    Attributes:
      rank: of A B; 0 for no adapters.
      alpha: scale is alpha / rank.
      rslora: scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
      targets: which kernels have adapters: "attention" and "mlp" of the text tower, "vision", "projector", or parts of
        them, as "attention.query", "vision.mlp".
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which tower, how large.

    Attributes:
      kind: "fusion" is JFE, one tower over image and text tokens; "two_tower" is the late-fusion baseline; "dual" is
        SigLIP's or CLIP's pair of towers, whose embeddings are summed.
      family: dual only: whose towers.
      pooling: "last" takes the hidden state of the closing <eos>, "mean" the mean over the item's tokens, "largest"
        that of the first token with the largest id (dual only: CLIP files with an eos_token_id of 2).
      image_token: id of the placeholder that an image patch takes the place of.
      fusion: two_tower only. "score" sums the two towers' embeddings; "feature" runs `fusion_depth` transformer layers
        over both towers' output tokens.
      template_tokens: two_tower only: tokens of an item besides its patches when it has no text (<bos>, newline,
        <eos>); what has no more goes through the image tower alone.
      embed_dim: width of the embedding of "two_tower" (0: the text tower's) and "dual" (0: the vision tower's). The
        fusion model's embedding has the tower's width.
      dtype: of the computation; parameters are float32.
      remat: what the backward pass recomputes: "none" of a layer, "full" all of it, "up" all but the text tower's
        widest product (it keeps 2·F bytes a token and layer), "dots" all but matrix products, "offload" the same, with
        the products kept in the host's memory (TPU, GPU).
      attention: how a tower attends in training: "xla", "cudnn" (GPU, bfloat16, no soft-cap) or "splash" (TPU, the text
        tower alone; rows of a multiple of 128 tokens, head_dim too). Opened models use "xla".
      lora: low-rank adapters. With them only they and `optimizer.train` are trained and kept in checkpoints.
    """

    kind: Literal["fusion", "two_tower", "dual"] = "fusion"
    family: Literal["siglip", "clip"] = "siglip"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pooling: Literal["last", "mean", "largest"] = "last"
    image_token: int = 257152
    fusion: Literal["score", "feature"] = "score"
    fusion_depth: int = 2
    template_tokens: int = 3
    embed_dim: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "up", "dots", "offload"] = "none"
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    lora: LoraConfig = field(default_factory=LoraConfig)
