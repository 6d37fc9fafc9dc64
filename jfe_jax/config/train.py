"""The `loss`, `optimizer`, `mesh` and `checkpoint` sections."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss over the global batch.

    Attributes:
      kind: "infonce", a softmax over the batch, or "sigmoid", a binary decision per pair (SigLIP).
      temperature: Temperature of the logits, or its initial value if it is learned. 0 uses the value in a dual
        encoder's weights, and likewise its bias.
      learn_temperature: Train the temperature.
      min_temperature: Lower bound of a learned temperature.
      bias, learn_bias: sigmoid only: bias added to the logits, or its initial value.
      directions: infonce only: "both" adds the candidate-to-query direction to query-to-candidate.
      negatives: "all" candidates of the batch, or only those of the positive's modality ("same_modality").
      mask_false_negatives: Exclude duplicates of the positive, and other correct candidates, from the negatives.
      matryoshka: {width: weight}: also train the first `width` dimensions as an embedding, with this weight relative to
        the full embedding's 1.
      tile_mib: Memory per device for one tile of logits, of which a few exist at a time. Logits are computed tile by
        tile, and recomputed in the backward pass.
      keep_mib: Memory per device (MiB) for caching logits for the backward pass, 3 bytes per logit; the rest is
        recomputed. A cached logit costs three matrix products, a recomputed one four. The memory of the queries'
        gradients caches some more.
      keep_logits: Cache all logits, which grows with the square of the batch.
      grad_cache_chunks: Number of chunks in which the batch is encoded (GradCache): each is encoded a second time for
        its gradients. Activation memory is that of a chunk, the loss that of the full batch. 1 encodes it at once.
    """

    kind: Literal["infonce", "sigmoid"] = "infonce"
    temperature: float = 0.05
    learn_temperature: bool = True
    min_temperature: float = 0.01
    bias: float = -10.0
    learn_bias: bool = True
    directions: Literal["both", "query_to_candidate"] = "both"
    negatives: Literal["all", "same_modality"] = "all"
    mask_false_negatives: bool = True
    matryoshka: dict[int, float] = field(default_factory=dict)
    tile_mib: float = 8.0
    keep_mib: float = 256.0
    keep_logits: bool = False
    grad_cache_chunks: int = 1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and learning-rate schedule; steps are optimizer steps.

    Attributes:
      name: "adamw"; "adafactor", whose second moment is factored into rows and columns; or "muon", which orthogonalizes
        the momentum of matrices and uses AdamW for tables, norms and biases. Muon's updates are scaled to AdamW's size,
        so that the same learning rates apply.
      steps: Number of training steps.
      learning_rate: Peak learning rate.
      warmup_steps: Steps of linear warm-up.
      schedule: Decay after the warm-up, to `end_fraction` of the learning rate; "wsd" stays at the peak until
        `decay_fraction` of the steps are left.
      b1, b2: Decay rates of AdamW's moments. Adafactor uses `b1` only; 0 disables its first moment.
      muon_momentum: Decay rate of Muon's momentum.
      first_moment_dtype, second_moment_dtype: Storage dtype of the moments; bfloat16 halves their memory. The second is
        AdamW's and requires `b2` <= 0.99 in bfloat16.
      weight_decay: Decoupled weight decay.
      clip_norm: Maximum global gradient norm; 0 disables clipping.
      freeze: Parameter groups that are not trained, by a key of their path: "vision", "embedder", "tower.norm".
      learning_rate_factors: {group: multiplier of its learning rate}, such as {vision: 0.1}; "loss" is the temperature.
        If several match a parameter, the one with the most keys applies.
      max_skipped_steps: A step whose loss or gradients are not finite changes nothing and is counted; training stops
        after this many in a row.
      train: With `model.lora` only: groups that are trained in full, in addition to the adapters.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    steps: int = 1000
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    end_fraction: float = 0.0
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.98
    muon_momentum: float = 0.95
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    freeze: tuple[str, ...] = ()
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    max_skipped_steps: int = 5
    train: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 takes all that are left (at most one axis)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep. The end of training is always saved.

    Attributes:
      every_steps: Steps between checkpoints; 0 saves only at the end.
      keep: Number of most recent checkpoints to keep.
      keep_every_steps: Also keep one checkpoint every this many steps; 0 disables it.
      keep_best: Also keep the N checkpoints with the lowest validation loss; validates at every save. `best` in the run
        directory links to the best.
    """

    every_steps: int = 500
    keep: int = 2
    keep_every_steps: int = 0
    keep_best: int = 0
