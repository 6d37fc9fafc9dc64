"""Random access to images by path: unpacked, inside a tar archive, or in a prepared directory.

An uncompressed archive, in one file or in parts, is read at the offset of each image. From a compressed one, the needed
images are extracted once, in one pass, into an uncompressed archive. A pass that was killed resumes from it:

    images.tar       the extracted images
    searched.npy     int64: image_id of every image that a completed pass has looked for
    source.json      identifies the archive that they were extracted from

Axes: M images.
"""

import contextlib
import functools
import io
import json
import os
import re
import tarfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from jfe_jax.data.ids import image_id, name_id
from jfe_jax.data.item import Item
from jfe_jax.data.storage.tar_archive import TarArchive, find_archives
from jfe_jax.errors import UserError

COPIES, SEARCHED, SOURCE = "images.tar", "searched.npy", "source.json"
_BLOCK = 512

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]


class StoredImage:
    """An image inside a container. Its bytes are read on demand."""

    __slots__ = ("_name", "_read")

    def __init__(self, name: str, read: Callable[[], bytes]):
        self._name, self._read = name, read

    def __str__(self) -> str:
        return self._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredImage) and other._name == self._name

    def read_bytes(self) -> bytes:
        """The encoded image."""
        return self._read()


class ImageLookup(Protocol):
    """Finds images by path.

    Attributes:
      form: the processing they have undergone; embeddings of one form must not be mixed with those of another.
      inside: the container, for error messages: " in …", or "".
    """

    form: str
    inside: str

    def find(self, image: Path) -> Path | StoredImage | None:
        """Returns the image of that path; None if there is none."""

    def get(self, image: Path) -> Path | StoredImage:
        """Returns the image for `image_transforms.decode`.

        Raises:
          UserError: it is known to be missing without touching the file system.
        """


def resolve_image(item: Item, images: ImageLookup) -> Item:
    """Replaces an item's image path by the image that can be decoded."""
    return item if item.image is None else replace(item, image=images.get(item.image))


class DirectoryImages:
    """Finds images that are files in a directory."""

    form, inside = "as published", ""

    def find(self, image: Path) -> Path | None:
        return image if image.is_file() else None

    def get(self, image: Path) -> Path:
        return image


class _ArchivedImages:
    """Base class of images inside a container."""

    inside: str

    def find(self, image: Path) -> StoredImage | None:
        raise NotImplementedError

    def get(self, image: Path) -> StoredImage:
        found = self.find(image)
        if found is None:
            raise UserError(f"{image}: no such image{self.inside}")
        return found


class TarImages(_ArchivedImages):
    """Reads the files of an uncompressed tar archive through an index of their offsets.

    Args:
      root: the directory that the images' paths begin with.
      parts: the archive, or its parts in order.

    Raises:
      UserError: it is no tar archive, or a part is missing.
    """

    form = "as published"

    def __init__(self, root: Path, parts: Sequence[Path]):
        self._root, self.inside = root, f" in {parts[0]}"
        self._file = _ConcatenatedFile(parts)
        ids, starts, sizes = array("q"), array("q"), array("q")
        for member in _members(self._file, parts[0], complete=True):
            ids.append(name_id(member.name.removeprefix("./")))
            starts.append(member.offset_data)
            sizes.append(member.size)
        order = np.argsort(np.array(ids, np.int64), kind="stable")
        self.ids, self._starts, self._sizes = (np.array(part, np.int64)[order] for part in (ids, starts, sizes))

    def find(self, image: Path) -> StoredImage | None:
        at = int(np.searchsorted(self.ids, key := image_id(image, self._root)))
        if at == len(self.ids) or self.ids[at] != key:
            return None
        start, size = int(self._starts[at]), int(self._sizes[at])
        return StoredImage(f"{image}{self.inside}", functools.partial(self._file.read_at, start, size))


class PreparedDatasetImages(_ArchivedImages):
    """Reads the images of a directory that `jfe data prepare` wrote."""

    def __init__(self, root: Path, prepared: Path):
        from jfe_jax.data.storage.prepared_dataset import IMAGES, VERSION, ImageStore

        self._root = root
        self.inside = f" in {prepared} (`jfe data prepare --splits test` writes the test queries')"
        places = sorted((prepared / IMAGES).glob(f"*/{VERSION}"))
        self._stores = [ImageStore(place) for place in places]
        sides = {_short_side(place) for place in places}
        if len(sides) > 1:
            raise UserError(f"{prepared}: prepared with several --short-side; prepare all of it with one")
        side = sides.pop() if sides else 0
        self.form = f"short side {side} at most" if side else "as published"

    def find(self, image: Path) -> StoredImage | None:
        key = image_id(image, self._root)
        for store in self._stores:
            if store.has(key):
                return StoredImage(f"{image} in prepared data", functools.partial(store.find, key))
        return None


