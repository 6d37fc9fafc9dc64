"""The `model` section: towers, pooling, compute dtype, adapters."""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu_tanh", "gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP's vision transformer, or CLIP's.

    Attributes:
      activation: MLP activation; "quick_gelu" is x · sigmoid(1.702 x).
      resize: How an image is made `image_size` square: "stretch" ignores its aspect ratio, "crop" resizes the shorter
        side and crops the center.
      resampler: Bicubic implementation that is matched bit for bit: "pillow", or "torchvision", which transformers uses
        by default where it is installed and which takes a fifth of the time. They differ by 1 of 255 in some pixels,
        and by more in portrait images.
      mean, std: Per-channel normalization (red, green, blue) of pixels scaled to [0, 1].
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
    """Gemma's decoder blocks with bidirectional attention, or the text tower of a dual encoder.

    The defaults are Gemma 1's. Gemma 2 adds `post_norms` to `sliding_window`. `positions` and `activation` belong to
    dual encoders, whose heads are always width / num_heads wide and have no rotary positions.

    Attributes:
      post_norms: Also normalize the outputs of attention and MLP before the residual addition.
      query_pre_attn_scalar: Queries are divided by its square root; 0 uses `head_dim`.
      attn_logit_softcap: Attention logits become cap · tanh(logit / cap); 0 disables the cap.
      sliding_window: In layers 0, 2, 4, … a token attends to tokens at most this far away, in both directions; 0
        disables the window. (transformers' definition for a bidirectional Gemma 2.)
      positions: Number of learned positions, the maximum text length in tokens.
      activation: MLP activation.
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
    """Low-rank adapters: a frozen kernel W becomes W + scale · A B (arXiv 2106.09685). No dropout.

    Attributes:
      rank: Rank of A B; 0 disables adapters.
      alpha: The scale is alpha / rank.
      rslora: Use alpha / sqrt(rank) as the scale (arXiv 2312.03732).
      targets: Kernels that get adapters: "attention" and "mlp" of the text tower, "vision", "projector", or a part of
        one, such as "attention.query" or "vision.mlp".
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and sizes of the model.

    Attributes:
      kind: "fusion" is JFE, one tower over image and text tokens; "two_tower" is the late-fusion baseline; "dual" is
        the SigLIP or CLIP pair of towers, whose embeddings are summed.
      family: dual only: "siglip" or "clip".
      pooling: "last" takes the hidden state of the final <eos>, "mean" averages over the item's tokens, "largest" takes
        the first token with the largest id (dual only: CLIP files with an eos_token_id of 2).
      image_token: Token id of the placeholder that an image patch replaces.
      fusion: two_tower only: "score" sums the two towers' embeddings; "feature" runs `fusion_depth` transformer layers
        over both towers' output tokens.
      template_tokens: two_tower only: number of tokens, besides its patches, of an item without text (<bos>, newline,
        <eos>). An item with no more than these uses the image tower alone.
      embed_dim: Embedding width of "two_tower" (0: the text tower's) and "dual" (0: the vision tower's). The fusion
        model's embedding has the tower's width.
      dtype: Compute dtype; parameters are float32.
      remat: What the backward pass recomputes: "none"; "full", each layer; "up", all but the text tower's widest
        product (stores 2·F bytes per token and layer); "dots", all but matrix products; "offload", like "dots", with
        the products stored in host memory (TPU, GPU).
      attention: Attention implementation in training: "xla", "cudnn" (GPU, bfloat16, no softcap) or "splash" (TPU, text
        tower only; row length and head_dim multiples of 128). Loaded models use "xla".
      lora: Low-rank adapters. With adapters, only they and `optimizer.train` are trained and saved in checkpoints.
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
