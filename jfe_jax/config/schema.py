"""The whole run as one tree of frozen dataclasses.

A YAML file holds the values that differ from the defaults; `--key.sub=value` on the command line overrides it. Every
checkpoint carries the resolved tree, so that it opens without its YAML.
"""

import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite
import yaml

from jfe_jax.errors import UserError

# YAML has lists; anything else is left for dacite to refuse.
_TUPLES = dict.fromkeys(
    (tuple[str, ...], tuple[float, ...]), lambda value: tuple(value) if isinstance(value, list | tuple) else value
)
# A mixture, or a list of widths, is one value: adding to the base's would not be what was written.
_WHOLE = ("mixture", "upsample", "matryoshka", "bins")
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


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How an item becomes tokens and pixels.

    Attributes:
      tokenizer: directory of a Hugging Face tokenizer.
      template: "paligemma" is <image>…<bos> text newline <eos>; "clip" is <bos> text <eos>; "siglip" is text <eos>,
        padded to `max_text_tokens` + 1. In the last two an image takes no tokens; an image alone is one placeholder.
      max_text_tokens: instruction and text together are cut to this many tokens.
      newline: close the text with "\\n", as PaliGemma's processor does ("paligemma" only).
    """

    tokenizer: str = ""
    template: Literal["paligemma", "clip", "siglip"] = "paligemma"
    max_text_tokens: int = 240
    newline: bool = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how a step's items are laid out. All sizes are of the global batch.

    Attributes:
      path: a directory made by `jfe data prepare`.
      split: the split that is trained on.
      val_split: the split that the validation loss is taken on; "" for none.
      mixture: sampling weight by unit ("{dataset}_task{t}"); empty means every unit in proportion to its size.
      upsample: data set → how many queries of it count, in place of its size (configs/mbeir.yaml has M-BEIR's).
      homogeneous: so many neighbouring pairs of a batch come from one unit; 1 mixes them.
      instruction_probability: how often a query gets one of its instructions; otherwise none.
      pairs: query-positive pairs of a step.
      hard_negatives: negatives from `neg_cand_list` that go with each pair.
      negative_modality: "any" of these negatives, or only those of the "positive"'s modality.
      layout: "packed" puts several items into a row of `row_tokens`; "padded" one.
      rows, row_tokens, image_slots: shape of the global packed batch.
      bins: {tokens: how many}: attention works on so many bins of these lengths instead of on rows; an item lies
        whole in one, across the ends of rows. A fifth more room than the rows' tokens is usual; rows then have no
        gaps; where items are shorter than rows, attention multiplies less as well. {} for rows.
      image_shift: training images are moved by up to so many pixels, their edges repeated; a new draw each time.
      shuffle: False keeps the order on disk (for debugging).
      workers: reader processes; 0 reads in threads of the main process.
      max_bad_share: pairs with an unreadable image are skipped and counted; more than this share stops the run.
      image_cache_mib: decoded images kept in memory by each reader; candidates' tokens may take a quarter as much more.
    """

    path: str = ""
    split: str = "train"
    val_split: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    upsample: dict[str, float] = field(default_factory=dict)
    homogeneous: int = 1
    instruction_probability: float = 1.0
    pairs: int = 256
    hard_negatives: int = 0
    negative_modality: Literal["any", "positive"] = "any"
    layout: Literal["packed", "padded"] = "packed"
    rows: int = 256
    row_tokens: int = 512
    image_slots: int = 256
    bins: dict[int, int] = field(default_factory=dict)
    image_shift: int = 0
    shuffle: bool = True
    workers: int = 0
    max_bad_share: float = 0.001
    image_cache_mib: int = 0


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


@dataclass(frozen=True, kw_only=True)
class Config:
    """One stage of training.

    Attributes:
      output: directory of the run: checkpoints, tokenizer, logs.
      init: checkpoint whose weights are the start (stage 2 starts from stage 1); "" for random weights.
      log_every_steps: a line of metrics each so many steps.
      val_every_steps: the loss on `data.val_split` each so many steps and at the end; 0 for never.
      val_steps: batches of `data.val_split` that a validation takes, always the same.
    """

    output: str = "runs/default"
    init: str = ""
    seed: int = 0
    log_every_steps: int = 10
    val_every_steps: int = 0
    val_steps: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _check_template(self.model, self.tokens)
        template = 2 + self.tokens.newline
        if self.model.kind == "two_tower" and self.model.template_tokens != template:
            raise UserError(
                f"model.template_tokens is {self.model.template_tokens}, but with tokens.newline "
                f"{str(self.tokens.newline).lower()} an item without text has {template}; set it to {template}"
            )


