"""Two real processes on one machine embed their shares into one index, and search it together."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from jfe_jax.retrieval.embed import embed
from jfe_jax.retrieval.items_file import ItemsFile
from jfe_jax.retrieval.search import search
from tests.retrieval.tiny import save, tiny_retriever

SCRIPT = """
import sys
import numpy as np
from jfe_jax.cli.main import main
run, items, out, told = sys.argv[1:]
assert main(["embed", "--checkpoint", run, "--items", items, "--out", out, "--shard", "8", "--distributed"]) == 0
from jfe_jax.retrieval.index import Index
from jfe_jax.retrieval.search import search
rows = Index.open(out).rows
asked = rows.take(np.array([3, 20])).astype(np.float32)
np.savez(told, **search(asked, rows, 30, np.array([[25, 0], [20, -1]]))._asdict())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(tmp_path):
    retriever = tiny_retriever(tmp_path)
    run = save(retriever, tmp_path / "run")
    items = tmp_path / "items.jsonl"
    # Equal texts: ties between the two shares.
    items.write_text("".join(json.dumps({"id": f"t{i}", "text": f"text {i % 25}"}) + "\n" for i in range(40)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    about = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run), str(items), str(tmp_path / "two"), str(tmp_path / f"{i}.npz")],
            env=os.environ | about | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    one = embed(retriever, ItemsFile(items), tmp_path / "one", shard=8).index
    two = np.load(tmp_path / "two" / "embeddings.npy")
    np.testing.assert_allclose(two, one.embeddings, atol=1e-5)
    assert (tmp_path / "two" / "ids.txt").read_bytes() == (tmp_path / "one" / "ids.txt").read_bytes()
    expected = search(two[[3, 20]], two, 30, np.array([[25, 0], [20, -1]]))
    for number in range(2):
        found = np.load(tmp_path / f"{number}.npz")
        for name, value in expected._asdict().items():
            np.testing.assert_array_equal(found[name], value)
