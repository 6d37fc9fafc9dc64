"""`jfe search`: one query against an embedded pool."""

import argparse
from pathlib import Path

FAISS = "faiss:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index",
        required=True,
        action="append",
        metavar="DIR",
        help="made by `jfe embed`; a second --index faiss:HNSW32 (or another of faiss's kinds, as faiss:IVF1024,PQ64) "
        "searches approximately, and says with what recall",
    )
    parser.add_argument("--text", metavar="T", help="the query's text")
    parser.add_argument("--image", type=Path, metavar="I", help="the query's image file")
    parser.add_argument("--instruction", metavar="X", help="what kind of thing is wanted")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="number of results (default 10)")
    parser.add_argument("--checkpoint", metavar="C", help="the model; by default the one that made the index")
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")
    parser.add_argument(
        "--device-approx",
        type=float,
        metavar="R",
        help="let the devices choose approximately with expected recall R, as 0.95 (made for the TPU; exact elsewhere)",
    )


def run(args: argparse.Namespace) -> None:
    import json
    import sys

    from jfe_jax.errors import UserError

    folder, kind = _places(args.index)
    if not args.text and args.image is None:
        raise UserError("a query needs --text or --image, or both")
    if args.image is not None and not args.image.is_file():
        raise UserError(f"--image {args.image}: no such image file")
    if args.k < 1:
        raise UserError(f"-k {args.k}: at least one result")
    if args.device_approx is not None and not 0 < args.device_approx < 1:
        raise UserError(f"--device-approx {args.device_approx}: a recall between 0 and 1")
    if kind is not None and args.device_approx is not None:
        raise UserError(f"--device-approx and --index {FAISS}{kind}: one or the other")

    from jfe_jax.data.item import Item
    from jfe_jax.embedding.index import Index
    from jfe_jax.embedding.retriever import Retriever

    index = Index.open(folder)
    maker = index.manifest.checkpoint
    if not args.checkpoint and not Path(maker).is_dir():
        raise UserError(f"{folder}: was made by {maker}, which is not there; say where it is with --checkpoint")
    retriever = Retriever.load(args.checkpoint or maker)
    index.require_made_by(retriever)
    item = Item(text=args.text, image=args.image, instruction=args.instruction)
    query = retriever.encode([item], names=["the query"])
    scores, rows, told = _search(index, kind, args.device_approx, query, min(args.k, len(index.ids)))
    if told:
        print(told, file=sys.stderr)
    for place, (score, row) in enumerate(zip(scores[0], rows[0], strict=True), 1):
        # Fewer than were asked for.
        if row < 0:
            break
        name = index.ids[row]
        if args.json:
            print(json.dumps({"rank": place, "score": round(float(score), 6), "id": name}, ensure_ascii=False))
        else:
            print(f"{place:4}  {score:7.4f}  {name}")


def _search(index, kind: str | None, target: float | None, query, k: int):
    """Scores and rows [1, k], and a line about the recall of what is not exact."""
    from jfe_jax.search.exact import Searcher
    from jfe_jax.search.faiss_index import RECALL_AT, FaissIndex, measure
    from jfe_jax.utils.progress import progress_bar

    if kind is not None:
        with progress_bar(f"{FAISS}{kind}", len(index.ids)) as progress:
            faiss = FaissIndex(index, kind, progress)
        return *faiss.search(query, k), f"{FAISS}{kind}: recall@{RECALL_AT} {faiss.measured:.3f} against exact search"
    if target is None:
        return *Searcher(index.rows, resident=False).search(query, k)[:2], ""
    searcher = Searcher(index.rows, recall=target)
    measured = measure(index, lambda queries, k: searcher.search(queries, k)[:2])
    return (
        *searcher.search(query, k)[:2],
        f"approx_max_k for {target}: recall@{RECALL_AT} {measured:.3f} against exact search",
    )


def _places(given: list[str]) -> tuple[Path, str | None]:
    """The index's directory and faiss's kind, if one is named."""
    from jfe_jax.errors import UserError

    folders = [one for one in given if not one.startswith(FAISS)]
    kinds = [one.removeprefix(FAISS) for one in given if one.startswith(FAISS)]
    if len(folders) != 1 or len(kinds) > 1:
        raise UserError("--index: one directory that `jfe embed` made, and at most one faiss:KIND")
    return Path(folders[0]), (kinds or [None])[0]
