"""Report of `jfe data check`: counts and defects, as text and as JSON."""

import collections
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

# The kinds of a defect, as `--json` names them.
DefectKind = Literal[
    "malformed",
    "duplicate_id",
    "unknown_modality",
    "modality_contradicts",
    "leaves_directory",
    "missing_image",
    "unreadable_image",
    "huge_image",
    "dangling_candidate",
    "missing_instructions",
    "no_positive",
    "unknown_query",
]
Severity = Literal["error", "warning"]
# Maximum number of defects listed per kind and file; all are counted. A directory whose images are still missing has
# a defect in every row.
MAX_LISTED_DEFECTS = 1000


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect. `line` is 0 if it concerns the entire file."""

    severity: Severity
    kind: DefectKind
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


@dataclass
class ValidationReport:
    """Counts and defects of an M-BEIR directory.

    Attributes:
      counts: rows by (query or candidate, split or pool, dataset, task or -1, modality).
      defects: in the order they were found, at most MAX_LISTED_DEFECTS per kind and file.
      totals: (severity, kind, file) → number of defects, including those not in `defects`.
      dangling: (file, list) → number of ids that are in no pool.
      images: summary of the image checks, for people.
      images_opened: number of images decoded.
    """

    path: str
    counts: collections.Counter[tuple[str, str, str, int, str]] = field(default_factory=collections.Counter)
    defects: list[Defect] = field(default_factory=list)
    totals: collections.Counter[tuple[Severity, DefectKind, str]] = field(default_factory=collections.Counter)
    dangling: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    images: str = ""
    images_opened: int = 0

    def add(self, severity: Severity, kind: DefectKind, file: Any, line: int, message: str) -> None:
        key = severity, kind, str(file)
        self.totals[key] += 1
        if self.totals[key] <= MAX_LISTED_DEFECTS:
            self.defects.append(Defect(*key, line, message))

    @property
    def errors(self) -> int:
        return sum(count for (severity, _, _), count in self.totals.items() if severity == "error")

    @property
    def warnings(self) -> int:
        return self.totals.total() - self.errors

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as a JSON-compatible dict."""
        names = ("rows", "where", "dataset", "task", "modality")
        return {
            "path": self.path,
            "errors": self.errors,
            "warnings": self.warnings,
            "images": self.images,
            "images_opened": self.images_opened,
            "counts": [dict(zip(names, key, strict=True)) | {"count": n} for key, n in sorted(self.counts.items())],
            "dangling": [{"file": file, "list": name, "ids": n} for (file, name), n in sorted(self.dangling.items())],
            "totals": [
                {"severity": severity, "kind": kind, "file": file, "count": n}
                for (severity, kind, file), n in sorted(self.totals.items())
            ],
            "defects": [dataclasses.asdict(defect) for defect in self.defects],
        }

    def as_text(self) -> str:
        """Formats a table of the counts, then a line for each defect."""
        lines = [f"{'rows':10} {'where':14} {'dataset':24} {'task':>4} {'modality':12} {'count':>9}"]
        for (rows, where, dataset, task, modality), count in sorted(self.counts.items()):
            task_column = str(task) if task >= 0 else "-"
            lines.append(f"{rows:10} {where:14} {dataset:24} {task_column:>4} {modality:12} {count:9d}")
        lines += [f"{defect.severity}: {defect}" for defect in self.defects]
        for (severity, kind, file), count in sorted(self.totals.items()):
            if count > MAX_LISTED_DEFECTS:
                lines.append(f"{severity}: {file}: {count - MAX_LISTED_DEFECTS} more of {kind}")
        lines.append(f"{self.path}: {self.errors} errors, {self.warnings} warnings; {self.images}")
        return "\n".join(lines)
