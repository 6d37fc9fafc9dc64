"""Writes pairs of other formats as the text files of an M-BEIR directory, so that all sources share one training path.

Candidates with equal text and image are one candidate. A unit's task follows from the modalities of query and positive.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from jfe_jax.data.formats.mbeir import TASKS
from jfe_jax.errors import UserError

# Image → image with text: M-BEIR has no such task and leaves this number unused.
_FREE_TASK = 5


class PairItem(NamedTuple):
    """The text and the image name of a query or a candidate; at least one is set."""

    text: str | None = None
    image: str | None = None

    @property
    def modality(self) -> str:
        return ",".join(name for name, there in (("image", self.image), ("text", self.text)) if there)


class TrainingPair(NamedTuple):
    """A query with its positives and hard negatives. `location` is its file and row, for errors."""

    location: str
    query: PairItem
    positives: list[PairItem]
    negatives: list[PairItem]


def write_pairs(root: Path, name: str, number: int, pairs: Iterable[TrainingPair]) -> dict[str, int]:
    """Writes query/train/ and cand_pool/local/ of the data set `name` with M-BEIR id `number`.

    Returns:
      The number of pairs of each unit.

    Raises:
      UserError: a pair lacks its query or its positive, or there are no pairs.
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
        raise UserError(f"{name}: it contains no pairs")
    return counts


def make_bidirectional_pairs(location: str, image: str, captions: list[str]) -> Iterator[TrainingPair]:
    """Makes pairs of an image and its captions: each caption → the image, and the image → all captions."""
    texts = [PairItem(text=text) for text in captions]
    for text in texts:
        yield TrainingPair(location, text, [PairItem(image=image)], [])
    yield TrainingPair(location, PairItem(image=image), texts, [])
