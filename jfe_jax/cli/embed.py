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


def run(args: argparse.Namespace) -> None:
    from jfe_jax.cli.progress import bar
    from jfe_jax.retrieval.embed import embed_items, read_items, write_index
    from jfe_jax.retrieval.retriever import Retriever

    # The whole file is checked before the model is opened: a bad line shows at once.
    items = list(read_items(args.items))
    retriever = Retriever.load(args.checkpoint)
    with bar("embedding", len(items)) as progress:
        ids, embeddings = embed_items(retriever, items, progress)
    write_index(args.out, retriever, ids, embeddings, args.items)
    cut = f"; {retriever.cut_texts} texts were cut" if retriever.cut_texts else ""
    print(f"{len(ids)} embeddings of width {embeddings.shape[1]} in {args.out}{cut}")
