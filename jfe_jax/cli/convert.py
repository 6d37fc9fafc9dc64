"""`jfe convert`: between Hugging Face directories and our checkpoints."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, run, purpose in (
        (
            "from-hf",
            _from_hf,
            "PaliGemma, SigLIP or CLIP directory → checkpoint that training and evaluation open",
        ),
        ("to-hf", _to_hf, "checkpoint of the fusion model or a dual encoder → directory that transformers opens"),
    ):
        direction = directions.add_parser(name, help=purpose, description=purpose)
        direction.add_argument("source", type=Path, metavar="SRC", help="what is read")
        direction.add_argument("target", type=Path, metavar="DST", help="directory to write; must be new")
        direction.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="of the weights that are written; default: as they are in SRC (training computes from float32 copies)",
        )
        direction.add_argument(
            "--base",
            default="",
            metavar="DIR",
            help="of adapters: the Hugging Face directory or run that they stand on"
            if name == "from-hf"
            else "of adapters: what PEFT is to take as their base, a directory or a name on the Hub",
        )
        if name == "to-hf":
            direction.add_argument(
                "--merge", action="store_true", help="add the adapters to the weights: a whole model, in float32"
            )
            direction.add_argument(
                "--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights, as 5GB or 500MB"
            )
            direction.add_argument(
                "--layout",
                choices=("transformers", "sentence-transformers"),
                default="transformers",
                help="sentence-transformers adds what that library opens; transformers opens both",
            )
        direction.set_defaults(run=run)


def _from_hf(args: argparse.Namespace) -> None:
    from jfe_jax.hf.convert import from_hf
    from jfe_jax.utils.output_lock import output_lock

    with output_lock(args.target, "jfe convert from-hf"):
        parameters = from_hf(args.source, args.target, args.dtype, args.base)
    print(f"{args.target}: checkpoint of {parameters:,} parameters")


def _to_hf(args: argparse.Namespace) -> None:
    from jfe_jax.errors import UserError
    from jfe_jax.hf.convert import parse_bytes, to_hf
    from jfe_jax.utils.output_lock import output_lock

    try:
        shard_bytes = parse_bytes(args.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from error
    with output_lock(args.target, "jfe convert to-hf"):
        parameters = to_hf(
            args.source,
            args.target,
            args.dtype,
            shard_bytes,
            args.layout,
            args.merge,
            args.base,
            lambda line: print(line, file=sys.stderr),
        )
    print(f"{args.target}: Hugging Face directory of {parameters:,} parameters")
