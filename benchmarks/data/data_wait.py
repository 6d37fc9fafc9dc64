"""Measures the time that devices wait for data in `jfe train`, by its log: two model sizes on the same directory."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.model_sizes import geometry
from benchmarks.common.result import Progress, Table, table
from benchmarks.data import synthetic_mbeir
from jfe_jax.data.processor import train_tokenizer

# Geometry → steps, and what a step takes: pairs, rows, their tokens, image slots. Images are 56 pixels and 224.
RUNS = {"tiny": (40, 64, 16, 640, 96), "30m": (4, 4, 2, 1280, 8)}
# Lines of the log for each run; the first is of fewer steps and is left out.
_LINES = 4


def data_wait(prepared: Path, folder: Path, progress: Progress) -> Table:
    """Trains each of RUNS on `prepared`; `folder` is for what they write.

    Raises:
      RuntimeError: a run failed.
    """
    rows: list[list[Any]] = []
    with progress("training", len(RUNS)) as done:
        for name, (steps, *_) in RUNS.items():
            log = _train(name, prepared, folder / name)
            columns = ([line[what] for line in log] for what in ("items_per_second", "data_wait"))
            rows.append([f"{name}, {steps} steps", *columns])
            done(1)
    return table({"geometry": "", "items/s": ".0f", "data wait": ".1%"}, rows, "Training, reading in threads:")


def _train(name: str, prepared: Path, folder: Path) -> list[dict[str, float]]:
    steps, pairs, rows, row_tokens, image_slots = RUNS[name]
    model = geometry(name)
    words = synthetic_mbeir.vocabulary(np.random.default_rng(0)).tolist()
    train_tokenizer(words, model.text.vocab_size, folder / "tokenizer")
    config = {
        "model": asdict(model),
        "tokens": {"tokenizer": str(folder / "tokenizer"), "max_text_tokens": 380},
        "data": {
            "path": str(prepared),
            "pairs": pairs,
            "rows": rows,
            "row_tokens": row_tokens,
            "image_slots": image_slots,
        },
        "optimizer": {"steps": steps, "warmup_steps": 0},
        "mesh": {"data": 1},
        "log_every_steps": steps // _LINES,
    }
    file, output = folder / "config.yaml", folder / "run"
    # JSON is YAML.
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "jfe_jax.cli.main", "train", "--config", str(file), f"--output={output}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = (output / "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]