def open_images(
    root: Path, place: Path, wanted: Callable[[], np.ndarray], progress: Progress | None = None, *, copies: bool = True
) -> ImageLookup:
    """Opens the images of an M-BEIR directory: unpacked, in its archive, or in `place`.

    Args:
      place: a prepared directory; or the directory that holds, or will hold, the images extracted from a compressed
        archive.
      wanted: returns int64, image_id of the needed images; may contain repeats and 0.
      progress: (name, bytes) → a context manager that yields a function to call with the bytes done.
      copies: extract the images that are missing from `place`.

    Raises:
      UserError: an archive is corrupt, or `place` has the images of another archive.
    """
    if (place / "mbeir_images").is_dir():
        return PreparedDatasetImages(root, place)
    archives = [] if (root / "mbeir_images").is_dir() else find_archives(root)
    if not archives:
        return DirectoryImages()
    if not archives[0].compressed:
        return TarImages(root, archives[0].parts)
    if copies:
        _extract_to_tar(archives[0], place, np.unique(wanted()), progress)
    return TarImages(root, [place / COPIES])


def _extract_to_tar(archive: TarArchive, place: Path, wanted: np.ndarray, progress: Progress) -> None:
    source = [[part.name, part.stat().st_size] for part in archive.parts]
    place.mkdir(parents=True, exist_ok=True)
    source_file = place / SOURCE
    if source_file.exists() and json.loads(source_file.read_text()) != source:
        raise UserError(f"{place}: holds images of another archive than {archive}; remove it, or take another --images")
    source_file.write_text(json.dumps(source))
    searched = np.load(place / SEARCHED) if (place / SEARCHED).exists() else np.zeros(0, np.int64)
    with open(place / COPIES, "ab") as out:
        # Append after the last complete member: a killed pass may have left a partial one, a finished pass an end mark.
        end, present = _find_complete_members(place / COPIES)
        out.truncate(end)
        missing = np.setdiff1d(wanted[wanted != 0], np.concatenate([present, searched]))
        if len(missing):
            with progress("copying images out of the archive", archive.size) as tick:
                done, found = 0, np.zeros(len(missing), bool)
                for name, read in archive.files():
                    at = min(int(np.searchsorted(missing, key := name_id(name))), len(missing) - 1)
                    if missing[at] == key and not found[at]:
                        found[at] = True
                        content = read()
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        out.write(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % _BLOCK))
                    tick(archive.bytes_read - done)
                    done = archive.bytes_read
        out.write(bytes(2 * _BLOCK))
    np.save(place / SEARCHED, np.union1d(searched, missing))


def _find_complete_members(file: Path) -> tuple[int, np.ndarray]:
    """Returns the end offset of the last complete member of a possibly truncated archive, and their image ids."""
    size, end, ids = file.stat().st_size, 0, []
    for member in _members(_ConcatenatedFile([file]), file, complete=False) if size else ():
        after = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if after > size:
            break
        end = after
        ids.append(name_id(member.name))
    return end, np.array(ids, np.int64)


def _members(file: "_ConcatenatedFile", name: Path, *, complete: bool) -> Iterator[tarfile.TarInfo]:
    """Yields the files of an uncompressed archive. With `complete`, a truncated archive is an error."""
    try:
        with tarfile.open(fileobj=io.BufferedReader(file, _BLOCK), mode="r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps a list of all members, which would grow to gigabytes.
                archive.members.clear()
                if member.isfile():
                    yield member
            # tarfile mistakes a partial header for the archive's end.
            if complete and file.read_at(archive.offset, _BLOCK).strip(b"\0"):
                raise tarfile.ReadError("half a header at the end")
    except tarfile.TarError as error:
        if complete:
            raise UserError(
                f"{name}: cannot be read as a tar archive, or ends too soon; is a part missing or cut short ({error})"
            ) from error


class _ConcatenatedFile(io.RawIOBase):
    """Presents the parts of an archive as one seekable file."""

    def __init__(self, parts: Sequence[Path]):
        self._files = [os.open(part, os.O_RDONLY) for part in parts]
        self._ends = np.cumsum([os.fstat(file).st_size for file in self._files]).tolist()
        self._at = 0
        # Not __del__: at interpreter exit the os module may be gone.
        for file in self._files:
            weakref.finalize(self, os.close, file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Does nothing: tarfile closes what it reads, but these files must stay open for later reads."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        content = self.read_at(self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def read_at(self, start: int, size: int) -> bytes:
        """Reads `size` bytes at offset `start`; fewer at the end of the file."""
        found, first = b"", 0
        for file, end in zip(self._files, self._ends, strict=True):
            while size and first <= start < end:
                content = os.pread(file, min(size, end - start), start - first)
                if not content:
                    return found
                found, start, size = found + content, start + len(content), size - len(content)
            first = end
        return found


def _short_side(place: Path) -> int:
    from jfe_jax.data.storage.prepared_dataset import read_part_description

    return int(re.search(r" (\d+)$", read_part_description(place).metadata["fingerprint"])[1])
