"""Reads the lines of a file with their byte offsets, so that single lines can be read later."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from jfe_jax.errors import UserError


def iter_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number (from 1), the byte offset and the content of each line.

    Raises:
      UserError: the file cannot be read.
    """
    start = 0
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, start, line
                start += len(line)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def iter_nonblank_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the lines of `iter_lines` that are not blank."""
    return (line for line in iter_lines(file) if not line[2].isspace())


def read_lines_at(file: Path, starts: Iterable[int]) -> Iterator[bytes]:
    """Yields the lines that begin at these byte offsets."""
    with open(file, "rb") as stream:
        for start in starts:
            stream.seek(start)
            yield stream.readline()
