"""Parses a row of an M-BEIR file into a query or a candidate, in every known spelling.

Texts are formatted as the benchmark formats them (`format_string`), so that training and evaluation see the same texts.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from jfe_jax.data.formats.line_index import iter_nonblank_lines
from jfe_jax.data.item import Item
from jfe_jax.errors import UserError

MODALITIES = ("text", "image", "image,text")
# (query's modality, candidate's modality) → M-BEIR's task id; 5 is unused.
TASKS = {
    ("text", "image"): 0,
    ("text", "text"): 1,
    ("text", "image,text"): 2,
    ("image", "text"): 3,
    ("image", "image"): 4,
    ("image,text", "text"): 6,
    ("image,text", "image"): 7,
    ("image,text", "image,text"): 8,
}


@dataclass(frozen=True, slots=True)
class Query:
    """A query row. `image` is the file's path; `src_content` is a free string; `pos` and `neg` are candidate ids."""

    qid: str
    text: str | None
    image: Path | None
    modality: str
    src_content: str | None
    pos: tuple[str, ...]
    neg: tuple[str, ...]

    def item(self, instruction: str | None = None) -> Item:
        return Item(text=self.text, image=self.image, instruction=instruction)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate row. `image` is the file's path; `src_content` is a free string."""

    did: str
    text: str | None
    image: Path | None
    modality: str
    src_content: str | None = None

    def item(self) -> Item:
        return Item(text=self.text, image=self.image)


def format_string(text: str | None) -> str:
    """Formats a prompt, query or candidate text as M-BEIR does."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


def normalize_modality(modality: Any) -> str | None:
    """Returns one of MODALITIES, or None if `modality` is none of them in any spelling."""
    modality = "image,text" if modality == "text,image" else modality
    return modality if modality in MODALITIES else None


def parse_query(row: Any, root: Path) -> tuple[Query | None, list[str]]:
    """Parses a decoded line into a query and a list of its problems. No query if its id or lists cannot be read."""
    if not isinstance(row, dict):
        return None, [f"expected an object, got {type(row).__name__}"]
    fields, problems = _parse_item_fields(row, "query_txt", "query_img_path", "query_modality", root)
    qid, problem = _parse_id(row, "qid")
    lists = [_parse_ids(row, key) for key in ("pos_cand_list", "neg_cand_list")]
    problems += [one for one in (problem, *(error for _, error in lists)) if one]
    if qid is None or lists[0][0] is None or lists[1][0] is None:
        return None, problems
    source = row.get("query_src_content")
    source = source if source is None or isinstance(source, str) else json.dumps(source, ensure_ascii=False)
    return Query(qid, *fields, source, lists[0][0], lists[1][0]), problems


def parse_candidate(row: Any, root: Path) -> tuple[Candidate | None, list[str]]:
    """Parses a decoded line into a candidate and a list of its problems. No candidate if its id cannot be read."""
    if not isinstance(row, dict):
        return None, [f"expected an object, got {type(row).__name__}"]
    fields, problems = _parse_item_fields(row, "txt", "img_path", "modality", root)
    did, problem = _parse_id(row, "did")
    if did is None:
        return None, [*problems, problem]
    source = row.get("src_content")
    source = source if source is None or isinstance(source, str) else json.dumps(source, ensure_ascii=False)
    return Candidate(did, *fields, source), problems


def iter_rows(file: Path, containing: str = "") -> Iterator[tuple[int, Any, str | None]]:
    """Yields the lines of a JSONL file that contain a text: number (from 1), decoded row, problem or None.

    Raises:
      UserError: the file cannot be read.
    """
    wanted = containing.encode()
    for number, _, line in iter_nonblank_lines(file):
        if wanted in line:
            yield number, *decode_row(line)


def decode_row(line: bytes) -> tuple[Any, str | None]:
    """Decodes a line of JSON into its value, or returns the problem."""
    try:
        return orjson.loads(line), None
    except orjson.JSONDecodeError:
        pass
    # orjson rejects more than json does (lone surrogates, NaN), and the errors of json are clearer.
    try:
        return json.loads(line), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"


def read_rows(file: Path, containing: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the location "file:line" and the row of each line of `iter_rows`.

    Raises:
      UserError: the file cannot be read or a line is not JSON.
    """
    for number, row, problem in iter_rows(file, containing):
        if problem:
            raise UserError(f"{file}:{number}: {problem}")
        yield f"{file}:{number}", row


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a UTF-8 file that are not blank, numbered from 1.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    for number, _, line in iter_nonblank_lines(file):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from error


def read_qrels(file: Path) -> Iterator[tuple[str, str, str, int | None]]:
    """Yields the lines of a qrels file: location, query id, candidate id, relevance (None if the line is malformed)."""
    for number, line in read_lines(file):
        parts = line.split()
        good = len(parts) in (4, 5) and re.fullmatch(r"-?\d{1,9}", parts[3])
        yield f"{file}:{number}", *((parts[0], parts[2], int(parts[3])) if good else ("", "", None))


def parse_dataset_id(identifier: str) -> int:
    """Returns the dataset's number in a query or candidate id such as "9:123".

    Raises:
      ValueError: the id contains no number.
    """
    number, colon, _ = identifier.partition(":")
    if not colon or not number.isdecimal() or len(number) > 9:
        raise ValueError(f"{identifier!r} is not dataset:number")
    return int(number)


def _parse_item_fields(
    row: dict, text_key: str, image_key: str, modality_key: str, root: Path
) -> tuple[tuple[str | None, Path | None, str], list[str]]:
    problems = []
    text, image = row.get(text_key), row.get(image_key)
    if text is not None and not isinstance(text, str):
        problems.append(f"{text_key} is text or null, not {type(text).__name__}")
        text = None
    if image is not None and not isinstance(image, str):
        problems.append(f"{image_key} is a path or null, not {type(image).__name__}")
        image = None
    if not (is_unicode(text) and is_unicode(image)):
        problems.append(f"{text_key} or {image_key} contains a lone surrogate")
        text = image = None
    text = format_string(text) or None
    present = ",".join(name for name, value in (("image", image), ("text", text)) if value)
    modality = normalize_modality(row.get(modality_key))
    if modality is None:
        problems.append(f"unknown {modality_key} {row.get(modality_key)!r}; known are {' '.join(MODALITIES)}")
    elif modality != present:
        problems.append(f"{modality_key} {modality} contradicts the fields, which hold {present or 'nothing'}")
    path = None
    if image:
        path = root / image
        if image.startswith(("/", "\\")) or ".." in image.replace("\\", "/").split("/") or "\0" in image:
            problems.append(f"{image_key} {image!r} leaves the directory")
            path = None
    return (text, path, modality or present), problems


def _parse_id(row: dict, key: str) -> tuple[str | None, str | None]:
    value = row.get(key)
    if not isinstance(value, str) or len(value.split()) != 1 or value.strip() != value or not is_unicode(value):
        return None, f"{key} is a text without blanks, not {value!r}"
    return value, None


def _parse_ids(row: dict, key: str) -> tuple[tuple[str, ...] | None, str | None]:
    values = row.get(key)
    if values is None:
        return (), None
    if isinstance(values, list):
        plain = [value.get("did") if isinstance(value, dict) else value for value in values]
        if all(isinstance(value, str) and value and is_unicode(value) for value in plain):
            return tuple(plain), None
    return None, f"{key} is a list of candidate ids"


def is_unicode(text: str | None) -> bool:
    """Returns True if a text is valid Unicode, or None.

    JSON can encode a lone surrogate, but no tokenizer or text file accepts one.
    """
    if text is None or text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
