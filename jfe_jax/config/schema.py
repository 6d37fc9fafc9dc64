"""The root of the config tree, and the checks that involve several sections."""

from dataclasses import dataclass, field

from jfe_jax.config.data import DataConfig, TokensConfig
from jfe_jax.config.model import ModelConfig
from jfe_jax.config.train import CheckpointConfig, LossConfig, MeshConfig, OptimizerConfig
from jfe_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """One stage of training.

    Attributes:
      output: Directory of the run: checkpoints, tokenizer, logs.
      init: Checkpoint with the initial weights (stage 2 starts from stage 1); "" for random weights.
      seed: Seed of initialization, data order and sampling.
      log_every_steps: Steps between logged metrics.
      val_every_steps: Steps between evaluations of the loss on `data.val_split`, which also runs at the end; 0 disables
        it.
      val_steps: Number of batches per validation, always the same ones.
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
