"""`jfe bench`: runs the benchmarks, and generates the tables of the documentation from their stored results."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import jfe_jax
from jfe_jax.errors import UserError

RESULTS = Path("docs/bench")
PAGES = (Path("README.md"), Path("docs/benchmarks"))
CHECKOUT = Path(jfe_jax.__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares one sub-command per benchmark; each reads its own arguments in `_run`, when its module is imported."""
    if not (CHECKOUT / "benchmarks" / "__init__.py").is_file():
        parser.add_argument("name", nargs="?", metavar="NAME", help="only in a checkout of the repository")
        parser.set_defaults(run=_not_a_checkout, overrides=[])
        return
    _add_checkout_to_path()
    from benchmarks import BENCHMARKS

    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        names.add_parser(name, help=benchmark.purpose, add_help=False).set_defaults(run=_run, overrides=[])
    readme = names.add_parser("readme", help="regenerate the tables of the documentation")
    readme.set_defaults(run=_readme)
    again = names.add_parser("all", help="rerun the command of every stored result, then regenerate the tables")
    again.add_argument("--only", default="", metavar="NAME,…", help="results to measure again; default: all")
    again.add_argument("--skip", default="", metavar="NAME,…", help="results to leave unchanged")
    again.set_defaults(run=_all)
    for leaf in (readme, again):
        leaf.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
        leaf.add_argument(
            "--pages",
            type=Path,
            nargs="+",
            default=PAGES,
            metavar="PATH",
            help=f"Markdown files, or directories of them; default: {' '.join(map(str, PAGES))}",
        )


def _run(args: argparse.Namespace) -> None:
    from benchmarks import BENCHMARKS
    from benchmarks.common import result as results
    from benchmarks.common import tables
    from jfe_jax.utils.progress import progress_bar

    benchmark = BENCHMARKS[args.name]
    module = importlib.import_module(benchmark.module)
    parser = argparse.ArgumentParser(prog=f"jfe bench {args.name}", description=benchmark.purpose)
    module.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the result, as docs/bench/NAME.json")
    own = parser.parse_args(args.overrides)
    if own.json:
        # Fails before an hour of work, not after it.
        own.json.parent.mkdir(parents=True, exist_ok=True)
    result = results.stamped(module.run(own, progress_bar), args.name, args.overrides)
    print(tables.as_text(result), end="")
    if own.json:
        results.write(result, own.json)


def _readme(args: argparse.Namespace) -> None:
    from benchmarks.common import results_store

    for page, name in results_store.fill(args.pages, args.results):
        print(f"{page}: {name}")


def _all(args: argparse.Namespace) -> None:
    from benchmarks.common import results_store

    only, skip = ([one for one in names.split(",") if one] for names in (args.only, args.skip))
    results_store.again(args.pages, args.results, only, skip, lambda line: print(line, file=sys.stderr, flush=True))


def _not_a_checkout(args: argparse.Namespace) -> None:
    raise UserError("benchmarks are not part of the installed package: clone the repository and run jfe bench there")


def _add_checkout_to_path() -> None:
    # Benchmarks also start processes of their own.
    root = str(CHECKOUT)
    if root not in sys.path:
        sys.path.insert(0, root)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
