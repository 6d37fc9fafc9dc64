"""The three kinds of directory that `jfe eval` asks from, told apart by what is in them."""

from collections.abc import Sequence
from pathlib import Path

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.formats.mmeb import find_task_files
from jfe_jax.errors import UserError
from jfe_jax.evaluation.eval_set import EvalSet, read_mbeir
from jfe_jax.evaluation.load_jsonl import QUERIES, read_jsonl
from jfe_jax.evaluation.load_mmeb import read_mmeb


def read_questions(
    path: Path,
    *,
    split: str | None = None,
    pools: Sequence[str] = (),
    units: Sequence[str] = (),
    instruction: int | str | None = 0,
) -> EvalSet:
    """Reads an M-BEIR directory, one of MMEB's, or three files of one's own.

    Args:
      split, pools: of M-BEIR; "test", and both, if not given.
      units: units or tasks by name; all if none is named.
      instruction: of M-BEIR as in protocol.read_queries; of one's own files None leaves their instructions out.

    Raises:
      UserError: it is no such directory, a file is wrong, or an option does not belong to the kind.
    """
    if (path / "query").is_dir():
        return read_mbeir(Mbeir(path), split or "test", pools or ("local", "global"), units, instruction)
    own = (path / QUERIES).is_file()
    if not own and not find_task_files(path):
        raise UserError(
            f"{path}: no M-BEIR directory (it has no query/), none of MMEB's (test*.parquet or test*.jsonl in "
            f"a folder for each task), and no {QUERIES} with candidates.jsonl and qrels.txt"
        )
    for name, value in (("--split", split), ("--pool", pools), ("--units", own and units)):
        if value:
            raise UserError(f"{name} is for M-BEIR{'' if name != '--units' else ' and MMEB'}; {path} has one of them")
    if instruction not in (0, None, "own"):
        raise UserError(f"--instruction {instruction}: only M-BEIR has prompts to choose from; 0 or none")
    if instruction is None and not own:
        raise UserError("--instruction none: MMEB's instructions are part of its queries' texts")
    return read_jsonl(path, instructed=instruction is not None) if own else read_mmeb(path, units)
