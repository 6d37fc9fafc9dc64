"""The tables of compiled plans, from plans made up here; compiling is tested in tests/plan."""

import argparse
from pathlib import Path

import pytest

from benchmarks import plan as bench
from benchmarks.common import tables
from jfe_jax import config as configs
from jfe_jax.errors import UserError
from jfe_jax.plan.sweep import PlanRunner

ROOT = Path(__file__).parents[2]


def made_up(overlapped: float) -> dict:
    line = {"compute": overlapped, "hbm": 0.1, "interconnect": 0.2, "overlapped": overlapped}
    line |= {"serial": overlapped + 0.2, "mfu_overlapped": 0.8, "mfu_serial": 0.6}
    step = {"roofline": line, "collectives": [{"sent": 2**29}, {"sent": 2**30}], "rematerialized": []}
    memory = {"peak": 3 * 2**30, "hbm": 2**34, "temporaries": 1000, "loss": 20, "loss_on_chip": 2**22}
    return {
        "fits": True, "batch": {"pairs": 4096}, "memory": memory,
        "train": step | {"compile_seconds": 70.1, "compile_cpu_seconds": 120.2},
    }  # fmt: skip


TOO_LARGE = {"fits": False, "problem": "does not fit: 15.79 GiB of 15.75 GiB; the largest buffers: a; b"}


def test_settings_are_ranked_and_what_does_not_fit_comes_last(monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = []

    def plan(self, topology, overrides):
        asked.append((str(topology), overrides))
        if "--model.remat=dots" in overrides:
            return TOO_LARGE
        return made_up(0.9 if "--model.remat=full" in overrides else 0.7)

    monkeypatch.setattr(PlanRunner, "plan", plan)
    dots, full = ("--model.remat=dots",), ("--model.remat=full",)
    monkeypatch.setattr(bench, "CHOICES", {"large": dots, "slow": full, "as configured": ()})
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    told = []

    class Bar:
        def __init__(self, name, total):
            self.total = total

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            assert sum(told) == self.total

    result = bench.run(parser.parse_args([]), Bar)
    slices, choices = result.tables
    by_name = {row[0]: row[1:] for row in slices.rows}
    assert by_name["v5e:8x8"][:5] == [4096, 3.0, 16.0, 1.5, "700 / 100 / 200"]
    assert [row[0] for row in choices.rows] == [
        "as configured",
        "slow",
        "large: does not fit: 15.79 GiB of 15.75 GiB",
    ]
    assert choices.rows[1][-2:] == pytest.approx([900, 1100])
    assert "at most 2.0% of a step's in HBM, and 4 MiB on the chip" in result.notes[0]
    assert result.notes[1].endswith(": 0.")
    assert "| – |" in tables.as_markdown(result)
    # 64 chips have a quarter of 256 chips' batch.
    pairs = configs.load(bench.CONFIG).data.pairs
    assert f"--data.pairs={pairs // 4}" in dict(asked)["v5e:8x8"] and "--mesh.data=4" in dict(asked)["v5e:8x8"]


def test_away_from_the_checkout_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(UserError, match=r"stage2\.yaml: cannot read"):
        bench.run(parser.parse_args([]), None)
