"""`jfe embed` beside sentence-transformers on the exported checkpoint: from files on disk to vectors on disk.

Items with a text, an image or both lie mixed in one file. Ours is `retrieval.embed` as the verb calls it, in float32.
Theirs opens what `jfe convert to-hf --layout sentence-transformers` wrote. One of its calls takes one kind of item, so
there are three, each sorted by length as it does, and the rows are put in the file's order. Every round reads a pool of
its own path: neither side knows an image from before.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfe_jax.bench import pool, rates
from jfe_jax.bench.result import Cell, Progress, Result, ratios, table
from jfe_jax.errors import UserError
from jfe_jax.plan import flops

# Of the difference between a vector of ours and of theirs, both of length 1.
TOLERANCE = 1e-4
# What `SentenceTransformer.encode` takes if nobody chooses.
DEFAULT_BATCH = 32


class Pool(NamedTuple):
    """Of the items: their number, those with an image, mean tokens, and the FLOPs that their vectors need."""

    items: int
    images: int
    tokens: float
    work: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--geometry", default="30m", help="tiny, 30m (default), 150m or 3b")
    parser.add_argument("--items", type=int, default=2000, help="of the pool")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="2,4,8,16,64", help="their batch sizes that are tried besides 32")
    parser.add_argument("--tried", type=int, default=64, help="items that each of them is tried on")
    parser.add_argument("--dir", type=Path, help="where to make pool and model")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times both sides by turns, after checking that their vectors are the same.

    Raises:
      UserError: sentence-transformers is not installed, or the vectors differ.
    """
    try:
        import sentence_transformers  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install sentence-transformers") from error
    torch.set_num_threads(rates.threads())
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        return _measure(args, Path(folder), progress)


