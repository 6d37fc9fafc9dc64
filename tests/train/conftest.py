"""A run on a data set on disk."""

import pytest

from jfe_jax.cli.main import main
from jfe_jax.config import Config, from_dict
from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, make_mbeir

STEPS = 8


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Config:
    """Eight steps on a small M-BEIR directory, saved every three, logged every one."""
    source, data = tmp_path_factory.mktemp("mbeir"), tmp_path_factory.mktemp("data")
    make_mbeir(source, queries_per_task=4)
    assert main(["data", "prepare", str(source), "--out", str(data)]) == 0
    tree = {
        "log_every_steps": 1,
        "val_every_steps": 4,
        "val_steps": 2,
        "model": {
            "vision": {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2},
            "text": {
                "vocab_size": VOCAB_SIZE,
                "width": 32,
                "depth": 1,
                "mlp_dim": 64,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 16,
            },
            "image_token": IMAGE_TOKEN,
        },
        "tokens": {"tokenizer": str(source / "tokenizer"), "max_text_tokens": 40},
        "data": {"path": str(data), "val_split": "val", "pairs": 8, "rows": 8, "row_tokens": 64, "image_slots": 16},
        "optimizer": {"steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 1, "keep_every_steps": 6, "keep_best": 1},
        "mesh": {"data": 1},
    }
    return from_dict(tree)
