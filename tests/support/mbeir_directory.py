"""Writes small M-BEIR directories in the published format for tests: drawn shapes, every task, both spellings."""

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from jfe_jax.data.processor import train_tokenizer

VOCAB_SIZE = 600
IMAGE_TOKEN = VOCAB_SIZE - 1
SPLITS = ("train", "val", "test")
# Dataset name and id of each task, as "{dataset}_task{t}": shapes are pictures, facts carry text.
DATASETS = {"shapes": 0, "facts": 2}
UNITS = {0: "shapes", 1: "facts", 2: "facts", 3: "shapes", 4: "shapes", 6: "facts", 7: "shapes", 8: "facts"}
MODALITIES = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
COLOURS = {"red": 0xE03030, "green": 0x30A040, "blue": 0x3060E0, "yellow": 0xE0D030, "black": 0x202020}
SHAPES = ("circle", "square", "triangle", "cross")
STYLES = ("filled", "outlined")
PROMPTS = ("Find what is meant.", "Retrieve the match.", "Which one is it?", 'Pick "the" answer')


def make_mbeir(
    path: Path, queries_per_task: int = 8, seed: int = 0, *, spelling: str = "code", image_size: int = 32
) -> Path:
    """Writes query/, cand_pool/, qrels/, instructions/, images and a tokenizer (path/"tokenizer"); returns `path`.

    Args:
      queries_per_task: number of queries per task and split; the first of each task has two positives.
      spelling: "code" writes did strings, "image,text" and cand_pool/global; "card" writes {"did": …} objects,
        "text,image" and cand_pool/union_pool.
    """
    rng = random.Random(seed)
    card = spelling == "card"
    things = [(colour, shape, style) for colour in COLOURS for shape in SHAPES for style in STYLES]
    for thing in things:
        _draw(path / _image(thing), thing, image_size)
    pools = {task: _pool(task, things) for task in UNITS}
    _number(pools)
    for task, pool in pools.items():
        rows = [row for row, _ in pool]
        _write_rows(path / f"cand_pool/local/mbeir_{UNITS[task]}_task{task}_cand_pool.jsonl", rows, card)
    union = list({row["did"]: row for pool in pools.values() for row, _ in pool}.values())
    for split in SPLITS:
        folder = "union_pool" if card else "global"
        _write_rows(path / f"cand_pool/{folder}/mbeir_union_{split}_cand_pool.jsonl", union, card)
    counts = dict.fromkeys(DATASETS, 0)
    texts = [*PROMPTS, *(row["txt"] for row in union if row["txt"])]
    for split in SPLITS:
        for task, pool in pools.items():
            rows, qrels = [], []
            for number in range(queries_per_task):
                row = _query(task, pool, rng, two=number == 0)
                row["qid"] = f"{DATASETS[UNITS[task]]}:{counts[UNITS[task]]}"
                counts[UNITS[task]] += 1
                texts.append(row["query_txt"] or "")
                qrels += [f"{row['qid']} 0 {did} 1 {task}" for did in row["pos_cand_list"]]
                if card:
                    for key in ("pos_cand_list", "neg_cand_list"):
                        row[key] = [{"did": did} for did in row[key]]
                rows.append(row)
            name = f"mbeir_{UNITS[task]}_task{task}_{split}"
            _write_rows(path / f"query/{split}/{name}.jsonl", rows, card)
            _write(path / f"qrels/{split}/{name}_qrels.txt", "".join(f"{line}\n" for line in qrels))
    _write(path / "instructions/query_instructions.tsv", _instructions(card))
    train_tokenizer(texts, VOCAB_SIZE, path / "tokenizer")
    return path


