"""Runs one side of `jfe bench embed` in its own process: items of a file → vectors on disk.

`python -m benchmarks.embed.backend '{"side": "jfe", "model": DIRECTORY, "device": "cpu"}'` executes the requests on its
standard input: one JSON object per line, with the keys `items`, `out` and `batch`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import matmul_rate
from benchmarks.common.subprocess_server import Served, serve
from jfe_jax.utils import malloc

MODULE = "benchmarks.embed.backend"
# Key of a line that asks for a side's product of matrices, in a dtype.
RATE = "rate"


class Apart(Served):
    """A side, opened once.

    Args:
      side: "jfe" or "sentence-transformers".
      model: what `jfe convert to-hf --layout sentence-transformers` writes.
      device: "cpu" or "gpu".
    """

    def __init__(self, side: str, model: Path, device: str):
        env = {}
        if device == "gpu":
            # Both are on the card: ours takes what it needs, not three quarters of it; PyTorch's has no JAX there.
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if side == "jfe" else {"JAX_PLATFORMS": "cpu"}
        super().__init__(side, MODULE, {"side": side, "model": str(model), "device": device}, **env)

    def __call__(self, items: Path, out: Path, batch: int = 0) -> np.ndarray:
        """Embeds the items of a file → float32 [B, E], as it wrote them to `out`.

        Args:
          out: directory of an index, for ours; else a file of NumPy's.
          batch: items, for sentence-transformers.
        """
        self.ask(json.dumps({"items": str(items), "out": str(out), "batch": batch}))
        return np.load(out / "embeddings.npy" if out.is_dir() else out)

    def rate(self, dtype: str, out: Path) -> tuple[float, str]:
        """FLOP/s of this side's own product of two matrices, see `rates`, and the name of what multiplied."""
        self.ask(json.dumps({RATE: dtype, "out": str(out)}))
        rate, name = json.loads(out.read_text())
        return rate, name


class Ours:
    """`jfe embed`, the model opened once."""

    def __init__(self, model: str, device: str):
        from jfe_jax.embedding.retriever import Retriever

        self.retriever = Retriever.load(model)

    def device(self) -> str:
        """Returns the name of the hardware that computes."""
        return self.retriever.mesh.devices.flat[0].device_kind

    def embed(self, items: Path, out: Path, batch: int) -> None:
        """Writes the index `out`."""
        from jfe_jax.embedding.embed import embed
        from jfe_jax.embedding.items_jsonl import ItemsFile

        embed(self.retriever, ItemsFile(items), out)


class Theirs:
    """sentence-transformers, the model opened once."""

    def __init__(self, model: str, device: str):
        import torch
        from sentence_transformers import SentenceTransformer

        if device == "cpu":
            torch.set_num_threads(matmul_rate.threads())
        kind = "cuda" if device == "gpu" else "cpu"
        # transformers' attention is PyTorch's fused one.
        self.model = SentenceTransformer(model, trust_remote_code=True, device=kind)

    def device(self) -> str:
        """Returns the name of the hardware that computes."""
        return str(self.model.device)

    def embed(self, items: Path, out: Path, batch: int) -> None:
        """Writes the vectors as `out`.

        One of its calls takes one kind of item: there are three, each sorted by length as it does, and the rows are put
        in the file's order.
        """
        kinds: dict[tuple[bool, bool], list[tuple[int, Any]]] = {}
        lines = items.read_text(encoding="utf-8").splitlines()
        for place, record in enumerate(map(json.loads, lines)):
            # An instruction goes before the text, as a prompt would.
            text = " ".join(part for part in (record["instruction"], record["text"]) if part)
            image = record["image"] and str(items.parent / record["image"])
            given = {"text": text, "image": image} if text and image else text or image
            kinds.setdefault((bool(text), bool(image)), []).append((place, given))
        vectors = np.zeros((len(lines), self.model.get_embedding_dimension()), np.float32)
        for own in kinds.values():
            places, given = zip(*own, strict=True)
            vectors[list(places)] = self.model.encode(list(given), batch_size=batch, show_progress_bar=False)
        np.save(out, vectors)


def _main(side: str, model: str, device: str) -> None:
    if side == "jfe":
        malloc.keep_freed_memory()
    own = (Ours if side == "jfe" else Theirs)(model, device)

    def work(line: str) -> None:
        told = json.loads(line)
        if RATE in told:
            rate = (matmul_rate.by_jax if side == "jfe" else matmul_rate.by_torch)(told[RATE])
            Path(told["out"]).write_text(json.dumps([rate, own.device()]))
        else:
            own.embed(Path(told["items"]), Path(told["out"]), told["batch"])

    serve(work)


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
