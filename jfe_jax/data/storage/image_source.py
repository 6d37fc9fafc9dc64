"""Sources of encoded images: files in a directory, or tar archives in their own order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from jfe_jax.data.storage.tar_archive import TarArchive, find_archives
from jfe_jax.errors import UserError


class ImageSource(Protocol):
    """Provides encoded images by name.

    Attributes:
      sequential_only: content must be read before the iterator advances.
    """

    sequential_only: bool

    def iter_images(self, names: Iterable[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yields the name and a reader of the requested images, and possibly of others, in any order.

        The reader raises UserError if the content cannot be read.
        """
        ...

    def describe_location(self, name: str) -> str:
        """Returns the image's location, for messages."""
        ...


class FileImageSource:
    """Reads image files by their path in a directory."""

    sequential_only = False

    def __init__(self, root: Path):
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def iter_images(self, names: Iterable[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name in names:
            yield name, lambda name=name: self._read(name)

    def describe_location(self, name: str) -> str:
        return str(self._root / name)

    def _read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self._root / name}: cannot read the image ({error.strerror})") from error


class TarImageSource:
    """Reads all files of tar archives.

    With a `root`, a member's name begins with its archive's path below that directory, as "a/00.tar/000000012.jpg":
    archives in different folders often share file names, and so do their members.
    """

    sequential_only = True

    def __init__(self, archives: Sequence[TarArchive], root: Path | None = None):
        self._archives, self._root = archives, root

    def __str__(self) -> str:
        return ", ".join(map(str, self._archives[:2])) + (" …" if len(self._archives) > 2 else "")

    def iter_images(self, names: Iterable[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for archive in self._archives:
            prefix = "" if self._root is None else member_prefix(archive, self._root)
            for name, read in archive.files():
                yield prefix + name, read

    def describe_location(self, name: str) -> str:
        return f"{name} in {self}"


def member_prefix(archive: TarArchive, root: Path) -> str:
    """Returns the prefix of an archive's members: its path below `root`, and a slash."""
    return f"{archive.parts[0].relative_to(root).as_posix()}/"


def find_image_source(root: Path) -> ImageSource:
    """Returns the images of an M-BEIR directory: its files, or the archive of that name if it has no mbeir_images/."""
    archives = [] if (root / "mbeir_images").is_dir() else find_archives(root)
    return TarImageSource(archives) if archives else FileImageSource(root)
