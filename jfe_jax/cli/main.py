"""`jfe`: parses the verb, runs it, turns bad input into one line. Verbs import what is heavy when they run."""

import argparse
import atexit
import gc
import importlib
import os
import sys
import traceback
from pathlib import Path

import jfe_jax
from jfe_jax.errors import RemoteProcessError, UserError, format_error
from jfe_jax.parallel.distributed import is_synchronized
from jfe_jax.utils.local_paths import require_local

VERBS = {
    "data": "fetch, check and prepare data sets",
    "train": "run one stage of training",
    "plan": "compile a config for a TPU slice, without one: memory, FLOPs, traffic",
    "convert": "between Hugging Face directories and our checkpoints",
    "embed": "items → embeddings",
    "eval": "M-BEIR protocol: recall tables, report, run files",
    "compare": "several evaluations side by side, with intervals",
    "mine": "hard negatives for the next stage",
    "search": "one query against an embedded pool",
    "bench": "the benchmarks of the README",
}
# Those that run a model; the others compile nothing, or to look at what the compiler says.
RUNNING = ("train", "embed", "eval", "mine", "search")


def main(argv: list[str] | None = None) -> int:
    """Runs `jfe`; returns its exit status: 0 done, 1 failed with one clear line, 2 wrong usage."""
    # INFO lines of the libraries are not ours to print; what goes wrong still shows.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # YNNPACK's matrix products, XLA's default on the CPU, run at half of Eigen's speed on one core.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_experimental_ynn_fusion_type= {os.environ.get('XLA_FLAGS', '')}".strip()
    # Importing and tracing make a million objects that stay. To look for garbage among them after every 700 takes a
    # tenth of the time to the first step.
    gc.set_threshold(50_000)
    if argv is None:
        # Nor at the end of the process, where Python looks through all of them once more.
        atexit.register(gc.freeze)
    parser = argparse.ArgumentParser(prog="jfe", description="Joint Fusion Encoder: multimodal retrieval in JAX.")
    parser.add_argument("--version", action="version", version=f"jfe {jfe_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, purpose in VERBS.items():
        verb = verbs.add_parser(name, help=purpose, description=purpose)
        module = importlib.import_module(f"jfe_jax.cli.{name}")
        module.add_arguments(verb)
        # Last, so that it is known on the innermost parser of verbs with sub-verbs too.
        for leaf in _leaves(verb):
            leaf.add_argument("--debug", action="store_true", help="show the traceback of an error")
            leaf.set_defaults(run=leaf.get_default("run") or module.run)
    args, extra = parser.parse_known_args(argv)
    if args.verb is None:
        if extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
        parser.print_help()
        return 0
    if args.verb in (*RUNNING, "convert") and argv is None:
        # A process of its own; what calls this from Python decides for itself.
        from jfe_jax.utils.malloc import keep_freed_memory

        keep_freed_memory()
    if args.verb in RUNNING and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # What has been compiled once is there for the next command; jax reads it when it is imported.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache / "jfe_jax" / "xla")
    # Those that take what they do not know themselves say so.
    if "overrides" in args:
        args.overrides = extra
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    try:
        for name, value in vars(args).items():
            if isinstance(value, Path):
                require_local(value, name)
        args.run(args)
    except KeyboardInterrupt:
        print(f"jfe {args.verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        one_line = isinstance(error, UserError | OSError) and not args.debug
        if one_line and not isinstance(error, RemoteProcessError):
            print(f"jfe {args.verb}: {format_error(error)}", file=sys.stderr, flush=True)
        if not is_synchronized(error):
            # The other processes are working or waiting for this one. A normal exit would wait for them forever.
            if not one_line:
                traceback.print_exc()
            os._exit(1)
        if one_line:
            return 1
        raise
    return 0


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        return [leaf for child in action.choices.values() for leaf in _leaves(child)]
    return [parser]


if __name__ == "__main__":
    sys.exit(main())
