"""Compiles stage 2 at 3 B parameters for TPU slices, at fixed work per chip and in other settings.

Nothing runs, so only the compiler is timed. Each program is compiled in a separate process. Its plan is cached in a
directory and not compiled again.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.result import Cell, Progress, Result, Table, table
from jfe_jax import config as configs
from jfe_jax.config import Config

CONFIG = "configs/paligemma_3b/stage2.yaml"
# The number of chips that the batch of the config is sized for.
CHIPS = 256
SLICES = (
    ("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:16x16", 2), ("v5e:16x16", 4), ("v5p:4x4x4", 1),
    ("v6e:16x16", 1),
)  # fmt: skip
# The slice of CHIPS chips on which CHOICES are compared with the config as it is.
CHOSEN = "v5e:16x16"
CHOICES = {
    "as configured": (),
    "remat: full": ("--model.remat=full",),
    "remat: dots": ("--model.remat=dots",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where plans are cached, and which are made."""
    parser.add_argument("--dir", type=Path, default=Path("runs/plan"), metavar="DIR", help="keep plans here")
    parser.add_argument("--timeout", type=int, default=3600, metavar="S", help="seconds for one compilation")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Compiles the programs that are not cached, minutes for each.

    Raises:
      UserError: this is not the checkout, or libtpu is missing.
    """
    from jfe_jax.plan.sweep import PlanRunner
    from jfe_jax.plan.topology import Topology

    config = configs.load(CONFIG)
    with progress("plans", len(SLICES) + len(CHOICES)) as done:
        runner = PlanRunner(CONFIG, [], args.dir, args.timeout, lambda line: None)

        def plan(name: str, slices: int = 1, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
            made = runner.plan(topology := Topology.parse(name, slices), (*sized(config, topology.chips), *overrides))
            done(1)
            return made

        slices = [plan(name, count) for name, count in SLICES]
        choices = {label: plan(CHOSEN, overrides=overrides) for label, overrides in CHOICES.items()}
    return Result(
        tables=[of_slices(slices), of_choices(choices)],
        packages=["jax", "libtpu"],
        method=f"{config.data.pairs:,} pairs of {CONFIG} on {CHIPS} chips, the same number per chip on the others; the "
        "shortest times that compute, main memory (HBM) and interconnect allow (docs/scaling/plan.md)",
        notes=notes([*slices, *choices.values()]),
    )


def sized(config: Config, chips: int) -> tuple[str, ...]:
    """Returns the config's work per chip for the given number of chips, as overrides."""
    from jfe_jax.plan.aot_compile import scale_batch
    from jfe_jax.plan.sweep import batch_overrides

    return (
        *batch_overrides(scale_batch(config, chips / CHIPS)),
        f"--mesh.data={chips // config.mesh.fsdp // config.mesh.tensor}",
    )


def of_slices(plans: list[dict[str, Any]]) -> Table:
    """A row for each of SLICES."""
    formats = {
        "": "", "pairs": ",d", "peak, GiB": ".1f", "of": ".0f", "sent, GiB": ".2f",
        "compute / HBM / interconnect, ms": "", "MFU, overlapped": ".1%", "MFU, serial": ".1%",
        "compiled, s": ".0f", "CPU, s": ".0f",
    }  # fmt: skip
    rows: list[list[Cell]] = []
    for plan, (name, count) in zip(plans, SLICES, strict=True):
        label = name if count == 1 else f"{count} x {name}"
        if not plan["fits"]:
            rows.append([f"{label}: {_problem(plan)}", *[None] * 4, "–", *[None] * 4])
            continue
        line, step, memory = plan["train"]["roofline"], plan["train"], plan["memory"]
        rows.append(
            [label, plan["batch"]["pairs"], memory["peak"] / 2**30, memory["hbm"] / 2**30, _sent(plan), _times(plan),
             line["mfu_overlapped"], line["mfu_serial"], step["compile_seconds"], step["compile_cpu_seconds"]]
        )  # fmt: skip
    return table(formats, rows, "What a chip needs and sends")


def of_choices(plans: dict[str, dict[str, Any]]) -> Table:
    """The fastest first, if nothing overlapped; last what does not fit."""
    formats = {
        "": "", "peak, GiB": ".1f", "sent, GiB": ".2f", "compute / HBM / interconnect, ms": "",
        "step, overlapped, ms": ".0f", "step, serial, ms": ".0f",
    }  # fmt: skip
    rows: list[list[Cell]] = []
    for label, plan in sorted(plans.items(), key=lambda one: _serial(one[1])):
        if not plan["fits"]:
            rows.append([f"{label}: {_problem(plan)}", None, None, "–", None, None])
            continue
        line = plan["train"]["roofline"]
        shortest = [1e3 * line[name] for name in ("overlapped", "serial")]
        rows.append([label, plan["memory"]["peak"] / 2**30, _sent(plan), _times(plan), *shortest])
    return table(formats, rows, f"The same pairs in other settings on {CHOSEN}")


def notes(plans: list[dict[str, Any]]) -> list[str]:
    """States what all plans that fit have in common."""
    fitting = [plan for plan in plans if plan["fits"]]
    if not fitting:
        return []
    copied = sum(len(plan["train"]["rematerialized"]) for plan in fitting)
    share = max(plan["memory"]["loss"] / plan["memory"]["temporaries"] for plan in fitting)
    on_chip = max(plan["memory"]["loss_on_chip"] for plan in fitting) / 2**20
    return [
        f"The loss's temporaries are at most {share:.1%} of a step's in HBM, and {on_chip:.0f} MiB on the chip.",
        f"Arrays that the compiler copied in full to change their layout: {copied}.",
    ]


def _problem(plan: dict[str, Any]) -> str:
    return plan["problem"].split(";")[0]


def _serial(plan: dict[str, Any]) -> float:
    return plan["train"]["roofline"]["serial"] if plan["fits"] else float("inf")


def _sent(plan: dict[str, Any]) -> float:
    return sum(one["sent"] for one in plan["train"]["collectives"]) / 2**30


def _times(plan: dict[str, Any]) -> str:
    line = plan["train"]["roofline"]
    return " / ".join(f"{1e3 * line[name]:.0f}" for name in ("compute", "hbm", "interconnect"))
