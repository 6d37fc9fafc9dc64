"""Writes candidates, queries, judgements and prompts as an M-BEIR directory.

A candidate has one id in the entire directory, in every unit's pool. Candidates with identical image and text are one,
so pools contain no duplicates that would have to be judged equal. The positives of all data sets share these ids.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jfe_jax.datasets.emoji.phrases import PROMPTS, STYLES
from jfe_jax.datasets.emoji.query_spec import Key, QuerySpec, SceneIndex, image_of, text_of

DATASETS = {"emoji": 10, "emojimodify": 11, "emojirelative": 12, "emojiselect": 13, "emojicaption": 14, "emojitext": 15}
_COLUMNS = ("query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{i}" for i in range(1, 5)))


@dataclass(frozen=True, kw_only=True)
class EmojiUnit:
    """One dataset's queries of one of M-BEIR's tasks."""

    dataset: str
    task: int

    @property
    def name(self) -> str:
        return f"{self.dataset}_task{self.task}"


class MbeirLayout:
    """Writes an M-BEIR directory unit by unit."""

    def __init__(self, root: Path, scenes: SceneIndex):
        self._root = root
        self._scenes = scenes
        self._dids: dict[Key, str] = {}
        self._query_counts = dict.fromkeys(DATASETS, 0)
        self._pools: dict[str, dict[Key, None]] = {}

    def add_unit(
        self, unit: EmojiUnit, split: str, queries: Iterable[QuerySpec], negatives: list[list[Key]], pool: Iterable[Key]
    ):
        """Writes a unit's queries, judgements and local pool, and adds the pool to the split's global one."""
        pool = dict.fromkeys(pool)
        self._pools.setdefault(split, {}).update(pool)
        rows, judgements = [], []
        for query, wrong in zip(queries, negatives, strict=True):
            self._query_counts[unit.dataset] += 1
            qid = f"{DATASETS[unit.dataset]}:{self._query_counts[unit.dataset]}"
            right = [self._did(key) for key in query.answers]
            rows.append(self._query(qid, unit, query, right, [self._did(key) for key in wrong]))
            judgements += [f"{qid} 0 {did} 1 {unit.task}" for did in right]
        stem = f"mbeir_{unit.name}_{split}"
        _write(self._root / f"query/{split}/{stem}.jsonl", map(_line, rows))
        _write(self._root / f"qrels/{split}/{stem}_qrels.txt", judgements)
        _write(self._root / f"cand_pool/local/{stem}_cand_pool.jsonl", (_line(self._candidate(key)) for key in pool))

    def finish(self) -> None:
        """Writes the global pools and the prompts."""
        for split, pool in self._pools.items():
            file = self._root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
            _write(file, (_line(self._candidate(key)) for key in pool))
        rows = ["\t".join(_COLUMNS)]
        for (dataset, query, candidate), prompts in PROMPTS.items():
            rows.append("\t".join((query, candidate, dataset, str(DATASETS[dataset]), *prompts)))
        _write(self._root / "instructions/query_instructions.tsv", rows)

    def _did(self, key: Key) -> str:
        return self._dids.setdefault(key, f"{DATASETS['emoji']}:{len(self._dids) + 1}")

    def _query(self, qid: str, unit: EmojiUnit, query: QuerySpec, right: list[str], wrong: list[str]) -> dict:
        source = {"group": query.group, "kind": query.kind, "edit": query.edit}
        if query.source is not None:
            source["shows"] = self._names(query.source)
        if query.foil is not None:
            source["foil"] = self._did(query.foil)
        return {
            "qid": qid,
            "query_txt": query.text,
            "query_img_path": None if query.source is None else self._scenes.gallery.paths[query.source],
            "query_modality": _modality(query.source, query.text),
            "query_src_content": json.dumps(source, ensure_ascii=False),
            "pos_cand_list": right,
            "neg_cand_list": wrong,
            "task_id": unit.task,
        }

    def _candidate(self, key: Key) -> dict:
        image, text = image_of(key), text_of(key)
        return {
            "did": self._did(key),
            "txt": text,
            "img_path": None if image is None else self._scenes.gallery.paths[image],
            "modality": _modality(image, text),
            "src_content": None if image is None else self._names(image),
        }

    def _names(self, image: int) -> str:
        pictures = self._scenes.pictures_of_image[image]
        return f"{' / '.join(dict.fromkeys(p.emoji.label for p in pictures))} ({STYLES[pictures[0].style]})"


def _modality(image: int | None, text: str | None) -> str:
    return ",".join(name for name, value in (("image", image), ("text", text)) if value is not None)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


def _write(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)
