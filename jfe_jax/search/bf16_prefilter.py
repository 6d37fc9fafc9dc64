"""A first pass in bfloat16: how far its scores are from the exact ones, and whether the CPU gains by it.

Those that it cannot tell from the k best are kept and scored exactly, so that it changes no result.

Axes: Q queries, E embedding.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# With fewer, reading the candidates takes longer than multiplying them.
FEWEST = 256
# Kept for each of the k: the scores of unit vectors in a pool of a million lie so dense that it takes two.
SPREAD = 4
# The switch has to pay for the candidates that are scored exactly in addition.
_GAIN = 1.3
# YNNPACK has the instructions for bfloat16; the command line turns it off for everything else, where it is slower.
_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


class Bf16Queries:
    """Queries in bfloat16.

    Args:
      queries: float [Q, E].
      norm: no candidate is longer.

    Attributes:
      rounded: bfloat16 [Q, E].
    """

    def __init__(self, queries: np.ndarray, norm: float):
        self.rounded = queries.astype(jnp.bfloat16)
        exact, rounded = queries.astype(np.float64), self.rounded.astype(np.float64)
        self._length = np.linalg.norm(rounded, axis=1)
        width = queries.shape[1]
        # q·c - q'·c' = (q - q')·c + q'·(c - c'), and a float32 sum of E terms, in any order and cut off or rounded, is
        # off by E·2⁻²³·|q'||c'| at most, and what the processor takes for 0 by the smallest number for each.
        self._fixed = np.linalg.norm(exact - rounded, axis=1) * norm + self._length * norm * width * 2.0**-22
        self._fixed += width * float(np.finfo(np.float32).tiny)

    def tolerance(self, rounding: float) -> np.ndarray:
        """float64 [Q]: how far scores are off if no candidate was changed by more than a length of `rounding`."""
        return self._fixed + self._length * rounding


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """How XLA is to compile products of bfloat16 on the CPU; None where it knows no such option."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=_YNNPACK)(jax.device_put(0, _cpu()))
    except (ValueError, RuntimeError):
        return None
    return _YNNPACK


@functools.cache
def is_faster() -> bool:
    """Whether XLA multiplies bfloat16 on this CPU faster than float32; measured in some milliseconds.

    It needs instructions (AVX512-BF16, AMX) that not every CPU has, and code that not every XLA has.
    """
    product, runs = functools.partial(jnp.einsum, "ce,qe->cq", preferred_element_type=jnp.float32), []
    for dtype, options in ((jnp.float32, None), (jnp.bfloat16, compiler_options())):
        placed = [jax.device_put(np.ones((rows, 1024), dtype), _cpu()) for rows in (2048, 512)]
        runs.append(functools.partial(jax.jit(product, compiler_options=options), *placed))
    # By turns, and the best of each: what else runs here counts for neither.
    took = [[_seconds(run) for run in runs] for _ in range(6)][1:]
    single, half = (min(each) for each in zip(*took, strict=True))
    return half * _GAIN < single


def _cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def _seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - start
