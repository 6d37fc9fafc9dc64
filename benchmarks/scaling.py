"""Reads from the compiled training step what each of 1 to 8 simulated devices does: work, memory, traffic.

The batch is the same for all meshes, so work that is well split falls as 1/n. FLOPs are those of the matrix products in
the compiled program, times their loop counts. Memory is the program's input without the batch: parameters and
optimizer. The bytes that a device sends are counted on rings. Nothing runs: simulated devices give no indication of
speed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.common.result import Progress, Result, table
from jfe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TextConfig, VisionConfig

DEVICES = 8
# data, fsdp, tensor: alone, and what a pod has.
MESHES = (
    *((1, n, 1) for n in (1, 2, 4, 8)),
    *((n, 1, 1) for n in (2, 4, 8)),
    *((1, 1, n) for n in (2, 4, 8)),
    (2, 4, 1),
    (2, 2, 2),
)


class Share(NamedTuple):
    """Work, memory and traffic of each device of one mesh.

    Attributes:
      mesh: sizes of `data`, `fsdp` and `tensor`.
      flops: of matrix products, in one step.
      state: bytes of parameters and optimizer.
      sent: bytes in one step.
    """

    mesh: tuple[int, int, int]
    flops: float
    state: int
    sent: float


def config() -> Config:
    """PaliGemma's architecture with 3 M parameters, all sizes multiples of 8, on 16 pairs."""
    return Config(
        model=ModelConfig(
            vision=VisionConfig(image_size=56, patch_size=14, width=128, depth=2, mlp_dim=512, num_heads=8),
            text=TextConfig(
                vocab_size=4096, width=256, depth=2, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32
            ),
            image_token=4095,
        ),
        data=DataConfig(pairs=16, rows=16, row_tokens=64, image_slots=32),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing: the same programs are always compiled."""


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Compiles for every mesh, in a separate process that has the simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scaling"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    shares = []
    with progress("programs", len(MESHES)) as done:
        for line in process.stdout:
            shares.append(Share(*json.loads(line)))
            done(1)
    if process.wait():
        raise RuntimeError("the compiling process failed; what it said stands above")
    one = shares[0]
    rows = [
        [
            " x ".join(
                f"{axis} {size}" for axis, size in zip(("data", "fsdp", "tensor"), share.mesh, strict=True) if size > 1
            )
            or "one device",
            share.flops / 1e9,
            share.flops / one.flops,
            share.state / 2**20,
            share.state / one.state,
            share.sent / 2**20,
        ]
        for share in shares
    ]
    formats = {
        "mesh": "",
        "GFLOP": ".3f",
        "/ one device": ".3f",
        "state, MiB": ".2f",
        " / one device": ".3f",
        "sent, MiB": ".1f",
    }
    return Result(
        tables=[table(formats, rows, "Each device, in one step of the same batch")],
        packages=["jax"],
        method="read from the compiled program",
    )


def measure(settings: Config, mesh: tuple[int, int, int]) -> Share:
    """Compiles the step of `settings` on the first devices of this process."""
    import math

    import jax

    from jfe_jax.parallel import sharding
    from jfe_jax.plan.aot_compile import make_abstract_batch
    from jfe_jax.plan.collectives import find_collectives
    from jfe_jax.plan.hlo import HloModule
    from jfe_jax.plan.hlo_costs import count_hlo_costs
    from jfe_jax.train import train_state as states
    from jfe_jax.train.train_step import make_train_step

    data, fsdp, tensor = mesh
    settings = replace(settings, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    devices = sharding.make_mesh(settings.mesh)
    training, batch = states.make_train_setup(settings, devices), make_abstract_batch(settings, devices)
    # Machine code is not looked at; to make it fast would take most of the time.
    options = {"xla_backend_optimization_level": 0}
    compiled = make_train_step(training).lower(training.abstract, batch).compile(compiler_options=options)
    own = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(batch))
    module = HloModule(compiled.as_text())
    return Share(
        mesh,
        count_hlo_costs(module).flops,
        compiled.memory_analysis().argument_size_in_bytes - own,
        sum(each.sent for each in find_collectives(module)),
    )


def _main(meshes: Sequence[tuple[int, int, int]]) -> None:
    for mesh in meshes:
        print(json.dumps(measure(config(), mesh)), flush=True)


if __name__ == "__main__":
    _main(MESHES)
