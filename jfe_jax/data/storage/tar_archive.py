"""Streams images from tar archives without unpacking them.

An archive is one file, or is split into parts as M-BEIR publishes it:

    mbeir_images.tar.gz                       one file
    mbeir_images.tar.gz.part-00, …-03         split at any byte, possibly inside an image
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jfe_jax.errors import UserError

_READ_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"


class TarArchive:
    """Reads one tar stream from a file or from several parts, compressed or not.

    Attributes:
      size: bytes of all parts.
      bytes_read: bytes of the parts that have been read so far.
    """

    def __init__(self, parts: Sequence[Path]):
        self.parts = list(parts)
        self.size, self.bytes_read = sum(part.stat().st_size for part in self.parts), 0

    @property
    def compressed(self) -> bool:
        """True if it is compressed with gzip. It can then only be read from its beginning."""
        with open(self.parts[0], "rb") as stream:
            return stream.read(2) == _GZIP

    def __str__(self) -> str:
        return str(self.parts[0]) + (f" … {self.parts[-1].name}" if len(self.parts) > 1 else "")

    def files(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yields the name and a reader of each file, in the archive's order. Read the content before advancing.

        Raises:
          UserError: it is no tar archive, is corrupt, or is truncated.
        """
        self.bytes_read = 0
        found, raw = False, _ConcatenatedStream(self)
        try:
            joined = io.BufferedReader(raw, _READ_BYTES)
            gzipped = joined.peek(2)[:2] == _GZIP
            stream = io.BufferedReader(gzip.GzipFile(fileobj=joined), _READ_BYTES) if gzipped else joined
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                while (member := archive.next()) is not None:
                    # tarfile keeps a list of all members, which would grow to gigabytes.
                    archive.members.clear()
                    found = True
                    if member.isfile():
                        yield member.name.removeprefix("./"), lambda: archive.extractfile(member).read()
            # Read to the end: tarfile mistakes a stream that is cut between two files for a complete archive; gzip
            # does not.
            while rest := stream.read(_READ_BYTES):
                if rest.strip(b"\0"):
                    raise UserError(f"{self}: something follows the archive's end; are its parts all of one archive?")
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            short = found or isinstance(error, EOFError)
            what = "ends too soon; is a part missing or cut short" if short else "cannot be read as a tar archive"
            raise UserError(f"{self}: {what} ({' '.join(str(error).split()) or type(error).__name__})") from error
        finally:
            raw.close()


class _ConcatenatedStream(io.RawIOBase):
    """Concatenates the parts into one sequential stream of bytes."""

    def __init__(self, archive: TarArchive):
        self._archive, self._remaining = archive, iter(archive.parts)
        self._file: io.RawIOBase | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            if self._file is None:
                part = next(self._remaining, None)
                if part is None:
                    return 0
                self._file = open(part, "rb", buffering=0)  # noqa: SIM115
            count = self._file.readinto(buffer)
            if count:
                self._archive.bytes_read += count
                return count
            self._file.close()
            self._file = None


def find_archives(directory: Path, stem: str = "mbeir_images") -> list[TarArchive]:
    """Finds the archives of that name in a directory: the single file, or else its parts.

    Raises:
      UserError: a part between the first and the last is missing.
    """
    for name in (f"{stem}.tar", f"{stem}.tar.gz", f"{stem}.tgz"):
        if (directory / name).is_file():
            return [TarArchive([directory / name])]
    parts = {}
    for file in directory.glob(f"{stem}.tar*part*"):
        number = re.fullmatch(rf"{re.escape(stem)}\.tar(?:\.gz)?\.part-?(\d+)", file.name)
        if number:
            parts[int(number[1])] = file
    first = min(parts, default=0)
    for number in range(first, max(parts, default=-1)):
        if number not in parts:
            raise UserError(f"{directory}: part {number:02d} of {stem}.tar.gz is missing")
    return [TarArchive([parts[number] for number in sorted(parts)])] if parts else []
