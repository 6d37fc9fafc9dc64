"""`jfe embed`: items of a JSONL file → an index directory."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="run, step or Hugging Face directory")
    parser.add_argument(
        "--items",
        required=True,
        type=Path,
        metavar="FILE.jsonl",
        help='lines {"id", "instruction", "text", "image"}; images relative to the file',
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the index")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default), float16 or int8 with a scale for each row: on disk"
    )
    parser.add_argument("--shard", type=int, default=8192, metavar="N", help="items per shard (default 8192)")
    parser.add_argument("--overwrite", action="store_true", help="start over and replace existing output")


def run(args: argparse.Namespace) -> None:
    from jfe_jax.cli.locked_output import locked_output
    from jfe_jax.errors import UserError
    from jfe_jax.parallel.distributed import initialize_distributed

    if args.shard < 1:
        raise UserError(f"--shard {args.shard}: at least one item")
    initialize_distributed()
    with locked_output(args.out, "embed"):
        _embed(args)


def _embed(args: argparse.Namespace) -> None:
    from jfe_jax.embedding.items_jsonl import ItemsFile
    from jfe_jax.parallel.distributed import all_or_none, is_process_zero
    from jfe_jax.utils.progress import progress_bar

    # Check the entire file before loading the model, so that an invalid line is reported at once.
    with all_or_none():
        source = ItemsFile(args.items)
    import jax

    from jfe_jax.embedding.embed import embed
    from jfe_jax.embedding.retriever import Retriever

    with all_or_none():
        retriever = Retriever.load(args.checkpoint)
    with progress_bar("embedding", -(-len(source) // jax.process_count())) as progress:
        done = embed(
            retriever,
            source,
            args.out,
            dtype=args.dtype,
            shard=args.shard,
            overwrite=args.overwrite,
            progress=progress,
        )
    if not is_process_zero():
        return
    told = done.index.manifest
    cut = f"; {told.cut_texts} texts were cut" if told.cut_texts else ""
    kept = f"; {done.kept} of {done.shards} shards were there and are undamaged" if done.kept else ""
    rounded = f"; stored as {told.dtype}: scores are off by {told.score_error:.1e} at most" * (told.dtype != "float32")
    print(f"{told.items} embeddings of width {told.width} in {args.out}{kept}{rounded}{cut}")
