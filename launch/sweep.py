"""The sweep behind configs/emoji: learning rate and pooling for each model, by the validation loss of fold 0.

    python launch/sweep.py      about half an hour on 2 cores

Every model has the same settings to choose from, and stage 2 from random weights, 300 steps, to choose by. Test queries
have no part in it. Finished runs are kept; the table is printed and written to runs/emoji-sweep/table.md.
"""

import itertools
import json
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emoji import jfe, prepare, prepared

MODELS = ("jfe", "score", "feature")
RATES = ("1.5e-3", "3e-3", "6e-3")
POOLINGS = ("last", "mean")
STEPS = 300
ROOT = Path("runs/emoji-sweep")


def validation_loss(model: str, rate: str, pooling: str, raw: Path, cores: "queue.Queue[int]") -> float:
    out = ROOT / f"{model}-{rate}-{pooling}"
    core = cores.get()
    try:
        jfe(
            out.name,
            *("train", "--config", f"configs/emoji/{model}_stage2.yaml", "--init=", f"--output={out}"),
            *(f"--data.path={prepared(raw)}", f"--tokens.tokenizer={raw / 'tokenizer'}"),
            *(f"--optimizer.learning_rate={rate}", f"--model.pooling={pooling}", f"--optimizer.steps={STEPS}"),
            *("--data.val_split=val", f"--val_every_steps={STEPS}", "--val_steps=8"),
            core=core,
        )
    finally:
        cores.put(core)
    lines = map(json.loads, (out / "logs" / "metrics.jsonl").read_text().splitlines())
    return next(line["val_loss"] for line in lines if "val_loss" in line)


def main() -> None:
    raw = prepare(0)
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    choices = list(itertools.product(RATES, POOLINGS))
    with ThreadPoolExecutor(cores.qsize()) as pool:
        jobs = {(m, *c): pool.submit(validation_loss, m, *c, raw, cores) for c in choices for m in MODELS}
        losses = {key: job.result() for key, job in jobs.items()}
    table = ["| learning rate, pooling | " + " | ".join(MODELS) + " |", "|---|" + "---:|" * len(MODELS)]
    for choice in choices:
        table.append(f"| {', '.join(choice)} | " + " | ".join(f"{losses[m, *choice]:.3f}" for m in MODELS) + " |")
    (ROOT / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
