"""A directory in M-BEIR's published format and proportions, of any size: what the data benchmarks read.

Texts are drawn words; rows by unit and mean lengths are those of `mbeir_units`.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from PIL import Image

from benchmarks.data.mbeir_units import MODALITIES, PROMPTS, UNITS, UnitShape, lengths

_WORDS = """
the of and a in to is was for on with as by at from his her it that an are were has be this which or also had its one
two first new not they after their city during during time years most other some where into between known used state
world many there only three later than made over part american national team while when who season film found became
about water high school university house river family group south north building near street people war series
century called music team life church company large under small number old white red black blue green long light
player station born career game album song system area north west east district local county town village island
road line bridge park mountain lake sea coast ship train car aircraft engine bird dog cat horse fish tree flower
plant forest leaf stone wood metal glass paper table chair window door wall roof room kitchen garden field farm
woman man child girl boy friend king queen president minister soldier officer artist writer teacher student doctor
dress shirt sleeve collar skirt jacket shoe hat bag stripe pattern cotton leather floral shorter longer brighter
standing sitting walking holding wearing looking playing riding eating cooking reading writing speaking running
photograph portrait picture painting sculpture museum gallery exhibition festival ceremony award election
government parliament court police military army navy hospital airport market restaurant hotel store office
"""
# File systems allow a file some ten thousand names.
_NAMES_PER_FILE = 20_000


def write(
    path: Path,
    rows: int,
    *,
    images: Literal["none", "files", "tar", "parts"] = "files",
    distinct: int = 0,
    small: bool = False,
    seed: int = 0,
) -> int:
    """Writes about `rows` rows of training queries and local candidates in all; returns how many.

    Args:
      distinct: number of images that the queries of a data set share, and likewise its candidates; 0 for one per row.
      images: "files" makes a file for each path (names of a few JPEG of short side 256); "tar" one mbeir_images.tar.gz,
        "parts" the same cut in four as published; "none" leaves the images out.
      small: in an archive each image is then another one, of a kilobyte.
    """
    rng = np.random.default_rng(seed)
    scale = rows / sum(1000 * (unit.queries + unit.candidates) for unit in UNITS)
    words = vocabulary(rng)
    counts = [[max(1, round(1000 * scale * n)) for n in (unit.queries, unit.candidates)] for unit in UNITS]
    first = dict.fromkeys((unit.dataset for unit in UNITS), 0)
    asked = dict(first)
    names: dict[str, None] = {}
    for unit, (queries, candidates) in zip(UNITS, counts, strict=True):
        pool = f"cand_pool/local/mbeir_{unit.dataset}_task{unit.task}_cand_pool.jsonl"
        _write_lines(path / pool, _candidates(unit, first[unit.dataset], candidates, words, rng, names, distinct))
        stem = f"mbeir_{unit.dataset}_task{unit.task}_train"
        pairs = rng.integers(first[unit.dataset], first[unit.dataset] + candidates, queries)
        rows_ = _queries(unit, asked[unit.dataset], pairs, words, rng, names, distinct)
        _write_lines(path / f"query/train/{stem}.jsonl", rows_)
        qrels = (
            b"%d:%d 0 %d:%d 1 %d" % (unit.number, asked[unit.dataset] + i, unit.number, did, unit.task)
            for i, did in enumerate(pairs)
        )
        _write_lines(path / f"qrels/train/{stem}_qrels.txt", qrels)
        first[unit.dataset] += candidates
        asked[unit.dataset] += queries
    _write_lines(path / "instructions/query_instructions.tsv", _instructions())
    if images != "none":
        pictures = [] if small else [_jpeg(rng) for _ in range(64)]
        make = _write_files if images == "files" else _write_archive
        make(path, list(names), pictures, images)
    return sum(map(sum, counts))


def texts(count: int, mean_words: int, rng: np.random.Generator, words: np.ndarray) -> list[str]:
    """Drawn texts of log-normal length."""
    sizes = lengths(count, mean_words, rng)
    # Few words make most of a text, as in a language.
    drawn = words[(len(words) * rng.random(sizes.sum()) ** 3).astype(int)].tolist()
    ends = np.cumsum(sizes)
    return [" ".join(drawn[end - length : end]) for length, end in zip(sizes, ends, strict=True)]


def vocabulary(rng: np.random.Generator) -> np.ndarray:
    """Words for `texts`."""
    # Frequent ones first, as `texts` draws them; the numbers make texts differ.
    return np.array([*_WORDS.split(), *map(str, rng.integers(0, 3000, 40))])


def _texts(mean: int, count: int, words: np.ndarray, rng: np.random.Generator) -> Iterator[str | None]:
    if not mean:
        yield from (None for _ in range(count))
    for start in range(0, count if mean else 0, 10_000):
        yield from texts(min(10_000, count - start), mean, rng, words)


def _candidates(
    unit: UnitShape,
    first: int,
    count: int,
    words: np.ndarray,
    rng: np.random.Generator,
    names: dict[str, None],
    distinct: int,
) -> Iterator[bytes]:
    kind = MODALITIES[unit.task][1]
    for i, text in enumerate(_texts(unit.candidate_words, count, words, rng)):
        image = None
        if "image" in kind:
            number = (first + i) % distinct if distinct else first + i
            image = f"mbeir_images/{unit.dataset}_images/{number // 1000:04d}/c{number}.jpg"
            names[image] = None
        did = f"{unit.number}:{first + i}"
        yield orjson.dumps({"txt": text, "img_path": image, "modality": kind, "did": did, "src_content": None})


def _queries(
    unit: UnitShape,
    first: int,
    pairs: np.ndarray,
    words: np.ndarray,
    rng: np.random.Generator,
    names: dict[str, None],
    distinct: int,
) -> Iterator[bytes]:
    kind = MODALITIES[unit.task][0]
    for i, (text, did) in enumerate(zip(_texts(unit.query_words, len(pairs), words, rng), pairs.tolist(), strict=True)):
        image = None
        if "image" in kind:
            number = (first + i) % distinct if distinct else first + i
            image = f"mbeir_images/{unit.dataset}_images/query/{number // 1000:04d}/q{number}.jpg"
            names[image] = None
        row = {
            "qid": f"{unit.number}:{first + i}",
            "query_txt": text,
            "query_img_path": image,
            "query_modality": kind,
            "query_src_content": None,
            "pos_cand_list": [f"{unit.number}:{did}"],
            "neg_cand_list": [f"{unit.number}:{pairs[(i + shift) % len(pairs)]}" for shift in (1, 2)],
            "task_id": unit.task,
        }
        yield orjson.dumps(row)


def _instructions() -> Iterator[bytes]:
    yield b"query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"
    for unit in UNITS:
        query, candidate = MODALITIES[unit.task]
        yield "\t".join((query, candidate, unit.dataset, str(unit.number), *PROMPTS)).encode()


def _jpeg(rng: np.random.Generator) -> bytes:
    # Noise of several scales compresses about as M-BEIR's photographs do: 40 KB each.
    height, width = 256, int(rng.integers(256, 400))
    picture = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((width, height))
        picture += np.asarray(noise) / (3 * np.log2(cells) / 2)
    picture += rng.normal(0, 12, (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _small_jpeg(number: int) -> bytes:
    pixels = np.frombuffer(hashlib.shake_128(b"%d" % number).digest(24 * 32 * 3), np.uint8).reshape(24, 32, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=50)
    return out.getvalue()


def _write_files(path: Path, names: list[str], pictures: list[bytes], form: str) -> None:
    made: set[str] = set()
    named: dict[int, str] = {}
    for number, name in enumerate(names):
        file = os.path.join(path, name)
        folder = os.path.dirname(file)
        if folder not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        turn, which = divmod(number, len(pictures))
        if turn % _NAMES_PER_FILE == 0:
            with open(file, "wb") as stream:
                stream.write(pictures[which])
            named[which] = file
        else:
            os.link(named[which], file)


def _write_archive(path: Path, names: list[str], pictures: list[bytes], form: str) -> None:
    # Not in the order of the rows: the published archive is not either.
    order = np.random.default_rng(0).permutation(len(names))
    whole = path / "mbeir_images.tar.gz"
    with tarfile.open(whole, "w:gz", compresslevel=1) as archive:
        for number in order:
            picture = pictures[number % len(pictures)] if pictures else _small_jpeg(number)
            member = tarfile.TarInfo(names[number])
            member.size = len(picture)
            archive.addfile(member, io.BytesIO(picture))
            # It would keep all of them.
            archive.members.clear()
    if form == "parts":
        size = -(-whole.stat().st_size // 4)
        with open(whole, "rb") as stream:
            for part in range(4):
                (path / f"mbeir_images.tar.gz.part-{part:02d}").write_bytes(stream.read(size))
        whole.unlink()


def _write_lines(file: Path, lines: Iterator[bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        stream.writelines(line + b"\n" for line in lines)
