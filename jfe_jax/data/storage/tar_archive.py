"""Images in tar archives, read in one stream without unpacking: whole, or cut into parts as M-BEIR publishes them.

mbeir_images.tar.gz                       joined
mbeir_images.tar.gz.part-00, …-03         split anywhere, also inside an image
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
    """One tar stream over one file or several that are its parts; compressed or not.

    Attributes:
      size: bytes of all parts.
      done: bytes of them that have been read so far.
    """

    def __init__(self, parts: Sequence[Path]):
        self.parts = list(parts)
        self.size, self.done = sum(part.stat().st_size for part in self.parts), 0

    @property
    def compressed(self) -> bool:
        """Whether it is, by gzip: then it can only be read from its beginning."""
        with open(self.parts[0], "rb") as stream:
            return stream.read(2) == _GZIP

    def __str__(self) -> str:
        return str(self.parts[0]) + (f" … {self.parts[-1].name}" if len(self.parts) > 1 else "")

    def files(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Name and content of each file, in the archive's order; the content is there until the next one is asked for.

        Raises:
          UserError: it is no tar archive, is damaged, or ends too soon.
        """
        self.done = 0
        found, raw = False, _Joined(self)
        try:
            joined = io.BufferedReader(raw, _READ_BYTES)
            gzipped = joined.peek(2)[:2] == _GZIP
            stream = io.BufferedReader(gzip.GzipFile(fileobj=joined), _READ_BYTES) if gzipped else joined
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                while (member := archive.next()) is not None:
                    # Its list of all members would grow to gigabytes.
                    archive.members.clear()
                    found = True
                    if member.isfile():
                        yield member.name.removeprefix("./"), lambda: archive.extractfile(member).read()
            # To the end: tarfile takes a stream that is cut between two files for the archive's end, gzip does not.
            while rest := stream.read(_READ_BYTES):
                if rest.strip(b"\0"):
                    raise UserError(f"{self}: something follows the archive's end; are its parts all of one archive?")
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            short = found or isinstance(error, EOFError)
            what = "ends too soon; is a part missing or cut short" if short else "cannot be read as a tar archive"
            raise UserError(f"{self}: {what} ({' '.join(str(error).split()) or type(error).__name__})") from error
        finally:
            raw.close()


class _Joined(io.RawIOBase):
    """The parts as one stream of bytes."""

    def __init__(self, archive: TarArchive):
        self._archive, self._left = archive, iter(archive.parts)
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
                part = next(self._left, None)
                if part is None:
                    return 0
                self._file = open(part, "rb", buffering=0)  # noqa: SIM115
            count = self._file.readinto(buffer)
            if count:
                self._archive.done += count
                return count
            self._file.close()
            self._file = None


def find_archives(directory: Path, stem: str = "mbeir_images") -> list[TarArchive]:
    """The archives of that name in a directory: the joined form, or else its parts.

    Raises:
      UserError: a part is missing in the middle.
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
