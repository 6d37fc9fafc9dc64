"""`jfe data emoji|check|prepare|bins`."""

import argparse
import json
from pathlib import Path

from jfe_jax.cli import data_emoji
from jfe_jax.errors import UserError
from jfe_jax.utils import progress
from jfe_jax.utils.output_lock import output_lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")

    purpose = "fetch the emoji sets and write them as an M-BEIR directory"
    emoji = verbs.add_parser("emoji", help=purpose, description=purpose)
    data_emoji.add_arguments(emoji)
    emoji.set_defaults(run=data_emoji.run)

    purpose = "validate an M-BEIR directory: counts, and every defect with file and line"
    check = verbs.add_parser("check", help=purpose, description=purpose)
    check.add_argument("dir", type=Path, help="M-BEIR directory")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    check.add_argument(
        "--images",
        nargs="?",
        choices=("sample", "all"),
        const="all",
        default="none",
        help="decode images too: every one, or with `sample` up to 200 of each file of rows",
    )
    check.set_defaults(run=_check)

    purpose = "M-BEIR directory, or pairs in another format → TFDS ArrayRecord shards, which `jfe train` reads"
    prepare = verbs.add_parser("prepare", help=purpose, description=f"{purpose}. Finished parts are kept.")
    prepare.add_argument("dir", type=Path, help="M-BEIR directory; with --format, a file or directory of that format")
    prepare.add_argument(
        "--format",
        choices=("mbeir", "mmeb", "captions", "webdataset", "tfds", "triplets"),
        default="mbeir",
        help="mmeb: MMEB-train's rows; captions: JSON lines of image and caption; webdataset: tar shards; tfds: a data "
        "set with image and text; triplets: anchor, positive, negative as CSV or JSON lines",
    )
    prepare.add_argument("--name", help="other formats: name of the data set; its units are NAME_task{t}")
    prepare.add_argument("--number", type=int, default=100, help="other formats: its number, its own in --out (100)")
    prepare.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="mmeb, captions: what image paths are relative to; tfds: the data_dir of a data set given by name",
    )
    prepare.add_argument("--out", type=Path, required=True, help="where the shards go")
    prepare.add_argument("--units", nargs="+", metavar="UNIT", help="only these, e.g. mscoco_task0 (default: all)")
    prepare.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these (default: all but test* and union*)")
    prepare.add_argument(
        "--short-side", type=int, default=0, metavar="N", help="make larger images so small (default: as is)"
    )
    prepare.add_argument(
        "--max-bad-share",
        type=float,
        default=0.001,
        metavar="X",
        help="share of a part's images that may be missing or unreadable (default %(default)s)",
    )
    prepare.set_defaults(run=_prepare)

    purpose = "suggest data.bins for a run, from the items of its first steps"
    bins = verbs.add_parser("bins", help=purpose, description=purpose)
    bins.add_argument("--config", required=True, metavar="FILE", help="of the run; --key.sub=value overrides a value")
    bins.add_argument("--groups", type=int, default=1, metavar="G", help="devices of the mesh's batch axes (1)")
    bins.add_argument("--steps", type=int, default=16, metavar="N", help="how many steps are read (16)")
    bins.set_defaults(run=_bins, overrides=[])


def _check(args: argparse.Namespace) -> None:
    from jfe_jax.data.prepare import validate

    report = validate.validate_mbeir(args.dir, images=args.images)
    print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2) if args.json else report.as_text())
    if report.errors:
        first = next(defect for defect in report.defects if defect.severity == "error")
        raise UserError(f"{args.dir}: {report.errors} error{'s' * (report.errors > 1)}; the first: {first}")


def _prepare(args: argparse.Namespace) -> None:
    with output_lock(args.out, "jfe data prepare"):
        _prepare_locked(args)


def _prepare_locked(args: argparse.Namespace) -> None:
    from jfe_jax.data.formats.mbeir import Mbeir
    from jfe_jax.data.prepare.prepare import prepare_dataset

    images = None
    if args.format == "mbeir":
        mbeir = Mbeir(args.dir)
    else:
        from jfe_jax.data.formats.import_pairs import import_pairs

        if not args.name:
            raise UserError(f"--format {args.format} needs --name, the data set's name")
        mbeir, images = import_pairs(
            args.dir, args.out, kind=args.format, name=args.name, number=args.number, images=args.images
        )
    parts = prepare_dataset(
        mbeir,
        args.out,
        images=images,
        splits=args.splits,
        units=args.units,
        short_side=args.short_side,
        max_bad_share=args.max_bad_share,
        progress=progress.progress_bar,
    )
    for part in parts:
        line = f"{part.name}: {part.outcome}, {part.records} records"
        if part.dropped_queries:
            line += f"; {part.dropped_queries} queries dropped, none of their positives is in a pool"
        if part.dangling:
            line += f"; {part.dangling} candidate ids are in no pool"
        if part.missing:
            line += f"; {part.missing} images are missing or unreadable, listed in missing.txt"
        print(line, flush=True)


def _bins(args: argparse.Namespace) -> None:
    from jfe_jax import config as configs
    from jfe_jax.data.pipeline import suggest_bins

    if min(args.groups, args.steps) < 1:
        raise UserError("--groups and --steps have to be 1 or more")
    found = suggest_bins.suggest_for_run(configs.load(args.config, args.overrides), args.groups, args.steps)
    listed = ", ".join(f"{size}: {count}" for size, count in found.bins.items())
    print(f"data:\n  bins: {{{listed}}}")
    print(f"# Rows are {found.full:.1%} full; attention over these bins multiplies {found.attention:.0%} as much.")
