"""`jfe bench`: the benchmarks of the README, and its tables from what they stored."""

import argparse
import importlib
import sys
from pathlib import Path

from jfe_jax.bench import BENCHMARKS

RESULTS, README = Path("docs/bench"), Path("README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A benchmark's own arguments are read by `_run`: its module is imported only when it is asked for."""
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, purpose in BENCHMARKS.items():
        names.add_parser(name, help=purpose, add_help=False).set_defaults(run=_run, overrides=[])
    readme = names.add_parser("readme", help="put the stored results into the README again")
    readme.set_defaults(run=_readme)
    again = names.add_parser("all", help="run every stored result's command again, then readme")
    again.add_argument("--only", default="", metavar="NAME,…", help="results to make again; default: all")
    again.add_argument("--skip", default="", metavar="NAME,…", help="results to leave as they are")
    again.set_defaults(run=_all)
    for leaf in (readme, again):
        leaf.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
        leaf.add_argument("--readme", type=Path, default=README, metavar="FILE", help=f"default: {README}")


def _run(args: argparse.Namespace) -> None:
    from jfe_jax.bench import result as results
    from jfe_jax.bench import tables
    from jfe_jax.cli.progress import bar

    module = importlib.import_module(f"jfe_jax.bench.{args.name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"jfe bench {args.name}", description=BENCHMARKS[args.name])
    module.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the result, as docs/bench/NAME.json")
    own = parser.parse_args(args.overrides)
    if own.json:
        # Now, not after an hour's work.
        own.json.parent.mkdir(parents=True, exist_ok=True)
    result = results.stamped(module.run(own, bar), args.name, args.overrides)
    print(tables.as_text(result), end="")
    if own.json:
        results.write(result, own.json)


def _readme(args: argparse.Namespace) -> None:
    from jfe_jax.bench import stored

    for name in stored.fill(args.readme, args.results):
        print(f"{args.readme}: {name}")


def _all(args: argparse.Namespace) -> None:
    from jfe_jax.bench import stored

    only, skip = ([one for one in names.split(",") if one] for names in (args.only, args.skip))
    stored.again(args.readme, args.results, only, skip, lambda line: print(line, file=sys.stderr, flush=True))
