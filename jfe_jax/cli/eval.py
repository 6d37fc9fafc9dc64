"""`jfe eval`: the M-BEIR protocol on any M-BEIR directory."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="run, step or Hugging Face directory")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="an M-BEIR directory")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="results.json, report.html, run files")
    parser.add_argument("--pool", default="local,global", help="local, global or both (default local,global)")
    parser.add_argument("--split", default="test", help="a folder under query/ (default test)")
    parser.add_argument("--units", default="", metavar="U,U", help="only these, such as cirr_task7 (default all)")
    parser.add_argument(
        "--instruction", default="0", metavar="N", help="which of the prompts, from 0, or none (default 0)"
    )
    parser.add_argument(
        "--queries", choices=("all", "text", "image"), default="all", help="give only half of the image+text queries"
    )
    parser.add_argument("--controls", action="store_true", help="give both halves alone, too, in the same run")
    parser.add_argument(
        "--depth", type=int, default=10, metavar="K", help="results a query in the run files (default 10)"
    )


def run(args: argparse.Namespace) -> None:
    from jfe_jax.cli.progress import bar
    from jfe_jax.data.mbeir import Mbeir
    from jfe_jax.retrieval import evaluation_report, results
    from jfe_jax.retrieval.evaluate import evaluate
    from jfe_jax.retrieval.retriever import Retriever

    mbeir = Mbeir(args.data)
    evaluation = evaluate(
        Retriever.load(args.checkpoint),
        mbeir,
        split=args.split,
        pools=_listed(args.pool, ("local", "global")),
        units=_listed(args.units),
        instruction=_instruction(args.instruction),
        given=list(dict.fromkeys([args.queries, *(("text", "image") if args.controls else ())])),
        depth=args.depth,
        progress=bar,
    )
    results.write(args.out, evaluation.results, evaluation.answers, evaluation.pools)
    evaluation_report.write(args.out / "report.html", evaluation)
    for warning in evaluation.results["warnings"]:
        print(f"warning: {warning}")
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


def _instruction(text: str) -> int | None:
    from jfe_jax.errors import UserError

    if text == "none":
        return None
    if not text.isdecimal():
        raise UserError(f"--instruction {text}: a number from 0, or none")
    return int(text)
