"""Tensor names in Hugging Face files, of every backbone; the tables are in the backbones' folders."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from jfe_jax.errors import UserError
from jfe_jax.models.hf_spec import Entry, TensorNames
from jfe_jax.models.registry import hf_formats


@functools.cache
def _all_names() -> tuple[TensorNames, ...]:
    return tuple(hf_format.names for hf_format in hf_formats())


def canonical(name: str) -> str | None:
    """Returns a file's tensor name as the tables spell it; None if an encoder has no use for it by design."""
    for names in _all_names():
        for pattern, replacement in names.spellings:
            name = pattern.sub(replacement, name)
    return None if any(names.ignored and names.ignored.search(name) for names in _all_names()) else name


def prefixes(names: Iterable[str]) -> dict[str, str]:
    """Returns how these names spell the tables' roots; a root that is spelled in several ways is left out."""
    roots = [root for backbone in _all_names() for root in backbone.roots]
    found: dict[str, set[str]] = {}
    for name in names:
        known = canonical(name) or ""
        for root in roots:
            if known.startswith(root):
                found.setdefault(root, set()).add(name.removesuffix(known.removeprefix(root)))
    return {root: spellings.pop() for root, spellings in found.items() if len(spellings) == 1}


class Piece(NamedTuple):
    """One torch tensor and where it goes.

    Attributes:
      entry: its line of the table.
      layer: index along L; None if the parameter is not stacked.
      shape: of our part, without L.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]


def pieces(shapes: dict[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Every torch tensor of a model, by name.

    Args:
      shapes: shape of each of our parameters by dotted path.

    Raises:
      UserError: a parameter that the table does not know: the model has no Hugging Face layout.
    """
    table = next((table for names in _all_names() if (table := names.table(shapes))), ())
    unknown = sorted(shapes.keys() - {entry.ours for entry in table})
    if unknown:
        raise UserError(f"no Hugging Face name for {', '.join(unknown)}; two towers of one's own have no layout there")
    found = {}
    for entry in table:
        shape = shapes[entry.ours]
        for layer in range(shape[0]) if entry.stacked else (None,):
            found[entry.theirs.format(layer=layer)] = Piece(entry, layer, shape[1:] if entry.stacked else shape)
    return found
