"""Measures this machine's matrix multiplication rate, against which a model's FLOPs are compared."""

import os
import time
from collections.abc import Callable

# Products as large as a caller may wish for: a quarter of a second on a CPU of two cores, two milliseconds on a GPU.
CPU_SIDE, ACCELERATOR_SIDE = 2560, 8192


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def by_jax(dtype: str, rounds: int = 5) -> float:
    """FLOP/s of XLA's product of two square matrices of `dtype` on the first device: the best of `rounds`."""
    import jax
    import jax.numpy as jnp

    host = jax.devices()[0].platform == "cpu"
    side = CPU_SIDE if host else ACCELERATOR_SIDE
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    product = jax.jit(lambda left, right: left @ right)
    return _best(side, lambda: product(x, x), jax.block_until_ready, rounds, 1 if host else 20)


def by_torch(dtype: str, rounds: int = 5) -> float:
    """The same of PyTorch's, on the GPU if it sees one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = CPU_SIDE if device == "cpu" else ACCELERATOR_SIDE
    x = torch.randn(side, side, dtype=getattr(torch, dtype), device=device)
    # Reading one number waits for it.
    return _best(side, lambda: torch.mm(x, x), lambda y: y[0, 0].item(), rounds, 1 if device == "cpu" else 20)


def _best(side: int, product: Callable[[], object], wait: Callable[[object], object], rounds: int, times: int) -> float:
    wait(product())
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            last = product()
        wait(last)
        best = min(best, (time.perf_counter() - start) / times)
    return 2.0 * side**3 / best
