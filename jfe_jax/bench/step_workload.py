"""What `train-step` runs: which model, and the batches of both sides."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from jfe_jax.bench import mix
from jfe_jax.bench.geometry import geometry
from jfe_jax.config import Config, DataConfig, OptimizerConfig
from jfe_jax.data.packing import ContrastiveBatch
from jfe_jax.plan import flops

KINDS = ("mix", "equal")
# What an equal item has besides its patches: a caption with its template.
EQUAL_TEXT = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Attributes:
      geometry: of `geometry.GEOMETRIES`.
      rows, row_tokens: of a step on the mix; with equal items a step has as many tokens, or a few fewer.
      batches: different batches, taken by turns.
      dtype: of the products.
      attention, remat: of our model, see ModelConfig.
      checkpointing, compiled: of PyTorch's side.
      device: "cpu" or "gpu".
    """

    geometry: str = "30m"
    rows: int = 10
    row_tokens: int = 640
    batches: int = 3
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    checkpointing: bool = False
    compiled: bool = False
    device: str = "cpu"


class Batch(NamedTuple):
    """The same pairs twice, and what they are.

    Attributes:
      packed: ours.
      padded: PyTorch's: all queries, then all candidates.
      pairs: how many.
      load: their tokens and images, without padding.
      real: share of the tokens that are real, of packed and padded.
    """

    packed: ContrastiveBatch
    padded: mix.Padded
    pairs: int
    load: flops.Load
    real: tuple[float, float]


def config(settings: Settings) -> Config:
    """A run of these settings, on the mix."""
    model = replace(
        geometry(settings.geometry), dtype=settings.dtype, attention=settings.attention, remat=settings.remat
    )
    return Config(
        model=model,
        data=DataConfig(rows=settings.rows, row_tokens=settings.row_tokens),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0),
    )


def batches(settings: Settings, kind: str) -> list[Batch]:
    """`settings.batches` batches of M-BEIR's mix, packed; or of items that are all as long, one a row ("equal")."""
    run, count = config(settings), settings.batches
    if kind == "equal":
        tokens = run.model.vision.patches + EQUAL_TEXT
        rows = max(2, settings.rows * settings.row_tokens // tokens // 2 * 2)
        run = replace(run, data=replace(run.data, layout="padded", rows=rows, row_tokens=tokens))
        pairs = mix.equal(run, count * rows // 2)
    else:
        pairs = mix.mixed(run, 8 + (count + 1) * max(16, settings.rows * settings.row_tokens // 200))
    run = mix.shaped(run, pairs)
    made = []
    # For the loader's first batch nothing waits that was too small for the one before: it has larger items than others.
    first = int(kind == "mix")
    for packed, held in mix.packed(run, pairs, count + first)[first:]:
        items = [pairs[place].items[side] for side in (0, 1) for place in held]
        padded = mix.padded(items)
        load = flops.of_items([len(item.tokens) for item in items], len(padded.pixels))
        real = (float((packed.packed.segments > 0).mean()), float(padded.mask.mean()))
        made.append(Batch(packed, padded, len(held), load, real))
    return made
