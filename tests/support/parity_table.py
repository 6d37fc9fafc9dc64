"""`python -m tests.support.parity_table`: how far ours is from transformers' classes, as docs/hf-interop.md has it.

Each figure is the largest over both layouts, packed and padded, and over what the column's items have in common.
"""

import contextlib
import io
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType

from tests.support import paligemma_oracle, paligemma_parity, siglip_clip_oracle, siglip_clip_parity

MODALITIES = ("text", "image", "image and text")


def modality(item: str) -> str:
    """Of an item of the oracle, by its name."""
    return "image and text" if "image and text" in item else "image" if "image" in item else "text"


def row(name: str, directory: Path, parity: ModuleType = paligemma_parity) -> list[str]:
    """The cells of one configuration of the module that measures its kind of model."""
    two = parity.pair(name, directory)
    found: dict[tuple[str, str], float] = defaultdict(float)
    for layout in parity.LAYOUTS:
        for item, measure, error in parity.errors(two, layout):
            key = modality(item), "states" if "states" in measure else "embeddings"
            found[key] = max(found[key], error)
    cells = [f"{found[one, 'states']:.0e} / {found[one, 'embeddings']:.0e}" for one in MODALITIES]
    gradient = max(error for _, error in parity.gradient_errors(two))
    worst = list(parity.bfloat16_errors(two))
    half = f"{max(error for _, error, _ in worst):.0e}, {min(cosine for *_, cosine in worst):.5f}"
    return [name, *cells, f"{gradient:.0e}", half]


def main() -> None:
    print("| states / embeddings | text | image | image + text | gradients | bfloat16: error, cosine |")
    print("|---|---|---|---|---|---|")
    for models, measures in (
        (paligemma_oracle.MODELS, paligemma_parity),
        (siglip_clip_oracle.MODELS, siglip_clip_parity),
    ):
        for name in models:
            # transformers prints empty lines as it saves.
            with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
                cells = row(name, Path(directory), measures)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
