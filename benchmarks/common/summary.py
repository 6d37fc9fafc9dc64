"""The short table of speed in the README: figures of the most important stored results.

Of the settings that a result has for the same baseline, the fastest one counts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.common.result import Result

NAME = "summary"


class Figure(NamedTuple):
    """A cell of a stored result: the row that begins with `row`, in the column `column` of table number `table`."""

    task: str
    baseline: str
    result: str
    row: Sequence[str | int]
    column: str
    table: int = 0


FIGURES = (
    Figure("training step, 3 B, M-BEIR's mix", "transformers (PyTorch)", "train-step-gpu", ["mix"], "ratio"),
    Figure("training step, 30 M, M-BEIR's mix", "transformers (PyTorch)", "train-step-kept", ["mix"], "ratio"),
    Figure("embedding, 3 B", "sentence-transformers", "embed-gpu", ["the same, of 32 (its default)"], "jfe / this"),
    Figure("embedding, 30 M", "sentence-transformers", "embed", ["sentence-transformers, batches of 4"], "jfe / this"),
    Figure("loss and gradients, 8,192 pairs", "PyTorch", "loss", ["8,192", "PyTorch"], "/ ours"),
    Figure("exact search, 64 queries", "faiss `IndexFlatIP`", "search", ["1,000,000 x 256", 64], "faiss / jfe"),
    Figure("exact search, 1,024 queries", "faiss `IndexFlatIP`", "search", ["1,000,000 x 256", 1024], "faiss / jfe"),
    Figure("input pipeline, 2 workers", "torch `DataLoader`", "input", ["jfe, 2 workers"], "/ torch"),
)


def as_markdown(result: Callable[[str], Result], shown: Callable) -> str:
    """Renders the table; `shown` formats a cell as its column does."""
    lines = ["| task | compared with | on | times as fast |", "|---|---|---|---:|"]
    for figure in FIGURES:
        stored = result(figure.result)
        table = stored.tables[figure.table]
        names = [column.name for column in table.columns]
        place = names.index(figure.column)
        row = next(row for row in table.rows if row[: len(figure.row)] == list(figure.row))
        machine = stored.device or stored.machine.partition(",")[0]
        lines.append(f"| {figure.task} | {figure.baseline} | {machine} | {shown(row[place], table.columns[place])} |")
    return "\n".join(lines) + "\n"
