"""The lines of a file, with where they are, so that they can be read again."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from jfe_jax.errors import UserError


def iter_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, position in the file in bytes, and content of each line.

    Raises:
      UserError: it cannot be read.
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
    """As `iter_lines`, those that are not blank."""
    return (line for line in iter_lines(file) if not line[2].isspace())


def read_lines_at(file: Path, starts: Iterable[int]) -> Iterator[bytes]:
    """The lines that begin at these positions."""
    with open(file, "rb") as stream:
        for start in starts:
            stream.seek(start)
            yield stream.readline()
