"""Benchmarks, each compared with what a user would pick instead. Run them with `jfe bench NAME` from a checkout.

A benchmark is a module with two functions, and an entry in `BENCHMARKS`:

  add_arguments(parser)   declares its arguments
  run(args, progress)     measures and returns a `common.result.Result`; `progress(name, total)` reports progress like
                          `jfe_jax.utils.progress.bar`; it prints nothing to standard output
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """A benchmark: the module that implements it, imported on demand, and what it measures."""

    module: str
    purpose: str


BENCHMARKS = {
    "convert": Benchmark("benchmarks.convert", "from-hf compared with a plain file copy: rate and peak memory"),
    "search": Benchmark("benchmarks.search", "exact search compared with faiss.IndexFlatIP (pip install faiss-cpu)"),
    "stream": Benchmark("benchmarks.stream", "exact search of a pool on disk: seconds and peak memory"),
    "evaluate": Benchmark("benchmarks.evaluate", "an evaluation at M-BEIR's size, killed and resumed"),
    "loss": Benchmark("benchmarks.loss.loss", "contrastive loss and gradients compared with PyTorch and plain jit"),
    "gradcache": Benchmark("benchmarks.gradcache", "a GradCache step compared with a plain one; memory by batch size"),
    "train-step": Benchmark(
        "benchmarks.train_step.train_step", "a training step compared with transformers' PaliGemma in PyTorch"
    ),
    "embed": Benchmark("benchmarks.embed.embed", "jfe embed compared with sentence-transformers on the same weights"),
    "input": Benchmark("benchmarks.data.input", "the input pipeline compared with torch's DataLoader"),
    "data": Benchmark("benchmarks.data.data", "check, prepare, kill and resume on a generated M-BEIR directory"),
    "plan": Benchmark("benchmarks.plan", "stage 2 at 3 B parameters compiled for TPU slices (needs the plan extra)"),
    "startup": Benchmark("benchmarks.startup", "time to jfe --help and to the first training step, cold and warm"),
    "scaling": Benchmark("benchmarks.scaling", "FLOPs, memory and traffic per device on 1 to 8 simulated devices"),
    "packing": Benchmark("benchmarks.data.packing", "share of real tokens in each layout, on M-BEIR's training mix"),
}
