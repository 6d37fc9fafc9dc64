"""`jfe compare`: several evaluations side by side, with intervals."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="report.html, compare.json, table.md, PNG"
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="NAME=EVAL_DIR[,EVAL_DIR…]",
        help="a model and the --out of `jfe eval` for each of its seeds; gains are the first model's",
    )
    parser.add_argument("-k", type=int, metavar="N", help="compare hit@N (default 1)")
    parser.add_argument(
        "--metric", metavar="M", help="instead of hit@N: recall@5, ndcg@10, mrr@10, map …, or the protocol's headline"
    )
    parser.add_argument("--replicates", type=int, default=2000, metavar="N", help="of the bootstrap (default 2000)")


def run(args: argparse.Namespace) -> None:
    from jfe_jax.errors import UserError
    from jfe_jax.reports.comparison import compare, load_models
    from jfe_jax.utils.output_lock import output_lock

    named = {}
    for word in args.models:
        name, equals, directories = word.partition("=")
        if not (name and equals and directories):
            raise UserError(f"{word}: write NAME=EVAL_DIR[,EVAL_DIR…]")
        if name in named:
            raise UserError(f"{word}: the name {name} is given twice; list its evaluations with commas")
        named[name] = [Path(directory) for directory in directories.split(",") if directory]
    k = 1 if args.k is None else args.k
    if k < 1 or args.replicates < 1:
        raise UserError("-k and --replicates are at least 1")
    if args.metric and args.k is not None:
        raise UserError("-k and --metric: give one of them")
    metric = args.metric or f"hit@{k}"
    models = load_models(named)
    told = compare(models, metric=metric, replicates=args.replicates)
    with output_lock(args.out, "jfe compare"):
        _write(args, models, told, metric)


def _write(args: argparse.Namespace, models: Any, told: dict[str, Any], metric: str) -> None:
    import json

    from jfe_jax.reports import comparison_report, figures

    args.out.mkdir(parents=True, exist_ok=True)
    table = comparison_report.markdown(told)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    (args.out / "compare.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pool = list(told["pools"])[-1]
    entry = told["pools"][pool]["with_source"]
    figures.comparison(args.out / "comparison.png", entry, f"{metric}, {pool} pool")
    comparison_report.write(args.out / "report.html", told, models)
    print(table)
    if said := comparison_report.claim(entry):
        print(said)
    print(args.out / "report.html")