def _check_template(model: ModelConfig, tokens: TokensConfig) -> None:
    wanted = model.family if model.kind == "dual" else "paligemma"
    if tokens.template != wanted:
        raise UserError(f"tokens.template is {tokens.template!r}, but this model's items are laid out as {wanted!r}")
    room = model.text.positions - {"siglip": 1, "clip": 2}.get(tokens.template, 0)
    if tokens.template == "siglip" and tokens.max_text_tokens != room:
        raise UserError(
            f"tokens.max_text_tokens is {tokens.max_text_tokens}; SigLIP pads to its {model.text.positions} positions "
            f"(model.text.positions), one of them for <eos>: set it to {room}"
        )
    if tokens.template == "clip" and tokens.max_text_tokens > room:
        raise UserError(
            f"tokens.max_text_tokens is {tokens.max_text_tokens}, but model.text.positions, {model.text.positions}, "
            f"have room for {room} besides <bos> and <eos>"
        )


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides (leading dashes allowed).

    A `base: other.yaml` key, or a list of such, names files beside this one that are read first, in order; what the
    file itself says comes last.

    Raises:
      UserError: the file is missing or no YAML, a key is unknown (the nearest is named), a value has the wrong type.
    """
    tree = _read(Path(path))
    for override in overrides:
        key, equals, value = override.lstrip("-").partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write --key.sub=value")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
        try:
            node[last] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from error
    return from_dict(tree, str(path))


def from_dict(tree: dict[str, Any], origin: str = "config", kind: type = Config) -> Any:
    """A plain tree as a `kind` (Config or one of its sections); `origin` names the source in errors."""
    tree = _checked(kind, tree, origin)
    try:
        return dacite.from_dict(kind, tree, dacite.Config(type_hooks=_TUPLES, strict=True))
    except dacite.WrongTypeError as error:
        wanted = error.field_type
        choices = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
        what = f"one of {', '.join(map(str, choices))}" if choices else getattr(wanted, "__name__", wanted)
        raise UserError(f"{origin}: {error.field_path} is {error.value!r}; it has to be {what}") from error
    except dacite.DaciteError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from error


def to_yaml(config: Any) -> str:
    """The resolved tree, every key written out, in the order of the dataclasses."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def differing_keys(one: Any, other: Any) -> list[str]:
    """Dotted names of the values that differ, as "model.text.width: 64 != 128"."""
    left, right = (dict(_flatten(dataclasses.asdict(tree))) for tree in (one, other))
    return [
        f"{key}: {left.get(key)} != {right.get(key)}" for key in sorted(left | right) if left.get(key) != right.get(key)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a tree of keys and values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    trees = [_read(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)]
    return functools.reduce(_merge, [*trees, tree], {})


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        whole = key in _WHOLE or not isinstance(value, dict) or not isinstance(merged.get(key), dict)
        merged[key] = value if whole else _merge(merged[key], value)
    return merged


def _checked(kind: type, tree: Any, origin: str, prefix: str = "") -> dict[str, Any]:
    """The tree with its numbers as floats where floats are wanted; refuses unknown keys and values for sections."""
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: {prefix.rstrip('.')} is a section; give it keys, not {tree!r}")
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(name, list(_names(Config)), 1, 0.5)
            near = near or difflib.get_close_matches(str(key), list(hints), 1, 0.0)
            raise UserError(f"{origin}: unknown key {name}; did you mean {near[0]}?")
        if dataclasses.is_dataclass(hints[key]):
            checked[key] = _checked(hints[key], value, origin, f"{name}.")
        else:
            checked[key] = _as(hints[key], value, f"{origin}: {name}")
    return checked


def _names(kind: type, prefix: str = "") -> typing.Iterator[str]:
    for key, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from _names(typing.cast(type, hint), f"{prefix}{key}.")


def _as(hint: Any, value: Any, name: str) -> Any:
    if hint is float:
        return _to_float(value, name)
    if hint == tuple[float, ...] and isinstance(value, list | tuple):
        return [_to_float(one, name) for one in value]
    if hint in (dict[int, float], dict[int, int]) and isinstance(value, dict):
        # JSON, in which checkpoints keep their config, knows text as keys only.
        if not all(str(key).isdecimal() for key in value):
            raise UserError(f"{name} is {value!r}; its keys have to be whole numbers")
        own = typing.get_args(hint)[1]
        return {int(key): _to_float(one, f"{name}.{key}") if own is float else one for key, one in value.items()}
    return value


def _to_float(value: Any, name: str) -> float:
    # YAML 1.1 reads 1e-4 as text.
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} is {value!r}; it has to be a number")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _flatten(tree: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
