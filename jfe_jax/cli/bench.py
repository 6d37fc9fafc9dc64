"""`jfe bench`: the benchmarks of the README."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    convert = names.add_parser("convert", help="from-hf beside a plain copy of the files: rate and peak memory")
    convert.add_argument("--gigabytes", type=float, default=4.5, help="size of the generated checkpoint")
    convert.add_argument("--rounds", type=int, default=3)
    convert.add_argument("--dir", type=Path, help="where to make it; needs three times the size")
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from jfe_jax.bench import convert

    result = convert.run(args.gigabytes, args.rounds, args.dir)
    print(
        f"{result.files:.2f} GB of weights, largest tensor {result.largest:.2f} GiB; medians of {args.rounds} rounds:\n"
        f"copy    {result.copy:6.1f} s  {result.files / result.copy:5.2f} GB/s\n"
        f"convert {result.convert:6.1f} s  {result.files / result.convert:5.2f} GB/s, peak memory {result.peak:.2f} GiB"
        f" (1.3 × the largest tensor + 1 GiB is {1.3 * result.largest + 1:.2f})"
    )
