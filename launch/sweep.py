"""The sweep behind configs/emoji: each model's settings, chosen by the validation loss of fold 0.

    python launch/sweep.py      about an hour on 2 cores

First learning rate and pooling, after 300 steps; then the best two of these with images shifted, and the best without,
after 600. Every model has the same settings to choose from, and stage 2 from random weights to choose by. Test queries
have no part in it. Finished runs are kept; the table is printed and written to runs/emoji-sweep/table.md.
"""

import itertools
import json
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from emoji import free_cores, jfe, prepare, prepared

MODELS = ("jfe", "score", "feature")
RATES = ("1.5e-3", "3e-3", "6e-3")
POOLINGS = ("last", "mean")
SHIFT = 6
ROOT = Path("runs/emoji-sweep")


class Trial(NamedTuple):
    model: str
    rate: str
    pooling: str
    shift: int
    steps: int


def validation_loss(trial: Trial, raw: Path, cores: "queue.Queue[int]") -> float:
    out = ROOT / "-".join(map(str, trial))
    core = cores.get()
    try:
        jfe(
            out.name,
            *("train", "--config", f"configs/emoji/{trial.model}_stage2.yaml", "--init=", f"--output={out}"),
            *(f"--data.path={prepared(raw)}", f"--tokens.tokenizer={raw / 'tokenizer'}"),
            *(f"--optimizer.learning_rate={trial.rate}", f"--model.pooling={trial.pooling}"),
            *(f"--optimizer.steps={trial.steps}", f"--data.image_shift={trial.shift}"),
            *("--data.val_split=val", f"--val_every_steps={trial.steps}", "--val_steps=8"),
            core=core,
        )
    finally:
        cores.put(core)
    lines = map(json.loads, (out / "logs" / "metrics.jsonl").read_text().splitlines())
    return next(line["val_loss"] for line in lines if "val_loss" in line)


def main() -> None:
    raw = prepare(0)
    cores = free_cores()

    def losses(trials: list[Trial]) -> dict[Trial, float]:
        with ThreadPoolExecutor(cores.qsize()) as pool:
            return dict(zip(trials, pool.map(lambda trial: validation_loss(trial, raw, cores), trials), strict=True))

    choices = list(itertools.product(RATES, POOLINGS))
    first = losses([Trial(model, *choice, 0, 300) for choice in choices for model in MODELS])
    ranked = {model: sorted((t for t in first if t.model == model), key=first.__getitem__) for model in MODELS}
    long = {
        f"600 steps: {place}, {f'shifted by up to {shift}' if shift else 'not shifted'}": [
            ranked[model][rank]._replace(shift=shift, steps=600) for model in MODELS
        ]
        for rank, place, shift in ((0, "the best above", 0), (0, "the best above", SHIFT), (1, "the second", SHIFT))
    }
    second = losses([trial for trials in long.values() for trial in trials])

    table = ["| 300 steps: learning rate, pooling | " + " | ".join(MODELS) + " |"]
    table.append("|---|" + "---:|" * len(MODELS))
    for choice in choices:
        cells = (f"{first[Trial(model, *choice, 0, 300)]:.3f}" for model in MODELS)
        table.append(f"| {', '.join(choice)} | " + " | ".join(cells) + " |")
    for name, trials in long.items():
        table.append(f"| {name} | " + " | ".join(f"{second[trial]:.3f}" for trial in trials) + " |")
    (ROOT / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
