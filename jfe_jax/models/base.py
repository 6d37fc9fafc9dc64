"""The protocol of a backbone: what the rest of the package asks about one kind of model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flax import nnx

from jfe_jax.config import Config, ModelConfig, TokensConfig
from jfe_jax.models.hf_spec import TensorNames


class Workload(NamedTuple):
    """The amount of work of a step, in means where it varies.

    Attributes:
      tokens: Tokens of the text tower.
      seen: Tokens that each of them attends to (mean).
      images: Images.
      items: Items.
      seen_at_end: Tokens that an item's pooled token attends to (mean).
    """

    tokens: float
    seen: float
    images: float
    items: float
    seen_at_end: float


class FlopTerm(NamedTuple):
    """A group of matrices that a step applies equally often.

    Attributes:
      name: The name in reports.
      weights: Prefixes of the paths of its matrices, of those that no earlier term has.
      places: How many tokens, patches, images or items each is applied to; a mean where they differ.
      before: Prefixes of the paths of parameters that get their gradient through it.
      attention: Forward FLOPs of all of its attention.
    """

    name: str
    weights: str | tuple[str, ...]
    places: float
    before: tuple[str, ...]
    attention: float = 0


class HfFormat(Protocol):
    """A backbone's Hugging Face directory: config.json and what goes with it, in both directions.

    Attributes:
      model_types: The `model_type` values of config.json that it reads.
      layouts: The layouts that it can be exported in: "transformers", "sentence-transformers".
      names: The names of its tensors.
    """

    model_types: tuple[str, ...]
    layouts: tuple[str, ...]
    names: TensorNames

    def read_config(self, tree: dict[str, Any], directory: Path, encoder: dict[str, Any]) -> Config:
        """Reads a directory's config.json (`tree`) and jfe.json (`encoder`, {} without one).

        Raises:
          UserError: A setting that the encoder does not implement.
        """
        ...

    def config_json(self, model: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
        """Returns config.json; `special` has the ids of the special tokens "bos", "eos" and "pad" that there are."""
        ...

    def encoder_json(self, model: ModelConfig, tokens: TokensConfig) -> dict[str, Any]:
        """Returns jfe.json: what config.json cannot say."""
        ...

    def processor_json(self, model: ModelConfig) -> dict[str, Any]:
        """Returns preprocessor_config.json."""
        ...

    def tag(self, model: ModelConfig) -> str:
        """Returns the model card's tag of the architecture."""
        ...

    def card(self, config: Config, step: int, name: str, layout: str, base: str) -> list[str]:
        """Returns the lines of the model card that say what the model is and how to open it."""
        ...


class Backbone(Protocol):
    """One kind of model. Stateless: everything follows from the `model` section that a method is given.

    Attributes:
      bins: Attention can work on bins in place of rows.
      attention: The attention implementations that it has, of those that `model.attention` names.
      own_temperature: Its published weights hold a temperature, which `loss.temperature` 0 stands for.
      min_image_slots: The least number of image slots of a batch.
      hf_format: Its Hugging Face directory; None if no class of transformers has this architecture.
    """

    bins: bool
    attention: tuple[str, ...]
    own_temperature: bool
    min_image_slots: int
    hf_format: HfFormat | None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises UserError if the sizes in `cfg` do not fit together."""
        ...

    def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the encoder: PackedBatch to float32 [G, B, E], unit vectors; random float32 parameters."""
        ...

    def embedding_width(self, cfg: ModelConfig) -> int:
        """Returns E."""
        ...

    def image_takes_tokens(self) -> bool:
        """Returns True if an image takes the place of tokens of a row."""
        ...

    def token_flops(self, cfg: ModelConfig) -> tuple[float, float]:
        """Returns the forward FLOPs of one token in one layer of the text tower.

        Two figures: those of the matrices, and those of attention for each token that it attends to.
        """
        ...

    def flop_terms(self, cfg: ModelConfig, load: Workload) -> Iterator[FlopTerm]:
        """Yields every group of matrices of the model, in the order of the forward pass."""
        ...
