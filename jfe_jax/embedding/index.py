"""An index: embeddings on disk with what is needed to use them safely.

embeddings.npy    [B, E], float32, float16 or int8: unit rows in the order of the items
scales.npy        float32 [B], for int8 only: what each row is to be multiplied by
ids.txt           B names, one a line
manifest.json     which checkpoint made it of what, and the checksums
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.embedding.retriever import Retriever
from jfe_jax.embedding.row_source import FileRows
from jfe_jax.embedding.shard_store import EMBEDDINGS, SCALES, Shard, ShardStore, write_json
from jfe_jax.embedding.string_table import StringTable
from jfe_jax.errors import UserError

MANIFEST, IDS = "manifest.json", "ids.txt"


@dataclass(frozen=True)
class Manifest:
    """What an index says of itself.

    Attributes:
      items, width, dtype, shard: B, E, the stored type, and rows of a shard.
      checkpoint, step, fingerprint: which model made it.
      source, source_digest: what the items were read from.
      ids_digest: of ids.txt.
      norm: the length of the longest row.
      score_error: no score with a query of length 1 is further from that of the unrounded row.
      shards: for checking the rows.
    """

    items: int
    width: int
    dtype: str
    shard: int
    checkpoint: str
    step: int
    fingerprint: str
    source: str
    source_digest: str
    ids_digest: str
    norm: float
    score_error: float
    shards: list[Shard]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises OSError, ValueError, KeyError or TypeError if there is none, or none of ours."""
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls(**told | {"shards": [Shard(*shard) for shard in told["shards"]]})

    @property
    def cut_texts(self) -> int:
        """Texts that were longer than tokens.max_text_tokens, and were cut."""
        return sum(shard.cut for shard in self.shards)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, dataclasses.asdict(self))


@dataclass(frozen=True)
class Index:
    """An embedded pool, opened.

    Attributes:
      ids: B names.
      rows: its embeddings, for `search`.
    """

    path: Path
    manifest: Manifest
    ids: StringTable
    rows: FileRows

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Raises UserError if `path` is no index or its parts do not belong together."""
        path = Path(path)
        try:
            manifest = Manifest.read(path)
            names = (path / IDS).read_bytes()
            scales = np.load(path / SCALES) if manifest.dtype == "int8" else None
            rows = FileRows(path / EMBEDDINGS, scales, manifest.norm)
            ids = StringTable(names)
            wanted = (manifest.items, manifest.width)
            if (
                rows.shape != wanted
                or rows.dtype != manifest.dtype
                or (scales is not None and len(scales) != wanted[0])
            ):
                raise ValueError(f"{EMBEDDINGS} is {rows.dtype} {list(rows.shape)}, the manifest says otherwise")
            if len(ids) != manifest.items or hashlib.sha256(names).hexdigest() != manifest.ids_digest:
                raise ValueError(f"{IDS} is not the one that was written with it")
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(f"{path}: no index, or a broken one ({error}); make it with `jfe embed`") from error
        return cls(path, manifest, ids, rows)

    @property
    def embeddings(self) -> np.ndarray:
        """float32, float16 or int8 [B, E] as stored, a memory map."""
        return np.load(self.path / EMBEDDINGS, mmap_mode="r")

    def require_made_by(self, retriever: Retriever) -> None:
        """Raises UserError if another model made the index: its vectors would mean nothing to this one."""
        made_by = self.manifest
        if retriever.fingerprint != made_by.fingerprint:
            raise UserError(
                f"{self.path}: made by {made_by.checkpoint} step {made_by.step} ({made_by.fingerprint}), not by "
                f"{retriever.path} step {retriever.step} ({retriever.fingerprint}); embed it again, or give its maker "
                "as --checkpoint"
            )

    def require_undamaged(self) -> None:
        """Reads all rows. Raises UserError if they are not as they were written."""
        told = self.manifest
        store = ShardStore(self.path, {name: getattr(told, name) for name in ("items", "width", "dtype", "shard")})
        bad = store.damaged(told.shards)
        if bad:
            raise UserError(
                f"{self.path}: {len(bad)} of {len(told.shards)} shards are damaged, the first is rows {bad[0].start} "
                f"to {bad[0].stop - 1}; embed it again with --overwrite"
            )
