"""`jfe train`: one stage of training."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--resume`, `--print-config`; every other `--key.sub=value` overrides the config."""
    parser.usage = "jfe train --config FILE [--key.sub=value ...] [--resume {auto,never}] [--print-config]"
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): continue the output directory's newest checkpoint; never: refuse one that has any",
    )
    parser.add_argument(
        "--stopped-status",
        type=int,
        default=0,
        metavar="N",
        help="exit status of a run that was preempted, saved and has steps left, so that a scheduler can restart it",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    parser.set_defaults(overrides=[])
    parser.epilog = "--key.sub=value overrides a value of the config, as --optimizer.steps=100"


def run(args: argparse.Namespace) -> None:
    """Raises UserError as `loop.train` does."""
    from jfe_jax import config as configs

    config = configs.load(args.config, args.overrides)
    if args.print_config:
        print(configs.to_yaml(config), end="")
        return
    from jfe_jax.cli.locked_output import locked_output
    from jfe_jax.parallel.distributed import initialize_distributed, is_process_zero
    from jfe_jax.utils.local_paths import require_checkpoint_path

    require_checkpoint_path(config.output, "output")
    initialize_distributed()
    from jfe_jax.train.trainer import train

    # Only process 0 logs.
    logs = is_process_zero()
    with locked_output(config.output, "train"):
        outcome = train(config, args.resume, lambda line: logs and print(line, file=sys.stderr, flush=True))
    if logs:
        print(outcome.message)
    if outcome.step < config.optimizer.steps and args.stopped_status:
        sys.exit(args.stopped_status)
