"""Stored results: DIR/NAME.json, which section NAME of the README shows."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from benchmarks.common import result as results
from benchmarks.common import tables
from jfe_jax.errors import UserError


def fill(readme: Path, directory: Path) -> list[str]:
    """Makes the README's sections again, from the results of `directory`; returns their names.

    Raises:
      UserError: a section's result is not there or is not one, a marker has no other end, there is no such file.
    """
    try:
        text = readme.read_text(encoding="utf-8")
        made = tables.filled(text, lambda name: results.read(directory / f"{name}.json"))
    except FileNotFoundError as error:
        raise UserError(f"{readme}: no such file; run it in the checkout, or give --readme FILE") from error
    except UserError as error:
        raise UserError(f"{readme}: {error}") from error
    if made != text:
        results.replace_text(readme, made)
    return tables.names(text)


def again(
    readme: Path, directory: Path, only: Collection[str], skip: Collection[str], say: Callable[[str], None]
) -> None:
    """Runs the stored results' commands again, one after the other, and puts each into the README when it is there.

    Each is a process of its own. One that fails keeps its old result, and does not keep the others from running.

    Raises:
      UserError: `only` or `skip` names what is not stored; at the end, if any failed.
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
        say(f"{name}: jfe {shlex.join(words)}")
        done = subprocess.run([sys.executable, "-m", "jfe_jax.cli.main", *words, "--json", str(file)])
        if done.returncode:
            failed.append(name)
        else:
            fill(readme, directory)
    if failed:
        raise UserError(f"{', '.join(failed)}: did not run to the end; what was stored of them is as it was")
