"""`jfe bench embed` on a tiny model: a pool of all kinds, rows in its order, and no result if the sides differ."""

import argparse
import contextlib
import json
from collections import Counter

import numpy as np
import pytest

from jfe_jax.bench import embed, pool
from jfe_jax.errors import UserError
from jfe_jax.retrieval.items_file import ItemsFile


@contextlib.contextmanager
def quiet(name, total):
    yield lambda count: None


def arguments(folder, **changes):
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)
    words = ["--geometry", "tiny", "--items", "12", "--rounds", "2", "--tried", "4", "--batches", "2"]
    args = parser.parse_args([*words, "--dir", str(folder)])
    return argparse.Namespace(**(vars(args) | changes))


def test_a_pool_has_all_kinds_of_items_and_is_read_under_two_paths(tmp_path):
    file = pool.write_pool(tmp_path / "pool", 200)
    source = ItemsFile(file)
    kinds = Counter(item.modality for item in source.items(0, 200))
    assert len(source) == 200 and min(kinds[kind] for kind in ("text", "image", "image,text")) > 10
    again = pool.linked(file.parent, tmp_path / "again")
    lines = again.read_text().splitlines()
    images = [again.parent / image for image in (json.loads(line)["image"] for line in lines) if image]
    assert images and all(image.is_file() for image in images)


def test_both_sides_give_the_same_vectors_in_the_order_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_rate", lambda: 1e9)
    result = embed.run(arguments(tmp_path), quiet)
    ours, *theirs = result.tables[0].rows
    assert ours[0] == "jfe" and len(ours[1]) == 2 and ours[3] is None
    assert theirs[0][3] == pytest.approx([a / b for a, b in zip(ours[1], theirs[0][1], strict=True)])
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_sides_that_differ_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_rate", lambda: 1e9)
    monkeypatch.setattr(embed.pool, "write_model", lambda *args: None)
    for name, value in (("Ours", 0.5), ("Theirs", 0.5002)):
        vectors = np.full((12, 4), value, np.float32)
        monkeypatch.setattr(embed, name, lambda folder, vectors=vectors: lambda *args: vectors)
    with pytest.raises(UserError, match="do not compute the same"):
        embed.run(arguments(tmp_path), quiet)
