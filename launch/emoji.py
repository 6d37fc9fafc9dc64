"""The emoji benchmark from nothing to a report: data, both stages of every model, evaluation, comparison.

    python launch/emoji.py demo      one seed, JFE and one late-fusion baseline, about ten minutes on 2 cores
    python launch/emoji.py full      three seeds of JFE and both late-fusion baselines

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

PRESETS = {"demo": (("jfe", "feature"), (0,), ""), "full": (("jfe", "score", "feature"), (0, 1, 2), "full_")}
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


def run(data: Future[Path], model: str, seed: int, prefix: str, root: Path, cores: "queue.Queue[int]") -> None:
    """Stage 1, stage 2 and the evaluation of one model and seed, on one core."""
    raw, out = data.result(), root / f"{model}-{seed}"
    core = cores.get()
    try:
        for stage in ("stage1", "stage2"):
            jfe(
                f"{model} {seed} {stage}",
                *("train", "--config", f"configs/emoji/{prefix}{model}_{stage}.yaml"),
                f"--output={out / stage}",
                f"--seed={seed}",
                f"--data.path={prepared(raw)}",
                f"--tokens.tokenizer={raw / 'tokenizer'}",
                *([f"--init={out / 'stage1'}"] if stage == "stage2" else []),
                core=core,
            )
        splits = ("test", "combo") if prefix else ("test",)
        for split in splits:
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
    parser.add_argument("--out", type=Path, default=None, help="default runs/emoji-PRESET")
    args = parser.parse_args()
    models, seeds, prefix = PRESETS[args.preset]
    seeds = args.seeds or seeds
    root = args.out or Path("runs") / f"emoji-{args.preset}"
    start = time.monotonic()

    cores = free_cores()
    with ThreadPoolExecutor(cores.qsize()) as pool:
        # Seed by seed, so that an interrupted benchmark has whole seeds to compare.
        jobs: list[Future] = []
        for seed in seeds:
            data = pool.submit(prepare, seed)
            jobs += [data, *(pool.submit(run, data, model, seed, prefix, root, cores) for model in models)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    for split in ("test", "combo") if prefix else ("test",):
        named = [f"{m}=" + ",".join(str(root / f"{m}-{s}" / f"eval-{split}") for s in seeds) for m in models]
        jfe("compare", "compare", "--out", root / f"report-{split}", *named)
    if args.preset == "demo" and not (root / "jfe-hf").exists():
        jfe("convert", "convert", "to-hf", root / "jfe-0" / "stage2", root / "jfe-hf")
    say("done", f"in {(time.monotonic() - start) / 60:.1f} min; open {root / 'report-test' / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
