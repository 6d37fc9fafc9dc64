"""A tiny model compiled for TPU v5e without one, and what the plan says of it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jfe_jax import config as configs
from tests.support import tiny_training as tiny

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
    ),
]


def plan(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # libtpu reads its settings once, when it is loaded; and the CPU's device count here is the tests' own.
    path = folder / "config.yaml"
    path.write_text(configs.to_yaml(tiny.config()))
    environment = os.environ | {"XLA_FLAGS": "", "TPU_LOG_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "jfe_jax.cli.main", "plan", "--config", str(path), "--topology", "v5e:2x2", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_tiny_step_on_four_chips(tmp_path):
    done = plan(tmp_path, "--json", "--mesh.data=2", "--mesh.fsdp=2", "--model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chips"], found["fits"], found["train"]["rematerialized"]) == (4, True, [])
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    moved = found["train"]["collectives"]
    text = tiny.config().model.text
    gathered = [one for one in moved if one["kind"] == "all-gather" and one["what"].startswith("tower/up_df")]
    # Once forward, once again for the backward pass; nothing is recomputed, but nothing gathered is kept either.
    assert sum(one["bytes"] for one in gathered) in (size := text.width * text.mlp_dim * 2, 2 * size)
    # What is sent over a group of two is half of what is gathered.
    assert all(one["sent"] == one["bytes"] / 2 for one in gathered)
    # Tokens' embeddings are exchanged; of the table's gradient each chip sums the columns that it has.
    of_table = {one["kind"]: one["bytes"] for one in moved if one["what"].startswith("table")}
    assert "all-to-all" in of_table
    assert of_table.get("all-reduce", 0) <= text.vocab_size * text.width * 4 / 2
    memory = found["memory"]
    assert 0 < memory["parameters"] < memory["optimizer"] < memory["arguments"] < memory["peak"] < memory["hbm"]
    # So small that the loss stays on the chip: 32 candidates of 32 numbers, at least.
    assert memory["loss"] < memory["temporaries"] + memory["loss_on_chip"] and memory["loss_on_chip"] >= 32 * 32 * 4
    assert found["train"]["executed_flops"] >= 0.9 * found["train"]["model_flops"]
    assert 0 < found["embed"]["executed_flops"] < found["train"]["executed_flops"] / 2


def test_a_batch_that_is_too_large_names_its_buffers(tmp_path):
    rows = 2**21
    done = plan(tmp_path, "--json", f"--data.rows={rows}", "--step", "train")
    assert done.returncode == 1
    assert re.search(r"jfe plan: does not fit: [\d.]+ GiB of 15.75 GiB; the largest buffers at the memory", done.stderr)
    largest = json.loads(done.stdout)["largest"]
    assert len(largest) == 3
    # A quarter of the rows: the logits of 32 tokens for 4 heads over 32.
    assert largest[0].startswith(f"{rows // 4 * 32 * 4 * 32 * 4 / 2**30:.2f} GiB f32[") and "tower" in largest[0]


def test_meshes_on_slices():
    """Slices meet on `data` alone; any sizes are found on a torus."""
    code = """
from jfe_jax.parallel import sharding
from jfe_jax.config import MeshConfig
from jfe_jax.errors import UserError
from jfe_jax.plan import aot_compile
from jfe_jax.plan.topology import Topology

two = Topology.parse("v5e:2x2", 2)
aot_compile.prepare(two)
devices = two.devices()
mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2), devices)
print([[device.slice_index for device in row] for row in mesh.devices[:, :, 0]])
try:
    sharding.make_mesh(MeshConfig(data=1, fsdp=8), devices)
except UserError as error:
    print(error)
# Sizes for which an axis of the torus has to be cut.
cut = sharding.make_mesh(MeshConfig(data=16, fsdp=16), Topology.parse("v5p:4x8x8").devices())
print(len({device.id for device in cut.devices.flat}))
"""
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    slices, refused, cut = done.stdout.strip().splitlines()
    assert slices == "[[0, 0], [0, 0], [1, 1], [1, 1]]"
    assert "8 devices in 2 slices; data has to be a multiple of 2" in refused
    assert cut == "256"
