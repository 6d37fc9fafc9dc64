"""`jfe eval`: evaluates a model with the protocols of M-BEIR and MMEB, or on a custom benchmark."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="run, step or Hugging Face directory")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="an M-BEIR or MMEB directory, or one with queries.jsonl, candidates.jsonl and qrels.txt",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="results.json, report.html, run files")
    parser.add_argument("--pool", help="M-BEIR's local, global or both (default local,global)")
    parser.add_argument("--split", help="of M-BEIR: a folder under query/ (default test)")
    parser.add_argument("--units", default="", metavar="U,U", help="only these, such as cirr_task7 (default all)")
    parser.add_argument(
        "--instruction",
        default="0",
        metavar="N",
        help="which prompt, from 0 (default 0); all: the mean over all; none",
    )
    parser.add_argument(
        "--queries",
        choices=("all", "text", "image"),
        default="all",
        help="use only this modality of image+text queries",
    )
    parser.add_argument(
        "--controls", action="store_true", help="also evaluate text-only and image-only queries in the same run"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where images are that are not unpacked: what `jfe data prepare` made; or what the wanted ones of a "
        "compressed mbeir_images.tar.gz are copied into, once (default EMBEDDINGS/images)",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="where embeddings are, or go: evaluations of one checkpoint can share them (default OUT/embeddings)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the candidates' embeddings on disk: float32 (default), float16 (half; scores off by some 1e-4) or "
        "int8 (a quarter; some 1e-2); the report says by how much at most",
    )
    parser.add_argument("--shard", type=int, default=8192, metavar="N", help="items embedded at a time (default 8192)")
    parser.add_argument(
        "--overwrite", action="store_true", help="recompute embeddings and searches, and replace existing output"
    )
    parser.add_argument(
        "--depth", type=int, default=50, metavar="K", help="results a query in the run files, at least 10 (default 50)"
    )


def run(args: argparse.Namespace) -> None:
    from jfe_jax.cli.locked_output import locked_output
    from jfe_jax.embedding.shard_store import DTYPES
    from jfe_jax.errors import UserError
    from jfe_jax.parallel.distributed import initialize_distributed

    if args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype}: it is {', '.join(DTYPES)}")
    if args.depth < 10:
        raise UserError(f"--depth {args.depth}: at least 10, as the figures need")
    if args.shard < 1:
        raise UserError(f"--shard {args.shard}: at least one item")
    initialize_distributed()
    with locked_output(args.out, "eval"):
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    from jfe_jax.evaluation.load import read_questions
    from jfe_jax.parallel.distributed import all_or_none, is_process_zero
    from jfe_jax.utils.progress import progress_bar

    # Read the data first, so that errors in it are reported before a model is loaded.
    with all_or_none():
        questions = read_questions(
            args.data,
            split=args.split,
            pools=() if args.pool is None else _listed(args.pool, ("local", "global")),
            units=_listed(args.units),
            instruction=_instruction(args.instruction),
        )
    from jfe_jax.embedding.retriever import Retriever
    from jfe_jax.evaluation import results
    from jfe_jax.evaluation.evaluator import Keep, ask
    from jfe_jax.reports import evaluation_report

    with all_or_none():
        retriever = Retriever.load(args.checkpoint)
    evaluation = ask(
        retriever,
        questions,
        given=list(dict.fromkeys([args.queries, *(("text", "image") if args.controls else ())])),
        depth=args.depth,
        keep=Keep(
            folder=args.out,
            embeddings=args.embeddings,
            images=args.images,
            dtype=args.dtype,
            shard=args.shard,
            overwrite=args.overwrite,
        ),
        progress=progress_bar,
    )
    with all_or_none():
        if is_process_zero():
            results.write_results(args.out, evaluation.results, evaluation.answers, evaluation.pools)
            evaluation_report.write(args.out / "report.html", evaluation)
    if not is_process_zero():
        return
    for warning in evaluation.results["warnings"]:
        print(f"warning: {warning}")
    if args.dtype != "float32":
        print(f"embeddings stored as {evaluation_report.rounding(evaluation.results)}")
    print(evaluation_report.headline(evaluation.results))
    print(f"{args.out / 'report.html'} ({evaluation.results['seconds']} s)")


def _listed(text: str, known: tuple[str, ...] = ()) -> list[str]:
    from jfe_jax.errors import UserError

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if known and name not in known:
            raise UserError(f"--pool {name}: the pools are {', '.join(known)}")
    if known and not names:
        raise UserError(f"--pool: name one of {', '.join(known)}")
    return names


def _instruction(text: str) -> int | str | None:
    from jfe_jax.errors import UserError

    if text == "none":
        return None
    if text == "all":
        return text
    if not text.isdecimal():
        raise UserError(f"--instruction {text}: a number from 0, all, or none")
    return int(text)
