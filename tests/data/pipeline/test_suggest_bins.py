"""Suggested bins hold the items that they are suggested for."""

import numpy as np
import pytest
import yaml

from jfe_jax.cli.main import main
from jfe_jax.config import load, to_yaml
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.data.pipeline.packer import Packer
from jfe_jax.data.pipeline.suggest_bins import suggest
from jfe_jax.errors import UserError


def test_suggested_bins_hold_the_items_in_less_room_than_rows_of_the_longest():
    random = np.random.default_rng(0)
    lengths = np.concatenate(
        [random.integers(8, 60, 400), random.integers(270, 290, 500), random.integers(350, 630, 40)]
    )
    tokens = 6400
    bins = suggest(lengths.tolist(), tokens, "xla")
    assert max(bins) >= lengths.max() and sum(size * count for size, count in bins.items()) >= tokens
    # Attention over them multiplies less than over ten rows of 640.
    assert sum(size * size * count for size, count in bins.items()) < 0.8 * tokens * 640
    filled = []
    for seed in range(8):
        packer = Packer(
            groups=1, rows=10, row_tokens=640, image_slots=0, image_size=1, layout="packed", bins=tuple(bins.items())
        )
        for number, length in enumerate(np.random.default_rng(seed).choice(lengths, 60)):
            packer.add(0, [(number, EncodedItem(np.zeros(length, np.int32), None))])
        filled.append(1 - packer.free[0] / tokens)
    assert np.mean(filled) > 0.97
    assert not any(size % 128 for size in suggest(lengths.tolist(), tokens, "splash"))
    with pytest.raises(ValueError, match="longest of 700 tokens"):
        suggest([700], 640, "xla")


def test_the_verb_suggests_bins_that_the_run_takes(make_config, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(make_config()))
    assert main(["data", "bins", "--config", str(file), "--groups", "2", "--steps", "3"]) == 0
    said = capsys.readouterr().out
    bins = yaml.safe_load(said)["data"]["bins"]
    # The longest item there may be: 4 patches, 40 tokens of text, <bos>, newline and <eos>.
    assert all(count % 2 == 0 for count in bins.values()) and max(bins) >= 47
    assert "% full; attention over these bins multiplies" in said
    cfg = load(file, [f"--data.bins={bins}"])
    assert cfg.data.bins == bins
    batches = training_batches(cfg, groups=2, split="train")
    try:
        packed = next(batches).packed
    finally:
        batches.close()
    assert [part.shape[1:] for part in packed.bins.token_index] == [(n // 2, size) for size, n in sorted(bins.items())]
    file.write_text(to_yaml(cfg))
    assert load(file, []) == cfg
    with pytest.raises(UserError, match="90 is more than the 80 tokens of a group's rows"):
        training_batches(load(file, ["--data.bins={90: 40}", "--data.rows=2"]), groups=2, split="train")
