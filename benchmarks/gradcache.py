"""Compares a step in GradCache chunks with a plain step of the same pairs, and the memory of both by batch size.

The memory is XLA's plan for a compiled program (`memory_analysis`), on eight simulated devices or on the GPU. The
program need not run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Progress, Result, ratios, table
from jfe_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, TextConfig, VisionConfig
from jfe_jax.data.batch import ContrastiveBatch, PackedBatch
from jfe_jax.errors import UserError

# Rows of a pair: a query and a candidate of one image and its text each.
ROW_TOKENS, ROWS, IMAGES = 64, 1, 2
DEVICES = 8
# What an argument is if it is not given, and up to how many pairs the plain step is compiled.
DEFAULTS = {
    "cpu": {"pairs": 64, "chunks": 4, "batches": "512,1024,2048,4096,8192,16384", "chunk": 256},
    "gpu": {"pairs": 2048, "chunks": 8, "batches": "4096,16384,65536", "chunk": 512},
}
PLAIN_UP_TO = {"cpu": 2048, "gpu": 4096}


class Memory(NamedTuple):
    """Bytes of temporary memory per device, excluding state and batch: of the step in chunks, of the plain step, and of
    the loss alone; 0 where it was not compiled."""

    pairs: int
    chunked: int
    plain: int
    loss: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the settings of both tables."""
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    words = {name: f"default {DEFAULTS['cpu'][name]}, on a GPU {DEFAULTS['gpu'][name]}" for name in DEFAULTS["cpu"]}
    parser.add_argument("--pairs", type=int, help=f"of the timed steps; {words['pairs']}")
    parser.add_argument("--chunks", type=int, help=words["chunks"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", help=f"pairs of the memory table; {words['batches']}")
    parser.add_argument("--chunk", type=int, help=f"pairs of a chunk in the memory table; {words['chunk']}")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times both steps, and reads the memory that XLA plans for them.

    Raises:
      UserError: there is no GPU to run on.
    """
    given = {name: getattr(args, name) or value for name, value in DEFAULTS[args.device].items()}
    pairs, chunks, chunk = (given[name] for name in ("pairs", "chunks", "chunk"))
    card = _card() if args.device == "gpu" else ""
    with progress("steps", 2 * args.rounds) as done:
        seconds = times(pairs, chunks, args.rounds, done)
    plain = seconds["plain"]
    steps = [["plain", plain, None], [f"{chunks} chunks", seconds["chunked"], ratios(seconds["chunked"], plain)]]
    wanted = [int(number) for number in given["batches"].split(",")], chunk, PLAIN_UP_TO[args.device]
    rows = [
        [f"{row.pairs:,}", *(size / 2**20 if size else None for size in row[1:])]
        for row in (_compile_all(*wanted, devices=1) if card else memory(*wanted))
    ]
    where = "" if card else f" of each of {DEVICES} simulated devices"
    return Result(
        tables=[
            table({"step": "", "s": ".3f", "x plain": ".2f"}, steps, f"A step of {pairs:,} pairs"),
            table(
                {"B": "", "chunked": ",.1f", "plain": ",.1f", "loss alone": ",.1f"},
                rows,
                f"Temporary memory{where}, MiB, in chunks of {chunk} pairs",
            ),
        ],
        packages=["jax"],
        method=f"{args.rounds} interleaved rounds: median (min to max)"
        + ("; float32, products too (jax_default_matmul_precision highest)" if card else ""),
        checked="the losses of both steps, round by round, equal to 1e-3",
        device=card,
    )


def _card() -> str:
    import jax

    card = jax.devices()[0]
    if card.platform != "gpu":
        raise UserError(f"JAX sees no GPU, but a {card.device_kind}: pip install 'jfe-jax[cuda]', or --device cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    return card.device_kind


def config(pairs: int, chunks: int, devices: int = 1) -> Config:
    """PaliGemma's architecture with 6 M parameters; a batch of `pairs`, half of whose tokens are patches."""
    return Config(
        model=ModelConfig(
            vision=VisionConfig(image_size=56, patch_size=14, width=192, depth=4, mlp_dim=768, num_heads=3),
            text=TextConfig(
                vocab_size=4096, width=256, depth=4, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64
            ),
            image_token=4095,
        ),
        data=DataConfig(pairs=pairs, rows=ROWS * pairs, row_tokens=ROW_TOKENS, image_slots=IMAGES * pairs),
        loss=LossConfig(grad_cache_chunks=chunks, tile_mib=4, keep_mib=0),
        mesh=MeshConfig(data=1, fsdp=devices),
    )


def times(pairs: int, chunks: int, rounds: int, progress: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of "plain" and "chunked", from one state on the same pairs; checks that their losses are the same."""
    import jax

    from jfe_jax.parallel import sharding
    from jfe_jax.train import train_state as states
    from jfe_jax.train.train_step import make_train_step

    host = batch(config(pairs, chunks), chunks)
    losses: dict[str, list[float]] = {}

    def side(name: str, count: int) -> Callable[[], None]:
        training = states.make_train_setup(config(pairs, count), sharding.make_mesh(MeshConfig(data=1)))
        there = sharding.put_batch(host, training.mesh, count)
        step, state, losses[name] = make_train_step(training), states.init_train_state(training), []

        def work() -> None:
            nonlocal state
            state, metrics = jax.block_until_ready(step(state, there))
            losses[name].append(float(metrics["loss"]))

        return work

    sides = {"plain": side("plain", 1), "chunked": side("chunked", chunks)}
    # Compiles.
    for work in sides.values():
        work()
    seconds = by_turns(sides, rounds, progress)
    np.testing.assert_allclose(losses["plain"], losses["chunked"], rtol=1e-3)
    return seconds


def memory(batches: Sequence[int], chunk: int, plain_up_to: int) -> list[Memory]:
    """Compiles for eight devices, in a process of its own: chunks of `chunk` pairs, and the plain step up to a size."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gradcache", json.dumps([list(batches), chunk, plain_up_to])],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [Memory(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def batch(settings: Config, groups: int) -> ContrastiveBatch:
    """Makes random pairs in the given number of groups, each item half patches and half text."""
    random = np.random.default_rng(0)
    data, patches = settings.data, settings.model.vision.patches
    each, length = data.pairs // groups, ROW_TOKENS // 2
    shape = (groups, each, ROW_TOKENS)
    tokens = random.integers(4, 4000, shape).astype(np.int32)
    for start in (0, length):
        tokens[..., start : start + patches] = settings.model.image_token
    starts = np.arange(each)[:, None] * ROW_TOKENS + [0, length]
    # Queries are the first of each row, candidates the second.
    starts = np.broadcast_to(starts.T.reshape(-1), (groups, 2 * each)).astype(np.int32)
    side = settings.model.vision.image_size
    packed = PackedBatch(
        tokens,
        np.broadcast_to(np.repeat([1, 2], length), shape).astype(np.int32),
        np.broadcast_to(np.tile(np.arange(length), 2), shape).astype(np.int32),
        random.integers(0, 256, (groups, 2 * each, side, side, 3)).astype(np.uint8),
        starts,
        starts + length - 1,
        np.stack([starts, starts + length], axis=-1),
        np.ones((groups, 2 * each), bool),
    )
    numbers = np.arange(groups * each, dtype=np.int32).reshape(groups, each)
    return ContrastiveBatch(packed, numbers, np.zeros_like(numbers), numbers[..., None])


def _compile_all(batches: Sequence[int], chunk: int, plain_up_to: int, devices: int = DEVICES) -> list[Memory]:
    return [
        Memory(
            pairs,
            _temporary(pairs, pairs // chunk, devices),
            _temporary(pairs, 1, devices) if pairs <= plain_up_to else 0,
            _temporary(pairs, 1, devices, loss_only=True),
        )
        for pairs in batches
    ]


def _temporary(pairs: int, chunks: int, devices: int, loss_only: bool = False) -> int:
    import jax

    from jfe_jax.parallel import sharding
    from jfe_jax.train import train_state as states
    from jfe_jax.train.train_step import loss_from_embeddings, make_train_step

    settings = config(pairs, chunks, devices)
    training = states.make_train_setup(settings, sharding.make_mesh(settings.mesh))
    there = _abstract(settings, chunks, sharding.batch_sharding(training.mesh, chunks))
    if not loss_only:
        return make_train_step(training).lower(training.abstract, there).compile().memory_analysis().temp_size_in_bytes
    embeddings = jax.ShapeDtypeStruct(
        (*there.packed.valid.shape, settings.model.text.width), np.float32, sharding=there.packed.valid.sharding
    )

    def loss(parameters: Any, embeddings: jax.Array, batch: ContrastiveBatch) -> Any:
        with jax.sharding.use_abstract_mesh(training.mesh.abstract_mesh):
            return jax.grad(lambda *both: loss_from_embeddings(training, *both, batch)[0], argnums=(0, 1))(
                parameters, embeddings
            )

    compiled = jax.jit(loss).lower(training.abstract.loss, embeddings, there).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _abstract(settings: Config, chunks: int, sharding: Any) -> ContrastiveBatch:
    # The batch's shapes, from one of a single pair to a group.
    import jax

    devices = settings.mesh.fsdp
    groups = devices * chunks
    each = settings.data.pairs // groups
    small = batch(replace(settings, data=replace(settings.data, pairs=1)), 1)

    def one(x: np.ndarray) -> Any:
        shape = (chunks, devices, each * x.shape[1], *x.shape[2:])
        return jax.ShapeDtypeStruct(shape[1:] if chunks == 1 else shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, small)


if __name__ == "__main__":
    print(json.dumps(_compile_all(*json.loads(sys.argv[1]))))