def edit_line(file: Path, line: int, change: Callable[[str], str]) -> tuple[Path, int]:
    """Rewrites line `line` (from 1) of a file, to plant a defect; returns its file and line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = change(lines[line - 1])
    file.write_text("".join(f"{one}\n" for one in lines), encoding="utf-8")
    return file, line


def edit_row(file: Path, line: int, **fields: object) -> tuple[Path, int]:
    """Sets fields of the JSON object on a line; returns its file and line."""
    return edit_line(file, line, lambda text: json.dumps(json.loads(text) | fields))


def _pool(task: int, things: list) -> list[tuple[dict, tuple]]:
    kind = MODALITIES[task][1]
    pool = []
    for thing in things:
        text = f"A {thing[0]} {thing[1]}, {thing[2]}" if "text" in kind else None
        image = _image(thing) if "image" in kind else None
        pool.append(({"txt": text, "img_path": image, "modality": kind, "src_content": None}, thing))
    return pool


def _number(pools: dict) -> None:
    # The same content in two pools of a dataset is the same candidate.
    known: dict[tuple, str] = {}
    for task, pool in pools.items():
        dataset = DATASETS[UNITS[task]]
        for row, _ in pool:
            key = (dataset, row["txt"], row["img_path"])
            row["did"] = known.setdefault(key, f"{dataset}:{len(known)}")


def _query(task: int, pool: list, rng: random.Random, two: bool) -> dict:
    kind = MODALITIES[task][0]
    row, (colour, shape, style) = rng.choice(pool)
    other = STYLES[1 - STYLES.index(style)]
    if task == 4:
        text, image = None, _image((colour, shape, other))
    elif "image" in kind:
        start = rng.choice([name for name in COLOURS if name != colour])
        text = f"the same but {colour}" if "text" in kind else None
        image = _image((start if text else colour, shape, style))
    else:
        text, image = f"{style} {colour} {shape}", None
    right = [row["did"]]
    if two:
        right += [row["did"] for row, thing in pool if thing == (colour, shape, other)]
    wrong = rng.sample([row["did"] for row, _ in pool if row["did"] not in right], 3)
    return {
        "qid": None,
        "query_txt": text,
        "query_img_path": image,
        "query_modality": kind,
        "query_src_content": None,
        "pos_cand_list": right,
        "neg_cand_list": wrong,
    }


def _image(thing: tuple) -> str:
    colour, shape, style = thing
    # JPEG as published, and PNG with transparency as other sets have it.
    return f"mbeir_images/{shape}/{colour}_{style}.{'jpg' if style == 'filled' else 'png'}"


def _draw(file: Path, thing: tuple, size: int) -> None:
    colour, shape, style = thing
    picture = Image.new("RGBA", (size, size), (255, 255, 255, 255 if style == "filled" else 0))
    draw = ImageDraw.Draw(picture)
    rgb = tuple(COLOURS[colour].to_bytes(3, "big"))
    paint = {"fill": (*rgb, 255)} if style == "filled" else {"outline": (*rgb, 255), "width": max(1, size // 10)}
    low, high, middle = size // 8, size - size // 8, size // 2
    if shape == "circle":
        draw.ellipse((low, low, high, high), **paint)
    elif shape == "square":
        draw.rectangle((low, low, high, high), **paint)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], **paint)
    else:
        draw.rectangle((middle - low, low, middle + low, high), **paint)
        draw.rectangle((low, middle - low, high, middle + low), **paint)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB" if file.suffix == ".jpg" else "RGBA").save(file)


def _instructions(card: bool) -> str:
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"]
    for task, name in UNITS.items():
        query, candidate = (_spelt(kind, card) for kind in MODALITIES[task])
        prompts = "\t".join(prompt.replace("Find", f"Find by {query}") for prompt in PROMPTS)
        lines.append(f"{query}\t{candidate}\t{name}\t{DATASETS[name]}\t{prompts}")
    return "".join(f"{line}\n" for line in lines)


def _spelt(modality: str, card: bool) -> str:
    return "text,image" if card and modality == "image,text" else modality


def _write_rows(file: Path, rows: list[dict], card: bool) -> None:
    lines = []
    for row in rows:
        key = "query_modality" if "qid" in row else "modality"
        lines.append(json.dumps(row | {key: _spelt(row[key], card)}) + "\n")
    _write(file, "".join(lines))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def archive_images(path: Path, parts: int = 0) -> None:
    """Moves mbeir_images/ into mbeir_images.tar.gz, or into that number of parts, as published."""
    whole = path / "mbeir_images.tar.gz"
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(path / "mbeir_images", "mbeir_images")
    shutil.rmtree(path / "mbeir_images")
    if parts:
        content = whole.read_bytes()
        size = -(-len(content) // parts)
        for part in range(parts):
            (path / f"{whole.name}.part-{part:02d}").write_bytes(content[part * size : (part + 1) * size])
        whole.unlink()
