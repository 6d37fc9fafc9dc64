"""mteb's own evaluator, asked an exported checkpoint, finds the figures that `jfe eval` finds."""

import pytest

from jfe_jax.cli.main import main
from tests.support.tiny_retriever import save

pytest.importorskip("mteb", reason="mteb is not installed: it brings datasets, pandas and polars (pip install mteb)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def exported(shapes_retriever, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    run = save(shapes_retriever, out / "run")
    assert main(["convert", "to-hf", str(run), str(out / "hf"), "--layout", "sentence-transformers"]) == 0
    return out / "hf"


@pytest.mark.parametrize("unit", ["shapes_task0", "facts_task6", "shapes_task7", "facts_task8"])
def test_mteb_finds_our_figures(exported, mbeir_path, unit):
    from tests.support.mteb_task import compared

    figures = compared(exported, mbeir_path, unit)
    assert len(figures) == 13 and 0 < figures["map"][0] < 1
    for theirs, ours in figures.values():
        # mteb rounds to five digits.
        assert theirs == pytest.approx(ours, abs=1e-5)
