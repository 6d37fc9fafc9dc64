"""The queries of a training file that negatives can be mined for, by number.

Axes: R rows of the file, Q queries of them that are asked, T right candidates of a query.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from jfe_jax.data.formats.candidate_table import content_id
from jfe_jax.data.formats.line_index import iter_nonblank_lines, read_lines_at
from jfe_jax.data.formats.mbeir import MODALITIES, Mbeir, Query, Unit
from jfe_jax.data.formats.mbeir_records import decode_row, parse_query
from jfe_jax.data.item import Item
from jfe_jax.data.storage.image_store import resolve_image
from jfe_jax.embedding.string_table import StringTableBuilder
from jfe_jax.errors import UserError
from jfe_jax.mining.candidate_pool import PoolFile
from jfe_jax.mining.select_negatives import MiningQuery


class QueryFile:
    """A unit's queries, checked as a whole when it is opened; rows are read when asked for. What `embed` takes.

    Args:
      instruction: which prompt the queries are asked with; None asks without.

    Attributes:
      rows: R.
      numbers: int32 [Q], rising: the rows that are asked.
      counts: "queries", and those that are not asked: they have "no_positive" in the pool or a "missing_image".
      path, ids, digest: as embed.Source.

    Raises:
      UserError: a row is wrong, or there are fewer prompts.
    """

    def __init__(self, mbeir: Mbeir, split: str, unit: Unit, pool: PoolFile, instruction: int | None):
        self.path, self.counts = mbeir.query_file(split, unit), Counter()
        self._mbeir, self._unit, self._pool, self._instruction = mbeir, unit, pool, instruction
        right_of = mbeir.qrels(split, unit) if mbeir.qrels_file(split, unit).is_file() else {}
        starts, numbers, right, ends, kinds = array("q"), array("i"), array("i"), array("q", [0]), array("b")
        names, contents = StringTableBuilder(), array("q")
        for line, start, content in iter_nonblank_lines(self.path):
            starts.append(start)
            query = self._query(content, line)
            self.counts["queries"] += 1
            judged = [did for did, relevance in right_of.get(query.qid, {}).items() if relevance > 0]
            there = [at for did in dict.fromkeys([*query.pos, *judged]) if (at := pool.find(did)) >= 0]
            if not there:
                self.counts["no_positive"] += 1
            elif query.image is not None and pool.images.find(query.image) is None:
                self.counts["missing_image"] += 1
            else:
                numbers.append(len(starts) - 1)
                right.extend(there)
                ends.append(len(right))
                wanted = pool.modality(there[0])
                kinds.append(MODALITIES.index(wanted))
                names.add(query.qid)
                item = self._item(query, wanted)
                contents.append(content_id(item.instruction, item.text, item.image, mbeir.path))
        self._starts, self._right, self._ends, self._kinds = starts, right, ends, kinds
        self.rows, self.numbers, self.ids = len(starts), np.array(numbers, np.int32), names.finish()
        self.digest = hashlib.sha256(np.array(contents)).hexdigest()

    def items(self, start: int, stop: int) -> list[Item]:
        """As embed.Source."""
        lines = self._lines(self.numbers[start:stop].tolist())
        # What was read once is read without an error.
        items = (self._item(self._query(line, 0), MODALITIES[self._kinds[at]]) for at, line in enumerate(lines, start))
        return [resolve_image(item, self._pool.images) for item in items]

    def asked(self, start: int, stop: int) -> list[MiningQuery]:
        """Of the queries asked, those from `start` to `stop` - 1."""
        return [
            MiningQuery(
                int(self.numbers[place]),
                self.ids[place],
                self._right[self._ends[place] : self._ends[place + 1]].tolist(),
                MODALITIES[self._kinds[place]],
            )
            for place in range(start, stop)
        ]

    def decoded(self, start: int, stop: int) -> list[dict]:
        """The file's rows from `start` to `stop` - 1."""
        return [decode_row(line)[0] for line in self._lines(range(start, stop))]

    def _lines(self, numbers: Iterable[int]) -> Iterator[bytes]:
        return read_lines_at(self.path, (self._starts[number] for number in numbers))

    def _query(self, content: bytes, line: int) -> Query:
        row, problem = decode_row(content)
        query, problems = (None, [problem]) if problem else parse_query(row, self._mbeir.path)
        if query is None or problems:
            raise UserError(f"{self.path}:{line}: {problems[0]}")
        return query

    def _item(self, query: Query, wanted: str) -> Item:
        if self._instruction is None:
            return query.item()
        unit = self._unit
        # A file that mixes data sets has its queries' own in their ids.
        of = unit.dataset if unit.task is not None else query.qid.partition(":")[0]
        prompts = self._mbeir.instructions(of, query.modality, wanted, required=False)
        if prompts and self._instruction >= len(prompts):
            raise UserError(f"{unit.name}: no instruction {self._instruction}; there are {len(prompts)}, from 0")
        return query.item(prompts[self._instruction] if prompts else None)
