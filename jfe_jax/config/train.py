"""The `loss`, `optimizer`, `mesh` and `checkpoint` sections."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss over the global batch.

    Attributes:
      kind: "infonce", a softmax over the batch, or "sigmoid", a yes or no for each pair (SigLIP).
      temperature: of the logits, or its first value if it is learnt. 0: what a dual encoder's weights say, and so the
        bias.
      min_temperature: a learnt temperature stops there.
      bias, learn_bias: sigmoid only: what is added to the logits, or its first value.
      directions: infonce only: "both" adds candidate-to-query to query-to-candidate.
      negatives: "all" candidates of the batch, or only those of the positive's modality ("same_modality").
      mask_false_negatives: an equal candidate elsewhere in the batch, or another that is right, is no negative.
      matryoshka: {width: weight}: the embedding's first so many dimensions are trained to stand alone, with these
        weights beside the whole embedding's 1.
      tile_mib: memory for a tile of logits on each device, which is held a few times: logits are made tile by tile,
        again for the backward pass.
      keep_mib: memory on each device for logits that are kept instead of made again, as far as it goes, three bytes
        each; kept ones cost three matrix products, made again four. The memory that the queries' gradients will take
        holds some more.
      keep_logits: keep them all, which grows with the square of the batch.
      grad_cache_chunks: the batch is encoded in so many chunks, each a second time for its gradients (GradCache):
        memory for activations is a chunk's, the loss that of the whole batch. 1 encodes it at once.
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
    """The update rule and its schedule; steps are optimizer steps.

    Attributes:
      name: "adamw"; "adafactor", whose second moment is rows and columns instead of a number for each parameter; or
        "muon", which orthogonalises the momentum of matrices and is AdamW for tables, norms and biases. Muon's updates
        are scaled to AdamW's size, so that the same learning rates serve.
      schedule: after a linear warm-up, what leads down to `end_fraction` of the learning rate; "wsd" stays up until
        `decay_fraction` of the steps are left.
      b1, b2: decay of AdamW's moments; Adafactor takes `b1` only, and without (0) has no first moment.
      muon_momentum: decay of Muon's.
      first_moment_dtype, second_moment_dtype: what moments are stored in. bfloat16 halves them; the second is AdamW's,
        and needs `b2` of 0.99 or less there.
      clip_norm: limit of the gradients' global norm; 0 for none.
      freeze: groups of parameters that stay as they are, by a key of their path: "vision", "embedder", "tower.norm".
      learning_rate_factors: {group: factor of its learning rate}, as {vision: 0.1}; "loss" is the temperature's. Of
        several that name a parameter the one with most keys counts.
      max_skipped_steps: a step whose loss or gradients are not finite changes nothing and is counted; after so many in
        a row training stops.
      train: with `model.lora` only: groups that are trained whole, besides the adapters.
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
    """Devices along each axis; -1 takes all that are left (one axis at most)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, besides at the end (0: only then), and what to keep.

    Attributes:
      keep: the newest so many.
      keep_every_steps: besides, one each so many steps; 0 for none.
      keep_best: besides, the so many with the lowest validation loss, which is then taken at every checkpoint. `best`
        in the run directory leads to the best.
    """

    every_steps: int = 500
    keep: int = 2
    keep_every_steps: int = 0
    keep_best: int = 0
