"""Names by number, as the lines of a file: millions of them take little more memory than it.

Axes: N names.
"""

from array import array
from collections.abc import Callable, Sequence

import numpy as np


class StringTable(Sequence[str]):
    """The lines of a UTF-8 text.

    Raises:
      ValueError: it is not UTF-8.
    """

    def __init__(self, content: bytes | bytearray):
        content.decode()
        self._content = content
        self._ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = self._ends[number - 1] + 1 if number else 0
        return self._content[start : self._ends[number]].decode()


class LazyNames(Sequence[str]):
    """The names of some rows, looked up when they are asked for.

    Args:
      rows: int [N].
      name: the name of a row.
    """

    def __init__(self, rows: np.ndarray, name: Callable[[int], str]):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._name(row) for row in self._rows[number]]
        return self._name(self._rows[number])


class StringTableBuilder:
    """Names that come one after the other, none with a line break."""

    def __init__(self):
        self._content, self._hashes = bytearray(), array("q")

    def add(self, name: str) -> None:
        self._content += name.encode() + b"\n"
        self._hashes.append(hash(name))

    def finish(self) -> StringTable:
        """All of them."""
        return StringTable(self._content)

    def first_duplicate(self, names: StringTable) -> tuple[int, int] | None:
        """Of the first name that is there again, where it is so, and where it was; None if all are different."""
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        # Different names may have one hash: those that have are compared.
        alike = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
        found: tuple[int, int] | None = None
        for at in alike.tolist():
            later, first = int(order[at]), at - 1
            while first >= 0 and hashes[order[first]] == hashes[later]:
                if names[int(order[first])] == names[later] and (found is None or later < found[0]):
                    found = later, int(order[first])
                first -= 1
        return found
