"""`jfe convert`: between Hugging Face directories and our checkpoints."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, run, purpose in (
        ("from-hf", _from_hf, "PaliGemma directory (safetensors) → checkpoint that training and evaluation open"),
        ("to-hf", _to_hf, "checkpoint of the fusion model → directory that transformers opens"),
    ):
        direction = directions.add_parser(name, help=purpose, description=purpose)
        direction.add_argument("source", metavar="SRC", help="what is read")
        direction.add_argument("target", metavar="DST", help="directory to write; must be new")
        direction.set_defaults(run=run)


def _from_hf(args: argparse.Namespace) -> None:
    import dataclasses
    import tempfile
    from pathlib import Path

    from jfe_jax import checkpoint
    from jfe_jax.hf.load import load_hf
    from jfe_jax.hf.save import copy_tokenizer
    from jfe_jax.models import count_parameters

    config, params = load_hf(args.source)
    # Only the tokenizer's own files: the source directory holds the weights too.
    with tempfile.TemporaryDirectory() as tokenizer:
        copy_tokenizer(Path(args.source), Path(tokenizer))
        config = dataclasses.replace(config, output=args.target)
        checkpoint.save_model(args.target, config, params, tokenizer)
    print(f"{args.target}: checkpoint of {count_parameters(params):,} parameters")


def _to_hf(args: argparse.Namespace) -> None:
    from jfe_jax import checkpoint
    from jfe_jax.hf.save import save_hf
    from jfe_jax.models import count_parameters

    loaded = checkpoint.load_model(args.source)
    save_hf(loaded, args.target)
    print(f"{args.target}: Hugging Face directory of {count_parameters(loaded.params):,} parameters")
