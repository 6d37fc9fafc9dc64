"""`jfe data emoji`: fetches the emoji sets and writes the benchmark."""

import argparse
import sys
from collections import Counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory, in M-BEIR's layout")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds and the choice of queries (%(default)s)")
    parser.add_argument("--fold", type=int, default=0, help="which fifth of the base emoji is tested on (%(default)s)")


def run(args: argparse.Namespace) -> None:
    from jfe_jax.datasets import emoji
    from jfe_jax.utils.output_lock import output_lock

    with output_lock(args.out, "jfe data emoji"):
        counts = emoji.write_benchmark(
            args.out, args.size, args.seed, args.fold, progress=lambda line: print(line, file=sys.stderr, flush=True)
        )
    splits: Counter[str] = Counter()
    for name, count in counts.items():
        splits[name.partition("/")[0]] += count
    print(f"{args.out}: queries of " + ", ".join(f"{split} {count}" for split, count in splits.items()))
