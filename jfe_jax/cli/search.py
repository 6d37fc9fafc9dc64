"""`jfe search`: one query against an embedded pool."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, type=Path, metavar="DIR", help="made by `jfe embed`")
    parser.add_argument("--text", metavar="T", help="the query's text")
    parser.add_argument("--image", type=Path, metavar="I", help="the query's image file")
    parser.add_argument("--instruction", metavar="X", help="what kind of thing is wanted")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="number of results (default 10)")
    parser.add_argument("--checkpoint", metavar="C", help="the model; by default the one that made the index")
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")


def run(args: argparse.Namespace) -> None:
    import json

    from jfe_jax.data.items import Item
    from jfe_jax.errors import UserError
    from jfe_jax.retrieval.index import Index
    from jfe_jax.retrieval.retriever import Retriever
    from jfe_jax.retrieval.search import search

    if not args.text and args.image is None:
        raise UserError("a query needs --text or --image, or both")
    if args.k < 1:
        raise UserError(f"-k {args.k}: at least one result")
    index = Index.open(args.index)
    retriever = Retriever.load(args.checkpoint or index.manifest.checkpoint)
    index.require_made_by(retriever)
    query = retriever.encode([Item(text=args.text, image=args.image, instruction=args.instruction)])
    found = search(query, index.rows, args.k)
    for place, (score, row) in enumerate(zip(found.scores[0], found.rows[0], strict=True), 1):
        name = index.ids[row]
        if args.json:
            print(json.dumps({"rank": place, "score": round(float(score), 6), "id": name}, ensure_ascii=False))
        else:
            print(f"{place:4}  {score:7.4f}  {name}")
