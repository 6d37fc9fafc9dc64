"""What every test runs under, before jax is imported: 8 fake CPU devices, no network, caches of its own.

`JFE_TEST_DEVICE=gpu python -m pytest -m gpu` runs the tests that need a GPU on one.
"""

import atexit
import os
import shutil
import tempfile

_cache = tempfile.mkdtemp(prefix="jfe_jax_tests_")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

if os.environ.get("JFE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Tests compile much and compute little.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            # As the command line has it: without, a run here and one of a process that a test starts round differently.
            "--xla_cpu_experimental_ynn_fusion_type=",
        ]
    ).strip()
# What one test, or a process that it starts, has compiled, the next finds.
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_cache}/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["XDG_CACHE_HOME"] = _cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"


pytest_plugins = ["tests.support.retrieval_fixtures"]
