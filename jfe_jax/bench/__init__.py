"""The benchmarks of the README, each beside what a user would do instead.

A benchmark is a file of this folder with two functions, and a line here:

  add_arguments(parser)   declares its arguments
  run(args, progress)     measures and gives a `result.Result`; `progress(name, total)` shows what goes on, as
                          `cli.progress.bar`; it prints nothing to standard output
"""

# Name → what it measures. A module has its name's letters, "_" for "-", and is imported when it is asked for.
BENCHMARKS = {
    "convert": "from-hf beside a plain copy of the files: rate and peak memory",
    "search": "exact search beside faiss.IndexFlatIP (pip install faiss-cpu)",
    "stream": "exact search of a pool on disk: seconds and peak memory",
    "evaluate": "an evaluation at M-BEIR's size, killed and taken up again: seconds and peak memory",
    "loss": "contrastive loss and gradients beside PyTorch's and plain jit's",
    "gradcache": "a step in GradCache chunks beside the plain step; memory by batch",
    "train-step": "a training step beside transformers' PaliGemma in PyTorch; share of the matrix rate",
    "embed": "jfe embed beside sentence-transformers on the exported checkpoint; share of the matrix rate",
    "input": "our loader beside torch's DataLoader with PaliGemmaProcessor",
    "data": "check, prepare, a kill, a resume and memory on a generated M-BEIR directory",
    "plan": "stage 2 at 3 B parameters compiled for TPU slices and in other settings (pip install -e .[plan])",
    "startup": "jfe --help; jfe train to its first step with a cold and a warm compilation cache",
    "scaling": "FLOPs, memory and traffic of each of 1 to 8 simulated devices, from the compiled step",
    "packing": "real tokens in each layout, on M-BEIR's training mix",
}
