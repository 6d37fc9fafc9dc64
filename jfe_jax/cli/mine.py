"""`jfe mine`: hard negatives of the wanted modality (and wrong ones) for the queries of an M-BEIR directory."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jfe_jax.mining.select_negatives import MiningConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="run, step or Hugging Face directory")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="an M-BEIR directory")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="M-BEIR directory: new queries, links to the rest"
    )
    parser.add_argument("--split", default="train", help="a folder under query/ (default train)")
    parser.add_argument("--units", default="", metavar="U,U", help="only these, such as cirr_task7 (default all)")
    parser.add_argument("--pool", choices=("local", "global"), default="local", help="where from (default local)")
    parser.add_argument("--negatives", type=int, default=8, metavar="N", help="negatives per query (default 8)")
    parser.add_argument(
        "--wrong-modality", type=int, default=0, metavar="N", help="number of them with the wrong modality (default 0)"
    )
    parser.add_argument("--ranks", default="1:100", metavar="A:B", help="window of ranks (default 1:100)")
    parser.add_argument(
        "--pick", choices=("top", "random"), default="top", help="the first of the window, or drawn (default top)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --pick random")
    parser.add_argument(
        "--near",
        type=float,
        default=0.01,
        metavar="D",
        help="duplicates: inner product with a right one above 1 - D (default 0.01)",
    )
    parser.add_argument(
        "--margin", type=float, metavar="M", help="leave out what scores above the right one's score - M (default: no)"
    )
    parser.add_argument(
        "--image-difference",
        type=float,
        default=2.0,
        metavar="D",
        help="up to which images are the same, of 255 (default 2)",
    )
    parser.add_argument("--instruction", default="0", metavar="N", help="which prompt, from 0, or none (default 0)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where images are that are not unpacked: what `jfe data prepare` made; or what the wanted ones of a "
        "compressed mbeir_images.tar.gz are copied into, once (default OUT/mining/images)",
    )
    parser.add_argument("--dtype", default="float16", help="of the pool's embeddings on disk (default float16)")
    parser.add_argument("--shard", type=int, default=8192, metavar="N", help="items embedded at a time (default 8192)")
    parser.add_argument("--overwrite", action="store_true", help="recompute embeddings and replace existing ones")


def run(args: argparse.Namespace) -> None:
    from jfe_jax.cli.locked_output import locked_output
    from jfe_jax.embedding.shard_store import DTYPES
    from jfe_jax.errors import UserError
    from jfe_jax.parallel.distributed import initialize_distributed

    first, colon, last = args.ranks.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise UserError(f"--ranks {args.ranks}: two numbers, as 1:100")
    if args.instruction != "none" and not args.instruction.isdecimal():
        raise UserError(f"--instruction {args.instruction}: a number from 0, or none")
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype}: it is {', '.join(DTYPES)}")
    if args.shard < 1:
        raise UserError(f"--shard {args.shard}: at least one item")
    initialize_distributed()
    from jfe_jax.mining.miner import MiningConfig

    settings = MiningConfig(
        negatives=args.negatives,
        wrong_modality=args.wrong_modality,
        first_rank=int(first),
        last_rank=int(last),
        pick=args.pick,
        seed=args.seed,
        near=args.near,
        margin=args.margin,
        image_difference=args.image_difference,
        instruction=None if args.instruction == "none" else int(args.instruction),
        pool=args.pool,
        dtype=args.dtype,
    )
    units = [name.strip() for name in args.units.split(",") if name.strip()]
    with locked_output(args.out, "mine"):
        _mine(args, settings, units)


def _mine(args: argparse.Namespace, settings: "MiningConfig", units: list[str]) -> None:
    from jfe_jax.data.formats.mbeir import Mbeir
    from jfe_jax.embedding.retriever import Retriever
    from jfe_jax.mining.miner import mine
    from jfe_jax.parallel.distributed import all_or_none, is_process_zero
    from jfe_jax.utils.progress import progress_bar

    with all_or_none():
        mbeir = Mbeir(args.data)
        retriever = Retriever.load(args.checkpoint)
    total = 0
    for mined in mine(
        retriever,
        mbeir,
        args.out,
        settings,
        split=args.split,
        units=units,
        images=args.images,
        shard=args.shard,
        overwrite=args.overwrite,
        progress=progress_bar,
    ):
        if not is_process_zero():
            continue
        counts = mined.counts
        kept = counts["wanted_modality"] + counts["wrong_modality"]
        total += kept
        told = [f"{kept} negatives for {counts['queries']} queries"]
        if counts["wrong_modality"]:
            told.append(f"{counts['wrong_modality']} of the wrong modality")
        for name, what in (("same", "the same as"), ("near", "too near to"), ("margin", "scored too near to")):
            if counts[name]:
                told.append(f"{counts[name]} {what} a right one left out")
        if counts["short"]:
            told.append(f"{counts['short']} queries got fewer")
        print(f"{mined.unit}: {', '.join(told)}")
        for name, what in (
            ("no_positive", "queries have no right candidate in the pool; left as they were"),
            ("missing_image", "queries have an image that is missing; left as they were"),
            ("missing_candidate_image", "candidates have an image that is missing; left out"),
        ):
            if counts[name]:
                print(f"warning: {mined.unit}: {counts[name]} {what}")
    if is_process_zero():
        print(f"{total} negatives in {args.out}; prepare it with `jfe data prepare`, train with --data.hard_negatives")
