"""Prose of the package: docstrings begin with what a thing does, and comments do without words of a private dialect."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A summary is a sentence in the imperative or third person, no noun clause.
CLAUSE = re.compile(r"(What|How|Whether|Where|Which|Who|That)\b")
DIALECT = re.compile(
    r"\b(so many|anew|by turns|made again|of one's own|goes on|go on|stands? (beside|on|for itself)"
    r"|lies? (beside|whole)|(is|are|was|were) told|beneath|learnt|fillers?|licence|colours?|initialise|normalise[ds]?"
    r"|centre)\b"
)
FILES = sorted(path for folder in ("jfe_jax", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
# Not reworded yet.
UNFINISHED = (
    "jfe_jax/data/pipeline",
    "jfe_jax/embedding",
    "jfe_jax/evaluation",
    "jfe_jax/hf",
    "jfe_jax/mining",
    "jfe_jax/models",
    "jfe_jax/parallel",
    "jfe_jax/reports",
    "jfe_jax/search",
    "jfe_jax/train",
    "jfe_jax/utils",
)
FILES = [path for path in FILES if not str(path.relative_to(ROOT)).startswith(UNFINISHED)]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and text of every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of every comment of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_prose_of_a_file_is_plain(path):
    source = path.read_text(encoding="utf-8")
    texts = list(docstrings(ast.parse(source)))
    clauses = [f"{path}:{line}: {text.splitlines()[0]}" for line, text in texts if CLAUSE.match(text)]
    assert not clauses, "begin with a verb: what the thing does"
    found = [
        f"{path}:{line}: {match[0]}" for line, text in [*texts, *comments(source)] if (match := DIALECT.search(text))
    ]
    assert not found
