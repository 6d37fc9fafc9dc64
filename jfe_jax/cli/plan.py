"""`jfe plan`: compiles a config ahead of time for a TPU slice that need not be attached."""

import argparse
import json
import sys
from pathlib import Path

from jfe_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "jfe plan --config FILE --topology v5e:16x16 [--slices N] [--json] [--search | --scaling] [--key.sub=value ...]"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument("--topology", required=True, metavar="T", help="v5e:16x16, v5p:4x4x4, v6e:8x8, …")
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="number of identical slices, connected by the data center network",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep HLO texts, and results of --search and --scaling")
    parser.add_argument("--step", choices=("both", "train"), default="both", help="train: skip the embedding step")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and chunk counts, except those that are set; rank the settings that fit",
    )
    how.add_argument("--scaling", action="store_true", help="16 to 1024 chips at this topology's work per chip")
    parser.add_argument("--limit", type=int, default=6, metavar="N", help="--search: compile the N most promising")
    parser.add_argument(
        "--timeout",
        type=int,
        default=1800,
        metavar="S",
        help="time limit per compilation of --search and --scaling, in seconds",
    )
    parser.set_defaults(overrides=[])
    parser.epilog = "--key.sub=value overrides a value of the config, as --model.remat=up"


def run(args: argparse.Namespace) -> None:
    """Compiles the config and prints the plan.

    Raises:
      UserError: libtpu is missing, the slice is unsupported or does not match the config, or the step does not fit.
    """
    from jfe_jax import config as configs
    from jfe_jax.plan.topology import Topology

    config = configs.load(args.config, args.overrides)
    topology = Topology.parse(args.topology, args.slices)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.search or args.scaling:
        from jfe_jax.plan import sweep

        runner = sweep.PlanRunner(args.config, args.overrides, args.out, args.timeout, say)
        rows = sweep.plan_scaling(runner, config, topology) if args.scaling else sweep.search_settings(
            runner, config, topology, args.limit
        )  # fmt: skip
        print(json.dumps(rows, indent=2) if args.json else sweep.format_table(rows))
        if not any(row["fits"] for row in rows):
            raise UserError("nothing that was tried fits")
        return
    from jfe_jax.plan import aot_compile as compiling
    from jfe_jax.plan import report

    logs = compiling.configure_libtpu(topology)
    plan = report.make_plan(config, topology, logs, say, args.out, embedding=args.step == "both")
    print(json.dumps(plan, indent=2) if args.json else report.format_plan(plan))
    if not plan["fits"]:
        raise UserError(plan["problem"])
