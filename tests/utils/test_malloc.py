"""A step's memory is taken from the system once, not at every call."""

import os
import subprocess
import sys

import pytest

from jfe_jax.utils import malloc

# Page faults of a call, in pages of what it takes: 32 MiB in one piece, which glibc gives back by itself. The heap
# finds its size within a few calls.
CODE = """
import resource, sys
from jfe_jax.utils.malloc import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp
x = jnp.ones((2048, 2048))
program = jax.jit(lambda x: jnp.sum(jax.lax.fori_loop(0, 2, lambda _, y: jnp.sin(y @ y), x)) + jnp.sum(x @ x.T))
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
least = min(faults() for _ in range(8))
taken = program.lower(x).compile().memory_analysis().temp_size_in_bytes / resource.getpagesize()
print(int(kept), least / taken)
"""


@pytest.mark.parametrize(("changed", "kept"), [({}, True), ({"MALLOC_TOP_PAD_": "65536"}, False)])
def test_memory_of_a_call_is_there_for_the_next(changed, kept):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    env |= {"JAX_PLATFORMS": "cpu"} | changed
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=True)
    told, share = done.stdout.split()
    assert bool(int(told)) == kept
    assert float(share) < 0.05 if kept else float(share) > 0.5


@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("tpu,cpu", False), ("cuda", False)])
def test_accelerators_are_left_alone(platforms, kept, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    called = []

    class Library:
        def mallopt(self, name, value):
            called.append(name)
            return 1

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Library())
    assert malloc.keep_freed_memory() == kept == bool(called)
