"""Compares the loader with torch's DataLoader and PaliGemmaProcessor: items per second, from files to model input.

Both read the queries and positives of the same generated M-BEIR directory with the same number of worker processes:
ours from shards to packed batches, theirs from files to padded ones. The processor does not take texts alone, so these
go through its tokenizer. A side yields some batches and is then timed. The sides are interleaved.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.common.result import Progress, Result, Table, ratios, table
from benchmarks.common.tokenizer import IMAGE_TOKEN, VOCABULARY, paligemma_tokenizer
from benchmarks.data import synthetic_mbeir
from benchmarks.data.data_wait import data_wait
from jfe_jax.config import Config, from_dict
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.item import Item
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.datasets.npm import cache_directory
from jfe_jax.errors import UserError

ROWS, THEIR_BATCH = 3000, 32
# Batches of a side that go before those that are timed.
_SKIPPED = 6
# `model.vision.resampler`, and what the tables call it.
RESAMPLERS = {"pillow": "Resized as Pillow does", "torchvision": "Resized as torchvision does"}


class Rate(NamedTuple):
    """Items per second, and per second of CPU time of this process and its workers: what other programs leave alone."""

    second: float
    cpu_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the number of items and of processes."""
    parser.add_argument("--items", type=int, default=1500, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="reader processes of each side")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times `items` items of each side, in `rounds` interleaved rounds.

    Raises:
      UserError: transformers or torch is not installed, or the sides do not compute the same.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError("transformers is not installed: pip install transformers torch") from error
    tokenizer = paligemma_tokenizer(cache_directory(), lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "mbeir", Path(folder) / "prepared"
        synthetic_mbeir.write(raw, ROWS)
        for _ in prepare_dataset(Mbeir(raw), out, progress=progress):
            pass
        pairs = _items(raw)
        # Each yields a stream of batches. Ours is endless and continues in the next round; theirs is an epoch.
        sides: dict[str, dict[str, Callable[[], Iterator[int]]]] = {}
        opened: list[Iterator[int]] = []
        compared = 0
        for resampler in RESAMPLERS:
            ours = [_config(out, tokenizer, workers, resampler) for workers in (args.workers, 0)]
            processor = _processor(tokenizer, resampler)
            compared += _compare(pairs, ours[0], processor)
            opened += map(_ours, ours)
            loader = _loader(pairs, processor, args.workers, args.items)
            sides[resampler] = {
                f"jfe, {args.workers} workers": partial(iter, opened[-2]),
                f"jfe, {_threads()} threads": partial(iter, opened[-1]),
                f"torch, {args.workers} workers": partial(_theirs, loader),
            }
        rates: dict[tuple[str, str], list[Rate]] = {(one, side): [] for one in sides for side in sides[one]}
        with progress("rounds", args.rounds) as done:
            for turn in range(args.rounds):
                for one, side in list(rates)[:: 1 if turn % 2 else -1]:
                    rates[one, side].append(_rate(sides[one][side](), args.items, side.startswith("jfe")))
                done(1)
        for batches in opened:
            batches.close()
        waits = data_wait(out, Path(folder), progress)
    share = sum(image is not None for image, _ in pairs) / len(pairs)
    return Result(
        tables=[
            _table(RESAMPLERS[one], {side: rates[one, side] for side in sides[one]}, f"torch, {args.workers} workers")
            for one in sides
        ]
        + [waits],
        packages=["pillow", "simplejpeg", "cykooz-resizer", "tokenizers", "grain", "jax", "transformers", "torch"],
        method=f"{args.rounds} rounds of {args.items:,} items, interleaved: median (min to max)",
        checked=f"{compared} items: pixels to 1/255, and ids, equal",
        notes=[
            f"{share:.0%} of the items have an image, each its own file.",
            "Where torchvision is not installed, as here, transformers resizes as Pillow does; for the other table its "
            "kernel in torch is called as it does.",
        ],
    )


def _table(title: str, rates: dict[str, list[Rate]], theirs: str) -> Table:
    columns = {name: [list(one) for one in zip(*found, strict=True)] for name, found in rates.items()}
    rows = [
        [name, seconds, ratios(seconds, columns[theirs][0]), busy, ratios(busy, columns[theirs][1])]
        for name, (seconds, busy) in columns.items()
    ]
    formats = {"": "", "items/s": ".0f", "/ torch": ".2f", "items per CPU second": ".0f", " / torch": ".2f"}
    return table(formats, rows, title)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _items(raw: Path) -> list[tuple[str | None, str]]:
    """Image file and text of every query, with an instruction, and of its positive."""
    mbeir, items = Mbeir(raw), []
    for unit in mbeir.units("train"):
        pool = {one.did: one for one in mbeir.pool("train", unit, "local")}
        for query in mbeir.queries("train", unit):
            candidate = pool[query.pos[0]]
            prompt = mbeir.instructions(unit.dataset, query.modality, candidate.modality)[0]
            items.append((query.image and str(query.image), f"{prompt} {query.text}" if query.text else prompt))
            items.append((candidate.image and str(candidate.image), candidate.text or ""))
    return items


def _config(prepared: Path, tokenizer: Path, workers: int, resampler: str) -> Config:
    return from_dict(
        {
            "model": {
                "image_token": IMAGE_TOKEN,
                "text": {"vocab_size": VOCABULARY},
                "vision": {"resampler": resampler},
            },
            "tokens": {"tokenizer": str(tokenizer), "max_text_tokens": 380},
            "data": {
                "path": str(prepared),
                "pairs": 48,
                "rows": 14,
                "row_tokens": 1280,
                "image_slots": 64,
                "workers": workers,
            },
        }
    )


def _ours(cfg: Config) -> Iterator[int]:
    batches = training_batches(cfg, groups=1, split="train")
    try:
        for batch in batches:
            yield int(batch.packed.valid.sum())
    finally:
        batches.close()


def _processor(tokenizer: Path, resampler: str) -> Any:
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from benchmarks.common.siglip_torch import SiglipImageProcessorTorch

    made = SiglipImageProcessorPil if resampler == "pillow" else SiglipImageProcessorTorch
    images = made(size={"height": 224, "width": 224})
    images.image_seq_length = 256
    return PaliGemmaProcessor(images, PreTrainedTokenizerFast.from_pretrained(tokenizer, padding_side="right"))


class Files:
    """The items as a torch data set: decoded image or None, text."""

    def __init__(self, items: list[tuple[str | None, str]]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Image.Image | None, str]:
        file, text = self._items[index]
        if file is None:
            return None, text
        with Image.open(file) as image:
            return image.convert("RGB"), text


class Collate:
    """Items → the processor's tensors, for those with an image and those without."""

    def __init__(self, processor: Any):
        self._processor = processor

    def __call__(self, items: list[tuple[Image.Image | None, str]]) -> tuple[int, Any, Any]:
        images = [(image, f"<image>{text}") for image, text in items if image is not None]
        texts = [f"<bos>{text}\n" for image, text in items if image is None]
        with_image = without = None
        if images:
            pictures, prompts = zip(*images, strict=True)
            with_image = self._processor(
                images=list(pictures), text=list(prompts), return_tensors="pt", padding="longest"
            )
        if texts:
            without = self._processor.tokenizer(texts, return_tensors="pt", padding="longest", add_special_tokens=False)
        return len(items), with_image, without


def _loader(items: list[tuple[str | None, str]], processor: Any, workers: int, count: int) -> Any:
    """A DataLoader of at least `count` items, whose workers are there for all rounds."""
    import torch

    shuffled = random.Random(0).sample(items, len(items))
    return torch.utils.data.DataLoader(
        Files([shuffled[i % len(shuffled)] for i in range(count + (_SKIPPED + 2 * workers + 2) * THEIR_BATCH)]),
        batch_size=THEIR_BATCH,
        num_workers=workers,
        collate_fn=Collate(processor),
        # The process has threads by now, which a fork does not survive.
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
    )


def _theirs(loader: Any) -> Iterator[int]:
    # To the end: workers that are stopped half way abort.
    for count, _, _ in loader:
        yield count


def _rate(batches: Iterator[int], items: int, endless: bool) -> Rate:
    # What had been made ahead, and until every worker has given something.
    for _ in range(_SKIPPED):
        next(batches)
    start, busy, done = time.monotonic(), _cpu_seconds(), 0
    while done < items:
        done += next(batches)
    seconds, busy = time.monotonic() - start, _cpu_seconds() - busy
    if not endless:
        for _ in batches:
            pass
    return Rate(done / seconds, done / busy)


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that are alive."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) == os.getpid() or int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _compare(items: list[tuple[str | None, str]], cfg: Config, processor: Any) -> int:
    """Compares items, and returns their number.

    Raises:
      UserError: the sides differ.
    """
    encoder = ItemEncoder(cfg.tokens, cfg.model.vision, cfg.model.image_token)
    files, chosen = Files(items), random.Random(0).sample(range(len(items)), 64)
    for index in chosen:
        file, text = items[index]
        ours = encoder.encode(Item(text=text or None, image=file and Path(file)) if file or text else Item(text=" "))
        _, with_image, without = Collate(processor)([files[index]])
        theirs = with_image if with_image is not None else without
        same = np.array_equal(ours.tokens[:-1], theirs["input_ids"][0].numpy())
        if file:
            pixels = theirs["pixel_values"][0].numpy().transpose(1, 2, 0)
            same = same and np.abs(ours.pixels / 255 - (pixels + 1) / 2).max() <= 1 / 255
        if not same:
            raise UserError(f"both sides differ on {file or text!r}: there is nothing to compare")
    return len(chosen)
