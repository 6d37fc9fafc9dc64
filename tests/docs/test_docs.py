"""The documentation site builds without warnings, and its generated pages are complete."""

import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

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
