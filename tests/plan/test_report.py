"""What the compiler refuses, as one line; the rough estimates of a search; batches that grow with the chips."""

import subprocess
from pathlib import Path

import pytest

from jfe_jax import config as configs
from jfe_jax.cli.main import main
from jfe_jax.errors import UserError
from jfe_jax.plan import aot_compile as compiling
from jfe_jax.plan import sweep
from jfe_jax.plan.buffer_assignment import BufferAssignment, BufferValue
from jfe_jax.plan.collectives import Collective
from jfe_jax.plan.hlo_costs import HloCosts
from jfe_jax.plan.roofline import compute_roofline
from jfe_jax.plan.topology import GroupLinks, Topology

STAGE2 = Path(__file__).parents[2] / "configs" / "paligemma_3b" / "stage2.yaml"
# As libtpu 0.0.42.1 says it.
REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.12G) exceeds "
    "available HBM (15.75G)."
)


def test_what_does_not_fit_names_the_largest_buffers():
    values = [
        BufferValue(
            f"bf16[{size},1024]",
            "jit(step)/jvp()/tower/while/body/dot_general",
            0,
            2**30 * at,
            2048 * size,
            0,
            True,
            0,
            9,
        )
        for at, size in enumerate((3, 700000, 900000, 800000))
    ]
    error = compiling._explain_compile_error(REFUSED, BufferAssignment(values))
    assert isinstance(error, compiling.OutOfMemory)
    assert (error.needed, error.available) == (int(22.12 * 2**30), int(15.75 * 2**30))
    assert error.largest == tuple(
        f"{size} GiB {array} (tower)"
        for size, array in (("1.72", "bf16[900000,1024]"), ("1.53", "bf16[800000,1024]"), ("1.34", "bf16[700000,1024]"))
    )
    assert str(error).startswith("does not fit: 22.12 GiB of 15.75 GiB; the largest buffers at the memory peak: 1.72")
    assert str(compiling._explain_compile_error(REFUSED, None)) == "does not fit: 22.12 GiB of 15.75 GiB"
    assert "failed on the step: INTERNAL: no" in str(compiling._explain_compile_error("INTERNAL: no\nmore", None))


def test_the_roofline_by_hand():
    """197 TFLOP, 409.5 GB of memory traffic and 9 GB sent on two links of 4.5e10: 1 s, 0.5 s and 0.1 s."""
    topology = Topology.parse("v5e:4x4")
    moved = [Collective("all-gather", "bf16[1]", "", 1, 18e9, (0, 1), 9e9)]
    line = compute_roofline(
        topology, HloCosts(197e12, 409.5e9), moved, lambda _: GroupLinks(9e10, "x"), 0.8 * 16 * 197e12
    )
    assert (line.compute, line.hbm, line.interconnect) == pytest.approx((1.0, 0.5, 0.1))
    assert (line.bound, line.overlapped, line.serial) == ("compute", pytest.approx(1.0), pytest.approx(1.1))
    assert (line.mfu_overlapped, line.mfu_serial) == pytest.approx((0.8, 0.8 / 1.1))


def test_a_search_tries_only_what_divides_and_prefers_what_fits():
    config, topology = configs.load(STAGE2), Topology.parse("v5e:16x16")
    found = list(sweep.enumerate_settings(config, topology))
    assert any("--mesh.fsdp=16" in one.overrides and "--loss.grad_cache_chunks=8" in one.overrides for one in found)
    # SigLIP's 1152 has no divisor 256.
    assert not any("--mesh.fsdp=256" in one.overrides for one in found)
    by_remat = {
        one.overrides[3].split("=")[1]: one
        for one in found
        if one.overrides[:3] == ("--mesh.data=16", "--mesh.fsdp=16", "--mesh.tensor=1")
        and one.overrides[4].endswith("=1")
    }
    assert by_remat["full"].memory < by_remat["up"].memory < by_remat["dots"].memory < by_remat["none"].memory
    one = by_remat["up"]
    assert one.agrees({"mesh.data": "-1", "model.remat": "up", "data.rows": "64"})
    assert not one.agrees({"mesh.data": "8"})
    assert by_remat["full"].seconds > by_remat["up"].seconds > by_remat["dots"].seconds > by_remat["none"].seconds


def test_a_batch_grows_with_the_chips():
    config = configs.load(STAGE2)
    assert compiling.scale_batch(config, 0.0625).data.pairs == config.data.pairs // 16
    with pytest.raises(UserError, match=r"data.pairs: 4096 times 0.0001 is not a positive integer"):
        compiling.scale_batch(config, 0.0001)


def test_results_of_a_search_are_kept(tmp_path, monkeypatch):
    runs = []

    def run(command, **_):
        runs.append(command)
        return subprocess.CompletedProcess([], 0, '{"fits": false, "problem": "too large", "topology": "v5e:4x4"}', "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    runner = sweep.PlanRunner(str(STAGE2), [], tmp_path, 10, lambda line: None)
    for _ in range(2):
        assert runner.plan(Topology.parse("v5e:4x4"), ("--mesh.fsdp=8",))["problem"] == "too large"
    assert len(runs) == 1 and "--mesh.fsdp=8" in runs[0]
    runner.plan(Topology.parse("v5e:4x4"), ("--mesh.fsdp=4",))
    assert len(runs) == 2


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--topology", "v5e:16"], "2 dimensions"),
        (["--topology", "v5e:4x4", "--mesh.fdsp=1"], "unknown key mesh.fdsp; did you mean mesh.fsdp"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert main(["plan", "--config", str(STAGE2), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jfe plan: ") and says in error and error.count("\n") == 1