def _measure(args: argparse.Namespace, folder: Path, progress: Progress) -> Result:
    items = pool.write_pool(folder / "pool", args.items)
    texts = [record["text"] for record in map(json.loads, items.read_text(encoding="utf-8").splitlines())]
    config = pool.write_model(folder / "run", args.geometry, [text for text in texts if text])
    ours, theirs = Ours(folder / "run"), Theirs(folder)
    rate = _rate()
    # The first calls compile, and are compared.
    started = time.perf_counter()
    first = ours(items, folder / "first")
    compiled = time.perf_counter() - started
    apart = float(np.linalg.norm(first - theirs(items, folder / "first.npy", DEFAULT_BATCH), axis=1).max())
    if not apart <= TOLERANCE:
        raise UserError(f"the vectors differ by up to {apart:.1e}: the two sides do not compute the same")
    tried = _tried(args, folder, items, theirs)
    best = min(tried, key=tried.__getitem__)
    sides: dict[str, Callable[[Path, Path], Any]] = {
        "jfe": ours,
        f"sentence-transformers, batches of {best}": lambda file, out: theirs(file, out.with_suffix(".npy"), best),
    }
    if best != DEFAULT_BATCH:
        sides[f"the same, of {DEFAULT_BATCH} (its default)"] = lambda file, out: theirs(
            file, out.with_suffix(".npy"), DEFAULT_BATCH
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with progress("rounds", args.rounds * len(sides)) as done:
        for turn in range(args.rounds):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                file = pool.linked(items.parent, folder / "again")
                started = time.perf_counter()
                sides[name](file, folder / "out")
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(file.parent)
                shutil.rmtree(folder / "out", ignore_errors=True)
                done(1)
    rate = max(rate, _rate())
    told = _told(ours, items, config)
    return Result(
        tables=[_table(seconds, told, rate)],
        packages=["jax", "sentence-transformers", "transformers", "torch"],
        method=f"{args.geometry}, float32; {told.items:,} items, {told.images / told.items:.0%} with an image, "
        f"{told.tokens:.0f} tokens on average; medians of {args.rounds} rounds by turns; matrix rate "
        f"{rate / 1e9:.0f} GFLOP/s; FLOPs that the vectors need, without padding",
        checked=f"vectors, the same to {apart:.0e}",
        notes=[
            f"Nothing is compiled in the rounds; in the first call of ours, {compiled:.0f} s with compilation, it took "
            f"{compiled - statistics.median(seconds['jfe']):.0f} s, which a pool of any size pays once.",
            f"Batch sizes of theirs, seconds for {args.tried} items: "
            + ", ".join(f"{size}: {took:.1f}" for size, took in sorted(tried.items()))
            + ".",
        ],
    )


class Ours:
    """`jfe embed` on a run directory, the model opened once."""

    def __init__(self, run: Path):
        from jfe_jax.retrieval.retriever import Retriever

        self.retriever = Retriever.load(run)

    def __call__(self, items: Path, out: Path) -> np.ndarray:
        """Writes the index `out` → float32 [B, E]."""
        from jfe_jax.retrieval.embed import embed
        from jfe_jax.retrieval.items_file import ItemsFile

        return np.array(embed(self.retriever, ItemsFile(items), out).index.embeddings)


class Theirs:
    """sentence-transformers on the export of `folder / "run"`, the model opened once."""

    def __init__(self, folder: Path):
        from sentence_transformers import SentenceTransformer

        from jfe_jax.hf.convert import to_hf

        to_hf(folder / "run", folder / "exported", layout="sentence-transformers")
        self.model = SentenceTransformer(str(folder / "exported"), trust_remote_code=True, device="cpu")

    def __call__(self, items: Path, out: Path, batch: int) -> np.ndarray:
        """Writes the vectors as `out` → float32 [B, E]."""
        kinds: dict[tuple[bool, bool], list[tuple[int, Any]]] = {}
        lines = items.read_text(encoding="utf-8").splitlines()
        for place, record in enumerate(map(json.loads, lines)):
            # An instruction goes before the text, as a prompt would.
            text = " ".join(part for part in (record["instruction"], record["text"]) if part)
            image = record["image"] and str(items.parent / record["image"])
            given = {"text": text, "image": image} if text and image else text or image
            kinds.setdefault((bool(text), bool(image)), []).append((place, given))
        vectors = np.zeros((len(lines), self.model.get_embedding_dimension()), np.float32)
        for own in kinds.values():
            places, given = zip(*own, strict=True)
            vectors[list(places)] = self.model.encode(list(given), batch_size=batch, show_progress_bar=False)
        np.save(out, vectors)
        return vectors


def _tried(args: argparse.Namespace, folder: Path, items: Path, theirs: Theirs) -> dict[int, float]:
    """Seconds by batch size, of the pool's first items."""
    some = items.with_name("some.jsonl")
    some.write_text("".join(items.read_text(encoding="utf-8").splitlines(True)[: args.tried]), encoding="utf-8")
    took = {}
    for size in sorted({DEFAULT_BATCH, *(int(size) for size in args.batches.split(","))}):
        started = time.perf_counter()
        theirs(some, folder / "tried.npy", size)
        took[size] = time.perf_counter() - started
    return took


def _told(ours: Ours, items: Path, config: Any) -> Pool:
    from jfe_jax.data.tokens import ItemEncoder
    from jfe_jax.retrieval.items_file import read_items

    own = ours.retriever.config
    encoder = ItemEncoder(own.tokens, own.model.vision, own.model.image_token)
    found = [one for _, one in read_items(items)]
    lengths = [len(encoder.tokens(one.text, one.instruction, one.image is not None)) for one in found]
    images = sum(one.image is not None for one in found)
    work = flops.embedding_flops(config, flops.of_items(lengths, images))
    return Pool(len(found), images, statistics.mean(lengths), work)


def _table(seconds: dict[str, list[float]], told: Pool, rate: float) -> Any:
    rows: list[list[Cell]] = []
    for name, own in seconds.items():
        speeds = [told.items / second for second in own]
        used = [told.work / second / rate for second in own]
        rows.append([name, speeds, used, None if name == "jfe" else ratios(own, seconds["jfe"])])
    return table({"side": "", "items/s": ".2f", "of the matrix rate": ".0%", "jfe / this": ".2f"}, rows)


def _rate() -> float:
    return max(rates.by_jax("float32"), rates.by_torch("float32"))
