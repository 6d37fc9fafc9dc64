"""Stored results: DIR/NAME.json, which section NAME of a documentation page shows."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks.common import result as results
from benchmarks.common import tables
from jfe_jax.errors import UserError


def page_files(paths: Sequence[Path]) -> list[Path]:
    """Expands each directory into its Markdown files.

    Raises:
      UserError: a path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or directory; run this in the checkout, or give --pages")
    return [file for path in paths for file in (sorted(path.glob("*.md")) if path.is_dir() else [path])]


def fill(paths: Sequence[Path], directory: Path) -> list[tuple[Path, str]]:
    """Regenerates the sections of the pages from the results in `directory`.

    No page is written unless all of them can be.

    Returns:
      Each section, as its page and its name.

    Raises:
      UserError: a path does not exist, a section's result is missing or malformed, or a marker is unpaired.
    """
    written, sections = {}, []
    for page in page_files(paths):
        text = page.read_text(encoding="utf-8")
        try:
            filled = tables.filled(text, lambda name: results.read(directory / f"{name}.json"))
        except UserError as error:
            raise UserError(f"{page}: {error}") from error
        sections += [(page, name) for name in tables.names(text)]
        if filled != text:
            written[page] = filled
    for page, text in written.items():
        results.replace_text(page, text)
    return sections


def again(
    paths: Sequence[Path], directory: Path, only: Collection[str], skip: Collection[str], log: Callable[[str], None]
) -> None:
    """Reruns the commands of the stored results one after the other, and updates the pages after each.

    Each command runs in its own process. A failed one keeps its old result and does not stop the others.

    Raises:
      UserError: `only` or `skip` names a result that is not stored; at the end, if any command failed.
    """
    files = {file.stem: file for file in sorted(directory.glob("*.json"))}
    unknown = sorted({*only, *skip} - set(files))
    if unknown or not files:
        raise UserError(f"{directory}: no result {', '.join(unknown) or 'at all'}; it has {', '.join(files) or 'none'}")
    failed = []
    for name, file in files.items():
        if name in skip or (only and name not in only):
            continue
        words = shlex.split(results.read(file).command)[1:]
        log(f"{name}: jfe {shlex.join(words)}")
        done = subprocess.run([sys.executable, "-m", "jfe_jax.cli.main", *words, "--json", str(file)])
        if done.returncode:
            failed.append(name)
        else:
            fill(paths, directory)
    if failed:
        raise UserError(f"{', '.join(failed)}: did not run to the end; what was stored of them is as it was")
