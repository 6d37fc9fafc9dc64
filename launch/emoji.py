"""The emoji benchmark from nothing to a report: data, both stages of every model, evaluation, comparison.

    python launch/emoji.py demo      one seed, JFE and one late-fusion baseline, about ten minutes on 2 cores
    python launch/emoji.py full      three seeds of JFE and both late-fusion baselines
    python launch/emoji.py mining    JFE's stage 2 once more, with negatives that JFE mined and with the file's own

Seed s holds out fold s of the base emoji, so that three seeds test three disjoint sets of bases. Every part is a
`jfe` command, printed as it starts; what is finished is not done again and what was interrupted goes on. One run has
one core: two single-threaded runs side by side do more steps a second than one after the other on both cores.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class Preset(NamedTuple):
    """What is trained and compared.

    Attributes:
      models: each against the others.
      seeds: of each model.
      prefix: of its configs' names.
      root: of its runs.
      splits: what each is evaluated on.
      report: the name of the reports' directories.
    """

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    prefix: str
    root: Path
    splits: tuple[str, ...]
    report: str = "report"


FULL = Path("runs/emoji-full")
PRESETS = {
    "demo": Preset(("jfe", "feature"), (0,), "", Path("runs/emoji-demo"), ("test",)),
    "full": Preset(("jfe", "score", "feature"), (0, 1, 2), "full_", FULL, ("test", "combo")),
    "mining": Preset(("mined", "own", "jfe"), (0, 1, 2), "full_", FULL, ("test", "combo"), "report-mining"),
}
# Stage 2 with hard negatives, from JFE's stage 1 and with its settings otherwise.
WITH_NEGATIVES = ("mined", "own")
DATA = Path("data/emoji")

printing = threading.Lock()


def say(label: str, line: str) -> None:
    with printing:
        print(f"[{label}] {line}", flush=True)


def jfe(label: str, *words: object, core: int | None = None) -> None:
    """Runs one `jfe` command, its lines prefixed with the label; a failure ends the whole program."""
    command = ["jfe", *map(str, words)]
    say(label, "$ " + " ".join(command))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    for line in process.stdout:
        say(label, line.rstrip())
    if process.wait() != 0:
        raise SystemExit(f"[{label}] failed with exit status {process.returncode}: {' '.join(command)}")


def free_cores() -> "queue.Queue[int]":
    """The cores this program may use: a run takes one and puts it back."""
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    return cores


def prepare(seed: int) -> Path:
    """The M-BEIR directory of a fold and its shards; returns the directory."""
    raw = DATA / f"fold{seed}"
    if not (raw / "LICENSES.md").exists():
        jfe(f"data {seed}", "data", "emoji", "--out", raw, "--fold", seed)
    jfe(f"data {seed}", "data", "prepare", raw, "--out", prepared(raw))
    return raw


def prepared(raw: Path) -> Path:
    return raw.with_name(raw.name + "-prepared")


def mine(checkpoint: Path, raw: Path, seed: int, core: int) -> Path:
    """The fold with the negatives that a checkpoint mined in it, and its shards; returns the directory."""
    mined = raw.with_name(raw.name + "-mined")
    if not prepared(mined).exists():
        words = ("mine", "--checkpoint", checkpoint, "--data", raw, "--out", mined, "--negatives", 8, "--ranks", "1:50")
        jfe(f"mine {seed}", *words, core=core)
    jfe(f"data {seed}", "data", "prepare", mined, "--out", prepared(mined), core=core)
    return mined


def train(model: str, stage: str, seed: int, preset: Preset, data: Path, tokenizer: Path, core: int) -> None:
    """One stage of a model; the second starts from the first, with hard negatives from JFE's."""
    began = f"jfe-{seed}" if model in WITH_NEGATIVES else f"{model}-{seed}"
    name = "negatives" if model in WITH_NEGATIVES else model
    jfe(
        f"{model} {seed} {stage}",
        *("train", "--config", f"configs/emoji/{preset.prefix}{name}_{stage}.yaml"),
        f"--output={preset.root / f'{model}-{seed}' / stage}",
        f"--seed={seed}",
        f"--data.path={prepared(data)}",
        f"--tokens.tokenizer={tokenizer}",
        *([f"--init={preset.root / began / 'stage1'}"] if stage == "stage2" else []),
        core=core,
    )


def run(data: Future[Path], before: Future | None, model: str, seed: int, preset: Preset, cores: "queue.Queue[int]"):
    """The stages and the evaluation of one model and seed, on one core; `before` is what it starts from."""
    raw, out = data.result(), preset.root / f"{model}-{seed}"
    if before is not None:
        before.result()
    core = cores.get()
    try:
        source = mine(preset.root / f"jfe-{seed}" / "stage2", raw, seed, core) if model == "mined" else raw
        for stage in ("stage2",) if model in WITH_NEGATIVES else ("stage1", "stage2"):
            train(model, stage, seed, preset, source, raw / "tokenizer", core)
        for split in preset.splits:
            if not (out / f"eval-{split}" / "results.json").exists():
                jfe(
                    f"{model} {seed} eval",
                    *("eval", "--checkpoint", out / "stage2", "--data", raw, "--split", split),
                    *("--pool", "local,global", "--controls", "--out", out / f"eval-{split}"),
                    core=core,
                )
    finally:
        cores.put(core)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", help="only these; each is also the fold that is held out")
    parser.add_argument(
        "--out", type=Path, default=None, help="of the runs; default runs/emoji-demo or runs/emoji-full"
    )
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = preset._replace(seeds=tuple(args.seeds or preset.seeds), root=args.out or preset.root)
    start = time.monotonic()

    cores = free_cores()
    with ThreadPoolExecutor(cores.qsize()) as pool:
        # Seed by seed, so that an interrupted benchmark has whole seeds to compare. What waits for another is
        # submitted after it.
        jobs: list[Future] = []
        for seed in preset.seeds:
            data = pool.submit(prepare, seed)
            jobs.append(data)
            first = None
            for model in sorted(preset.models, key=WITH_NEGATIVES.__contains__):
                before = first if model in WITH_NEGATIVES else None
                jobs.append(pool.submit(run, data, before, model, seed, preset, cores))
                first = first or jobs[-1]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    reports = {split: preset.root / f"{preset.report}-{split}" for split in preset.splits}
    for split, report in reports.items():
        runs = {
            m: ",".join(str(preset.root / f"{m}-{s}" / f"eval-{split}") for s in preset.seeds) for m in preset.models
        }
        jfe("compare", "compare", "--out", report, *(f"{model}={evaluations}" for model, evaluations in runs.items()))
    if args.preset == "demo" and not (preset.root / "jfe-hf").exists():
        jfe("convert", "convert", "to-hf", preset.root / "jfe-0" / "stage2", preset.root / "jfe-hf")
    say("done", f"in {(time.monotonic() - start) / 60:.1f} min; open {reports['test'] / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
