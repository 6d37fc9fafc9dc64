"""The layout of the package: imports between folders follow one order, and data/ does not import jax."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "jfe_jax"
# A folder imports from the lines above its own only, in functions too.
ORDER = (
    ("errors",),
    ("utils",),
    ("config",),
    ("data", "parallel"),
    ("models", "datasets"),
    ("checkpoint", "losses"),
    ("train", "hf"),
    ("embedding", "plan"),
    ("search",),
    ("evaluation", "mining"),
    ("reports",),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
# The base model of a LoRA run may be a Hugging Face directory, which hf/ opens.
KNOWN = {("jfe_jax/checkpoint/model_io.py", "hf")}


def imported_folders(file: Path) -> Iterator[str]:
    """Yields the folder of `jfe_jax` that each import statement of a file refers to."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (module.split(".")[1] for module in modules if module.startswith("jfe_jax."))


def test_imports_between_folders_follow_the_order():
    backward = set()
    for file in sorted(ROOT.rglob("*.py")):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__" or "exported" in file.parts:
            continue
        assert own in LEVEL, f"{own}: give the folder a place in ORDER"
        name = str(file.relative_to(ROOT.parent))
        # `from jfe_jax import __version__` names no folder.
        folders = {folder for folder in imported_folders(file) if folder in LEVEL}
        backward |= {(name, other) for other in folders - {own} if LEVEL[other] >= LEVEL[own]}
    assert backward == KNOWN


def test_the_data_folder_does_not_import_jax():
    for file in sorted((ROOT / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"jax", "flax", "optax", "orbax"}, file


def test_folders_say_what_they_are_for_and_files_stay_small():
    for folder in {file.parent for file in ROOT.rglob("*.py") if "exported" not in file.parts}:
        init = folder / "__init__.py"
        assert init.is_file() and ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), folder
    large = {file.name: lines for file in ROOT.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 400}
    assert not large
