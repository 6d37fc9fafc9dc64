"""The workload of `train-step`: the model, and the batches of both sides."""

import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.common.model_sizes import geometry
from benchmarks.train_step import batches as mix
from jfe_jax.config import Config, DataConfig, OptimizerConfig
from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.data.pipeline.batch_builder import EncodedPair
from jfe_jax.data.pipeline.suggest_bins import suggest
from jfe_jax.plan import flops

KINDS = ("mix", "equal")
# Tokens of an equal item in addition to its patches: a caption with its template.
EQUAL_TEXT = 32
# Maximum tokens of a step on a CPU: with more the ratio is the same and takes longer.
EQUAL_TOKENS = 6400
# Batches of the mix from which those are taken whose padding is the most usual.
CHOICE = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and batches to run.

    Attributes:
      geometry: of `geometry.GEOMETRIES`.
      rows, row_tokens: of a step on the mix; with equal items a step has as many tokens (on a CPU up to EQUAL_TOKENS),
        or a few fewer.
      attend: what attention works on with the mix, "rows", or "bins" as `binning.suggest` has them.
      batches: number of different batches, cycled through.
      dtype: of the products.
      attention, remat: of our model, see ModelConfig.
      checkpointing, compiled: of PyTorch's side.
      kept: PyTorch's process keeps freed memory, see `allocator`.
      device: "cpu" or "gpu".
    """

    geometry: str = "30m"
    rows: int = 10
    row_tokens: int = 640
    attend: str = "rows"
    batches: int = 3
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    checkpointing: bool = False
    compiled: bool = False
    kept: bool = False
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
    load: flops.Workload
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
    """`settings.batches` batches of M-BEIR's mix, packed; or of items that are all as long, one a row ("equal").

    How long the longest item of a batch of the mix is, which PyTorch pads to, is chance: of CHOICE batches those are
    taken that are padded nearest to their mean.
    """
    run, count = config(settings), settings.batches
    size = settings.rows * settings.row_tokens
    if kind == "equal":
        tokens = run.model.vision.patches + EQUAL_TEXT
        rows = max(2, (min(size, EQUAL_TOKENS) if settings.device == "cpu" else size) // tokens // 2 * 2)
        run = replace(run, data=replace(run.data, layout="padded", rows=rows, row_tokens=tokens))
        pairs = mix.equal(run, count * rows // 2)
        run = mix.shaped(run, pairs)
        return [_batch(pairs, *one) for one in mix.packed(run, pairs, count)]
    choice = max(CHOICE, count)
    pairs = mix.mixed(run, 8 + (choice + 1) * max(16, size // 200))
    run = mix.shaped(run, pairs)
    if settings.attend == "bins":
        bins = suggest([len(item.tokens) for pair in pairs for item in pair.items], size, settings.attention)
        run = replace(run, data=replace(run.data, bins=bins))
    # For the loader's first batch nothing waits that was too small for the one before: it has larger items than others.
    made = [_batch(pairs, *one) for one in mix.packed(run, pairs, choice + 1)[1:]]
    usual = statistics.mean(batch.real[1] for batch in made)
    return sorted(made, key=lambda batch: abs(batch.real[1] - usual))[:count]


def _batch(pairs: list[EncodedPair], packed: ContrastiveBatch, held: list[int]) -> Batch:
    items = [pairs[place].items[side] for side in (0, 1) for place in held]
    padded = mix.padded(items)
    load = flops.items_workload([len(item.tokens) for item in items], len(padded.pixels))
    real = (float((packed.packed.segments > 0).mean()), float(padded.mask.mean()))
    return Batch(packed, padded, len(held), load, real)
