"""A JSONL file of items: one `{"id", "instruction", "text", "image"}` a line, image paths relative to its folder."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

from jfe_jax.data.formats.line_index import iter_lines, iter_nonblank_lines, read_lines_at
from jfe_jax.data.formats.mbeir_records import is_unicode
from jfe_jax.data.item import Item
from jfe_jax.embedding.string_table import StringTableBuilder
from jfe_jax.errors import UserError

_KEYS = ("id", "instruction", "text", "image")


class ItemsFile:
    """A file of items, checked as a whole when it is opened; the items themselves are read when asked for.

    Attributes:
      path: the file.
      ids: the items' ids, in order.
      digest: of the file's content.

    Raises:
      UserError: as `read_items`, or there are no items.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._starts = array("q")
        self._numbers = array("q")
        digest, names = hashlib.sha256(), StringTableBuilder()
        for number, start, line in iter_lines(self.path):
            digest.update(line)
            if not line.isspace():
                names.add(parse_line(line, self.path, number)[0])
                self._starts.append(start)
                self._numbers.append(number)
        self.ids = names.finish()
        if not self.ids:
            raise UserError(f"{self.path}: no items")
        if duplicate := names.first_duplicate(self.ids):
            again, first = (self._numbers[place] for place in duplicate)
            raise _used(self.path, again, self.ids[duplicate[0]], first)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def items(self, start: int, stop: int) -> list[Item]:
        """Items number start … stop - 1."""
        lines = zip(read_lines_at(self.path, self._starts[start:stop]), self._numbers[start:stop], strict=True)
        return [parse_line(line, self.path, number)[1] for line, number in lines]


def read_items(path: str | Path) -> Iterator[tuple[str, Item]]:
    """The ids and items of a file, one after the other.

    Raises:
      UserError: naming file and line: not JSON, an unknown key, no id or one seen before, neither text nor image, no
        such image.
    """
    seen: dict[str, int] = {}
    for number, _, line in iter_nonblank_lines(Path(path)):
        name, item = parse_line(line, Path(path), number)
        if name in seen:
            raise _used(Path(path), number, name, seen[name])
        seen[name] = number
        yield name, item


def _used(path: Path, number: int, name: str, before: int) -> UserError:
    return UserError(f"{path}:{number}: id {name!r} was already used in line {before}")


def parse_line(line: bytes, path: Path, number: int) -> tuple[str, Item]:
    """The id and item of a line. Raises UserError."""
    where = f"{path}:{number}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with the keys {', '.join(_KEYS)} is wanted")
    for key, value in record.items():
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}; the keys are {', '.join(_KEYS)}")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key!r} must be a string or null, not {value!r}")
        if value and not is_unicode(value):
            raise UserError(f"{where}: {key!r} holds half a character (a lone surrogate)")
    name = record.get("id")
    if not name or "\n" in name or "\r" in name:
        raise UserError(f'{where}: "id" must be a non-empty string of one line')
    text, image = record.get("text"), record.get("image")
    if not text and not image:
        raise UserError(f"{where}: {name!r} has neither text nor image; give it one of them")
    image_path = path.parent / image if image else None
    if image_path is not None and not image_path.is_file():
        raise UserError(f"{where}: no image {image_path}")
    return name, Item(text=text, image=image_path, instruction=record.get("instruction"))
