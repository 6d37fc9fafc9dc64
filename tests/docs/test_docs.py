"""The documentation site builds without warnings, and its generated pages are complete."""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jfe_jax import Retriever
from jfe_jax.cli.main import VERBS
from jfe_jax.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*build, str(ROOT / "docs"), str(out / "html")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_config_key_is_documented_with_its_default(site):
    page = (site / "reference" / "config.html").read_text()

    def keys(kind: type, prefix: str = "") -> typing.Iterator[str]:
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                yield from keys(hint, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    missing = [key for key in keys(Config) if f'<span class="pre">{key}</span>' not in page]
    assert not missing
    assert "Maximum global gradient norm; 0 disables clipping." in page


def test_every_verb_is_documented(site):
    page = (site / "reference" / "cli.html").read_text()
    assert not [verb for verb in VERBS if f"<h2>jfe {verb}" not in page]
    assert "jfe convert to-hf" in page and "--max-shard-size" in page


def test_commands_and_files_that_the_documentation_names_exist():
    """Checks every path of the repository, and every `jfe` verb, in the pages and in the README."""
    missing = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for path in re.findall(r"(?<![\w/.])(?:tests|launch|configs|benchmarks|jfe_jax)/[\w/.*-]*[\w/]", text):
            # Links between pages have no suffix in a table of contents.
            linked = [page.parent / path, page.parent / f"{path}.md"]
            if not list(ROOT.glob(path)) and not any(file.exists() for file in linked):
                missing.append(f"{page.name}: {path}")
        verbs = re.findall(r"(?:^|`|-- )jfe ([a-z]+)", text, re.M)
        missing += [f"{page.name}: jfe {verb}" for verb in verbs if verb not in VERBS]
    assert not missing


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", ["README.md", "docs/results/emoji.md", "docs/mining.md"])
def test_quality_figures_are_those_of_the_generated_tables(page):
    """Every row with a deviation is a row of a table that `jfe compare` wrote."""
    generated = {row for file in (ROOT / "docs" / "emoji").glob("*.md") for row in file.read_text().splitlines()}
    rows = [row for row in (ROOT / page).read_text().splitlines() if row.startswith("|") and "±" in row]
    assert rows and not [row for row in rows if row not in generated]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_examples_run(page, shapes_retriever, tmp_path, monkeypatch):
    """Executes the page's example with a small model, and with an image for each file that it names."""
    example = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"(\w+\.png)"', example):
        Image.new("RGB", (20, 30), "red").save(name)
    monkeypatch.setattr(Retriever, "load", lambda path: shapes_retriever)
    names: dict[str, Any] = {}
    exec(example, names)
    vectors = names["vectors"] if "vectors" in names else names["scores"]
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert "best" not in names or names["best"] in names["pool"]
