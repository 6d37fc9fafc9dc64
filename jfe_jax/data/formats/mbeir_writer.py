"""Pairs from elsewhere → an M-BEIR directory's text files, so that one path leads from any source to training.

Candidates that look and read alike are one candidate. A unit's task follows from the modalities of query and positive.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from jfe_jax.data.formats.mbeir import TASKS
from jfe_jax.errors import UserError

# Image → image with text: M-BEIR has no such task and leaves this number free.
_FREE_TASK = 5


class PairItem(NamedTuple):
    """Text and name of the image of a query or a candidate; at least one is there."""

    text: str | None = None
    image: str | None = None

    @property
    def modality(self) -> str:
        return ",".join(name for name, there in (("image", self.image), ("text", self.text)) if there)


class TrainingPair(NamedTuple):
    """A query with what is right and what is wrong for it; `place` is where it stands, for errors."""

    location: str
    query: PairItem
    positives: list[PairItem]
    negatives: list[PairItem]


def write_pairs(root: Path, name: str, number: int, pairs: Iterable[TrainingPair]) -> dict[str, int]:
    """Writes query/train/ and cand_pool/local/ of the data set `name` with M-BEIR id `number`; pairs of each unit.

    Raises:
      UserError: a pair lacks its query or its positive, or there is none at all.
    """
    known: dict[int, int] = {}
    streams: dict[Path, io.BufferedWriter] = {}
    counts: dict[str, int] = {}

    def write(file: Path, row: dict) -> None:
        if file not in streams:
            file.parent.mkdir(parents=True, exist_ok=True)
            streams[file] = open(file, "wb")  # noqa: SIM115
        streams[file].write(orjson.dumps(row) + b"\n")

    def did(content: PairItem, unit: str) -> str:
        key = hash(content)
        if key not in known:
            known[key] = len(known)
            row = {
                "did": f"{number}:{known[key]}",
                "txt": content.text,
                "img_path": content.image,
                "modality": content.modality,
                "src_content": None,
            }
            write(root / f"cand_pool/local/mbeir_{unit}_cand_pool.jsonl", row)
        return f"{number}:{known[key]}"

    try:
        for pair in pairs:
            if not pair.query.modality or not pair.positives or not all(one.modality for one in pair.positives):
                raise UserError(f"{pair.location}: a pair needs a query and a positive, each with a text or an image")
            task = TASKS.get((pair.query.modality, pair.positives[0].modality), _FREE_TASK)
            unit = f"{name}_task{task}"
            row = {
                "qid": f"{number}:{sum(counts.values())}",
                "query_txt": pair.query.text,
                "query_img_path": pair.query.image,
                "query_modality": pair.query.modality,
                "query_src_content": None,
                "pos_cand_list": [did(one, unit) for one in pair.positives],
                "neg_cand_list": [did(one, unit) for one in pair.negatives if one.modality],
                "task_id": task,
            }
            write(root / f"query/train/mbeir_{unit}_train.jsonl", row)
            counts[unit] = counts.get(unit, 0) + 1
    finally:
        for stream in streams.values():
            stream.close()
    if not counts:
        raise UserError(f"{name}: there are no pairs in it")
    return counts


def make_bidirectional_pairs(location: str, image: str, captions: list[str]) -> Iterator[TrainingPair]:
    """An image with its captions as pairs: each caption → the image, and the image → all of them."""
    texts = [PairItem(text=text) for text in captions]
    for text in texts:
        yield TrainingPair(location, text, [PairItem(image=image)], [])
    yield TrainingPair(location, PairItem(image=image), texts, [])
