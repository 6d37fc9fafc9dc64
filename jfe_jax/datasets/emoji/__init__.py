"""Builds a multimodal benchmark of small pictures: emoji of two vendors and their names, as an M-BEIR directory.

Images come from Noto Emoji and Twemoji, texts from emojibase, all through npm packages (`npm.py`). The rest of the
library only reads the directory that `write_benchmark` writes.

Units (`tasks.py`): `emoji` holds M-BEIR's tasks 0, 1, 2, 3, 4, 6 and 8. Task 7, image + text → image, is in three data
sets that are reported separately: `emojimodify` (set a named value), `emojirelative` (a function of the image's own
value), `emojiselect` (the text selects the relevant values of the image). `emojicaption` and `emojitext` are stage 1.
`query_src_content` holds JSON with the base `group`, the `kind` and `edit` of the query, what its image `shows`, and a
`foil`.

Splits (`splits.py`): `train`, `val` and `test` share no base emoji; `combo` queries for unseen tones, genders and
vendors of bases seen in training.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jfe_jax.data.formats.mbeir import format_string
from jfe_jax.data.processor import train_tokenizer
from jfe_jax.datasets.emoji.images import find_images, read_gallery, write_emoji_images
from jfe_jax.datasets.emoji.labels import read_labels
from jfe_jax.datasets.emoji.mbeir_layout import MbeirLayout
from jfe_jax.datasets.emoji.packages import PACKAGES
from jfe_jax.datasets.emoji.phrases import PROMPTS, STYLES
from jfe_jax.datasets.emoji.query_spec import SceneIndex, text_of
from jfe_jax.datasets.emoji.splits import FOLDS, SPLITS, make_split_views
from jfe_jax.datasets.emoji.tasks import SPECS, make_task_data
from jfe_jax.datasets.npm import cache_directory, fetch_packages
from jfe_jax.errors import UserError

# Incremented when the same settings produce different data.
VERSION = 1
VOCAB_SIZE = 2048
_MANIFEST = "emoji.json"


def write_benchmark(
    out: str | Path,
    size: int = 64,
    seed: int = 0,
    fold: int = 0,
    *,
    packages: dict[str, Path] | None = None,
    vocab_size: int = VOCAB_SIZE,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Writes the benchmark into the new directory `out`, with a tokenizer trained on its training texts.

    The directory is a deterministic function, byte by byte, of the packages and of `size`, `seed` and `fold`. It is
    written atomically. One that was made with the same settings is left unchanged.

    Args:
      size: height and width of the images.
      seed: random seed of the folds and of the sampled queries.
      fold: index of the test split among the FOLDS parts of the base emoji.
      packages: directory of each of PACKAGES; fetched if None.
      progress: called with a line for each step.

    Returns:
      Number of queries by "split/unit".

    Raises:
      UserError: `out` holds other data, the packages cannot be fetched, or the disk is full.
    """
    out = Path(out)
    if size < 8 or not 0 <= fold < FOLDS:
        raise UserError(f"size {size}, fold {fold}: images need 8 pixels or more, and folds are 0 to {FOLDS - 1}")
    settings = {"version": VERSION, "size": size, "seed": seed, "fold": fold, "vocab_size": vocab_size}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _check_existing(out, settings)
    packages = fetch_packages(cache_directory(), progress, PACKAGES) if packages is None else packages
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            made = Path(scratch) / "made"
            counts = _write(made, packages, settings, progress)
            if out.exists():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); nothing was left behind") from error
    return counts


def _check_existing(out: Path, settings: dict[str, int]) -> dict[str, int]:
    try:
        manifest = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
        there, counts = manifest["settings"], manifest["queries"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out}: is there already and was not made by this command; name another directory") from error
    if there != settings:
        raise UserError(f"{out}: was made with {there}, now {settings} is wanted; remove it or name another directory")
    return counts


def _write(
    root: Path, packages: dict[str, Path], settings: dict[str, int], progress: Callable[[str], None]
) -> dict[str, int]:
    progress("reading labels and images")
    files = {style: find_images(packages[style]) for style in STYLES}
    emoji = read_labels(packages["emojibase"], {code for of_style in files.values() for code in of_style})
    gallery = read_gallery(emoji, files)
    scenes = SceneIndex(gallery)
    views = make_split_views(gallery, settings["seed"], settings["fold"])
    layout = MbeirLayout(root, scenes)
    counts: Counter[str] = Counter()
    texts: list[str] = []
    for name in SPLITS:
        progress(f"making the queries of {name}")
        for spec in SPECS:
            if name in spec.splits:
                made = make_task_data(spec, scenes, views[name], name, settings["seed"])
                layout.add_unit(spec.unit, name, made.queries, made.negatives, made.pool)
                counts[f"{name}/{spec.unit.name}"] = len(made.queries)
                if name == "train":
                    texts += [query.text for query in made.queries if query.text]
                    texts += [text for key in made.pool if (text := text_of(key)) is not None]
    layout.finish()
    progress("training the tokenizer")
    prompts = [prompt for four in PROMPTS.values() for prompt in four]
    # Every stage 2 query follows a prompt, so the prompts' words get the same weight as the queries'.
    prompts *= max(1, len(texts) // len(prompts))
    train_tokenizer([*prompts, *texts, *map(format_string, texts)], settings["vocab_size"], root / "tokenizer")
    progress(f"writing {len(gallery.pixels)} images")
    write_emoji_images(gallery, root, settings["size"])
    _write_licenses(root, packages)
    manifest = {"settings": settings, "queries": dict(counts)}
    (root / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return dict(counts)


def _write_licenses(root: Path, packages: dict[str, Path]) -> None:
    lines = ["# Licences of what this directory is made from", ""]
    for key, package in PACKAGES.items():
        lines += [f"- {package.name} {package.version} (npm): {package.license}. {package.notice}"]
        license_file = packages[key] / "LICENSE"
        if license_file.is_file():
            (root / "licences").mkdir(exist_ok=True)
            shutil.copyfile(license_file, root / "licences" / f"{package.name}.txt")
    lines += [
        "",
        "Changes: images are drawn on white, scaled where the size asks for it, and joined with the texts.",
        "The packages' own licence files are in licences/.",
    ]
    (root / "LICENSES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
