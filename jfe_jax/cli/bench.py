"""`jfe bench`: the benchmarks of the README."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    convert = names.add_parser("convert", help="from-hf beside a plain copy of the files: rate and peak memory")
    convert.add_argument("--gigabytes", type=float, default=4.5, help="size of the generated checkpoint")
    convert.add_argument("--rounds", type=int, default=3)
    convert.add_argument("--dir", type=Path, help="where to make it; needs three times the size")
    convert.set_defaults(run=_convert)
    search = names.add_parser("search", help="exact search beside faiss.IndexFlatIP (pip install faiss-cpu)")
    search.add_argument("--pools", default="1000000x256,200000x1024", help="rows x width, separated by commas")
    search.add_argument("--batches", default="1,64,1024", help="queries asked together")
    search.add_argument("-k", type=int, default=50)
    search.add_argument("--rounds", type=int, default=5)
    search.set_defaults(run=_search)
    stream = names.add_parser("stream", help="exact search of a pool on disk: seconds and peak memory")
    stream.add_argument("--rows", type=int, default=5_600_000)
    stream.add_argument("--width", type=int, default=2048)
    stream.add_argument("--queries", type=int, default=64)
    stream.add_argument("-k", type=int, default=50)
    stream.add_argument("--dir", type=Path, help="where to make it: 23 GB by default")
    stream.set_defaults(run=_stream)
    loss = names.add_parser("loss", help="contrastive loss and gradients beside PyTorch's and plain jit's")
    loss.add_argument("--batches", default="8192,32768", help="pairs, separated by commas")
    loss.add_argument("--width", type=int, default=1024, help="of the embeddings")
    loss.add_argument("--rounds", type=int, default=5)
    loss.set_defaults(run=_loss)
    gradcache = names.add_parser("gradcache", help="a step in GradCache chunks beside the plain step; memory by batch")
    gradcache.add_argument("--pairs", type=int, default=64, help="of the timed steps")
    gradcache.add_argument("--chunks", type=int, default=4)
    gradcache.add_argument("--rounds", type=int, default=5)
    gradcache.add_argument("--batches", default="512,1024,2048,4096,8192,16384", help="pairs of the memory table")
    gradcache.add_argument("--chunk", type=int, default=256, help="pairs of a chunk in the memory table")
    gradcache.set_defaults(run=_gradcache)
    inputs = names.add_parser("input", help="our loader beside torch's DataLoader with PaliGemmaProcessor")
    inputs.add_argument("--items", type=int, default=1500, help="of each side in each round")
    inputs.add_argument("--rounds", type=int, default=5)
    inputs.add_argument("--workers", type=int, default=2, help="reader processes of each side")
    inputs.set_defaults(run=_input)
    data = names.add_parser("data", help="check, prepare, a kill, a resume and memory on a generated M-BEIR directory")
    data.add_argument("--rows", type=int, default=1_000_000, help="queries and candidates")
    data.add_argument("--distinct", type=int, default=2000, help="images that a data set's queries or candidates share")
    data.add_argument("--steps", type=int, default=10_000, help="before the iterator is saved and restored")
    data.add_argument(
        "--candidates", type=int, default=5_600_000, help="of the data that memory is measured on; 0: none"
    )
    data.add_argument("--dir", type=Path, help="where to make it: 3 GB")
    data.set_defaults(run=_data)
    packing = names.add_parser("packing", help="real tokens in each layout, on M-BEIR's training mix")
    packing.add_argument("--steps", type=int, default=100)
    packing.set_defaults(run=_packing)


def _convert(args: argparse.Namespace) -> None:
    from jfe_jax.bench import convert

    result = convert.run(args.gigabytes, args.rounds, args.dir)
    print(
        f"{result.files:.2f} GB of weights, largest tensor {result.largest:.2f} GiB; medians of {args.rounds} rounds:"
    )
    for name, seconds in result.seconds.items():
        peak = f", peak memory {result.peak[name]:.2f} GiB" if name in result.peak else ""
        rate = f"{result.files / seconds:5.2f} GB/s, {result.seconds['copy'] / seconds:.2f} x copy"
        print(f"{name:8}{seconds:6.1f} s {rate}{peak}")
    print(f"1.3 × the largest tensor + 1 GiB is {1.3 * result.largest + 1:.2f} GiB")


def _search(args: argparse.Namespace) -> None:
    import os

    from jfe_jax.bench import search

    pools = [tuple(int(number) for number in pool.split("x")) for pool in args.pools.split(",")]
    batches = [int(number) for number in args.batches.split(",")]
    print(f"k = {args.k}, {len(os.sched_getaffinity(0))} threads; medians of {args.rounds} rounds, by turns")
    print("      pool  width  queries    jfe, s  faiss, s  faiss / jfe  same results")
    for row in search.run(pools, batches, args.k, args.rounds):
        print(
            f"{row.pool:10}  {row.width:5}  {row.queries:7}  {row.ours:8.3f}  {row.theirs:8.3f}  {row.ratio:11.2f}"
            f"  {row.same:12.4%}",
            flush=True,
        )


def _stream(args: argparse.Namespace) -> None:
    from jfe_jax.bench import stream
    from jfe_jax.cli.progress import bar

    with bar("generating", args.rows) as progress:
        result = stream.run(args.rows, args.width, args.queries, args.k, args.dir, progress)
    print(
        f"{args.rows} x {args.width} float16, {result.file:.1f} GB on disk: the {args.k} best of {args.queries} "
        f"queries in {result.seconds:.0f} s, peak memory {result.peak:.2f} GiB; {result.right} found their row"
    )


def _loss(args: argparse.Namespace) -> None:
    from jfe_jax.bench import loss

    print(_versions("jax", "torch"))
    print(f"E = {args.width}, {args.rounds} rounds by turns: median [least, most]; memory besides the embeddings")
    print("     B  side    seconds                 / jfe     memory")
    for row in loss.run([int(number) for number in args.batches.split(",")], args.width, args.rounds):
        took = _spread(row.seconds) if row.seconds else "too little memory"
        ratio = f"{row.ratio:5.2f}" if row.seconds else "     "
        forecast = "" if row.seconds else " (forecast)"
        print(f"{row.pairs:6}  {row.side:6}  {took:22}  {ratio}  {row.peak / 2**20:6.0f} MiB{forecast}", flush=True)


def _gradcache(args: argparse.Namespace) -> None:
    from jfe_jax.bench import gradcache

    print(_versions("jax"))
    took = gradcache.times(args.pairs, args.chunks, args.rounds)
    print(f"a step of {args.pairs} pairs, {args.rounds} rounds by turns: median [least, most] seconds")
    print(f"plain       {_spread(took.plain)}")
    print(f"{args.chunks:2} chunks   {_spread(took.chunked)}  {took.ratio:.2f} x plain")
    print(f"temporary memory of each of {gradcache.DEVICES} devices, MiB; chunks of {args.chunk} pairs")
    print("     B   chunked     plain  loss alone")
    batches = [int(number) for number in args.batches.split(",")]
    for row in gradcache.memory(batches, args.chunk, plain_up_to=2048):
        chunked, plain, loss = (f"{size / 2**20:.1f}" if size else "-" for size in row[1:])
        print(f"{row.pairs:6}{chunked:>10}{plain:>10}{loss:>12}")


def _spread(seconds: list[float]) -> str:
    import statistics

    return f"{statistics.median(seconds):.3f} [{min(seconds):.3f}, {max(seconds):.3f}]"


def _versions(*packages: str) -> str:
    import os
    from importlib.metadata import version

    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{named}; {len(os.sched_getaffinity(0))} threads"


def _input(args: argparse.Namespace) -> None:
    from jfe_jax.bench import input as inputs
    from jfe_jax.cli.progress import bar

    print(inputs.machine())
    result = inputs.run(args.items, args.rounds, args.workers, bar)
    print(
        f"{result.compared} items compared, equal; {result.images:.0%} have an image; {args.workers} workers a side; "
        f"medians of {args.rounds} rounds of {args.items} items, by turns (least to most)"
    )
    for name, values, unit in result.rows():
        median, least, most = inputs.median_and_spread(values)
        print(f"{name:22}{median:8.2f} {unit} ({least:.2f} to {most:.2f})")


def _packing(args: argparse.Namespace) -> None:
    from jfe_jax.bench import packing

    print(f"{'layout':48} real tokens  pairs a step")
    for row in packing.run(args.steps):
        print(f"{row.layout:48} {row.real:11.1%}  {row.pairs:12.1f}", flush=True)


def _data(args: argparse.Namespace) -> None:
    from jfe_jax.bench import data

    print(data.machine())
    for line in data.run(args.rows, args.distinct, args.steps, args.candidates, args.dir):
        print(line, flush=True)
