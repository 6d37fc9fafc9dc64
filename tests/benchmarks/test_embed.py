"""`jfe bench embed` on a tiny model: a pool of all kinds, rows in its order, and no result if the sides differ."""

import argparse
import contextlib
import json
from collections import Counter

import numpy as np
import pytest

from benchmarks.embed import embed, pool
from jfe_jax.embedding.items_jsonl import ItemsFile
from jfe_jax.errors import UserError


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


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_sides_give_the_same_vectors_in_the_order_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(embed.Apart, "rate", lambda *args: (1e9, "a card"))
    result = embed.run(arguments(tmp_path), quiet)
    ours, *theirs = result.tables[0].rows
    assert ours[0] == "jfe" and len(ours[1]) == 2 and ours[3] is None
    assert theirs[0][3] == pytest.approx([a / b for a, b in zip(ours[1], theirs[0][1], strict=True)])
    assert result.method.startswith("tiny, float32; 12 items") and result.device == ""
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_sides_that_differ_are_not_timed(tmp_path, monkeypatch):
    vectors = {"jfe": 0.5, "sentence-transformers": 0.5002}

    class Fake:
        def __init__(self, side, model, device):
            self.rate = lambda *args: (1e9, "")
            self.side, self.close = side, lambda: None

        def __call__(self, *args):
            return np.full((12, 4), vectors[self.side], np.float32)

    config = argparse.Namespace(model=argparse.Namespace(dtype="float32"))
    monkeypatch.setattr(embed.pool, "write_export", lambda *args: config)
    monkeypatch.setattr(embed, "Apart", Fake)
    with pytest.raises(UserError, match="do not compute the same"):
        embed.run(arguments(tmp_path), quiet)


def test_on_a_gpu_it_is_three_billion_parameters_in_bfloat16():
    args = arguments("", device="gpu", geometry=None)
    model = embed._model(args)
    assert model.dtype == "bfloat16" and (model.text.width, model.text.depth, model.vision.depth) == (2048, 18, 27)
    assert model.image_token == model.text.vocab_size - 1 == 32767
    name = embed._named(args, argparse.Namespace(model=model))
    assert name == "3b with a vocabulary of 32,768, bfloat16"
