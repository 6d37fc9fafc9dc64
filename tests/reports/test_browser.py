"""The pages in a real browser: headless Chromium lays them out, filters the gallery, draws them in light and dark."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.evaluation import results
from jfe_jax.evaluation.evaluator import evaluate
from jfe_jax.reports import comparison_report, evaluation_report
from jfe_jax.reports.comparison import compare, load_models
from tests.support.tiny_retriever import quiet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium to look at the pages")

WIDTHS = {"phone": 390, "wide": 1280}
# Asks each frame what a reader would see, and tells it in a tag that --dump-dom writes.
_ASK = """
const told={};
addEventListener('error',event=>{told.error=String(event.message)});
addEventListener('load',()=>{
for(const frame of document.querySelectorAll('iframe')){
const page=frame.contentDocument,view=frame.contentWindow;
const cards=[...page.querySelectorAll('.gallery>article')],select=page.querySelector('select[name=unit]');
const visible=()=>cards.filter(card=>card.getBoundingClientRect().height>0).length;
const all=visible();select.value='shapes_task7';select.dispatchEvent(new view.Event('change'));const chosen=visible();
const pictures=[...page.querySelectorAll('img')];pictures.forEach(one=>one.loading='eager');
told[frame.id]={width:view.innerWidth,overflow:page.documentElement.scrollWidth-view.innerWidth,cards:cards.length,all,
chosen,wanted:cards.filter(card=>card.dataset.unit==='shapes_task7').length,said:page.querySelector('.shown').textContent,
wide:[...page.querySelectorAll('section>*,h1')].filter(one=>one.getBoundingClientRect().right>view.innerWidth+1).length,
misses:cards.filter(card=>card.dataset.unit==='shapes_task0'&&card.dataset.outcome==='miss')
.map(card=>card.querySelector('.by .tag').textContent)};}
const out=document.createElement('pre');out.id='told';out.textContent=JSON.stringify(told);document.body.append(out);});
"""


@pytest.fixture(scope="module")
def pages(shapes_retriever, mbeir_path, tmp_path_factory):
    """The report of an evaluation and of a comparison."""
    out = tmp_path_factory.mktemp("pages")
    evaluation = evaluate(shapes_retriever, Mbeir(mbeir_path), instruction="all", progress=quiet)
    results.write_results(out / "one", evaluation.results, evaluation.answers, evaluation.pools)
    evaluation_report.write(out / "evaluation.html", evaluation)
    models = load_models({"one": [out / "one"], "other": [out / "one"]})
    comparison_report.write(out / "comparison.html", compare(models, replicates=20), models)
    return out


def chromium(folder, *flags):
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *flags]
    return subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.parametrize("name", ["evaluation", "comparison"])
def test_the_page_fits_a_phone_and_a_wide_screen_and_filters(pages, tmp_path, name):
    page = (pages / f"{name}.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    frames = [
        f'<iframe id="{key}" style="width:{width}px;height:900px" srcdoc="{page}"></iframe>'
        for key, width in WIDTHS.items()
    ]
    (tmp_path / "frames.html").write_text(f"<!doctype html><script>{_ASK}</script>{''.join(frames)}")
    dom = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=4000", f"file://{tmp_path / 'frames.html'}")
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', dom)[1])
    assert set(told) == set(WIDTHS), "an error of a script would be here"
    for key, width in WIDTHS.items():
        seen = told[key]
        assert seen["width"] == width and seen["overflow"] <= 0 and seen["wide"] == 0
        assert seen["all"] == seen["cards"] > 8
        assert 0 < seen["chosen"] == seen["wanted"] < seen["cards"] and seen["said"] == f"{seen['wanted']} shown"
        ranks = [int(tag.rpartition(" ")[2]) for tag in seen["misses"]]
        if name == "evaluation":
            assert len(ranks) > 1 and ranks == sorted(ranks, reverse=True), "worst misses first"


def test_the_page_is_drawn_in_light_and_in_dark(pages, tmp_path):
    drawn = {}
    for scheme, flags in {"light": (), "dark": ("--force-dark-mode",)}.items():
        file = tmp_path / f"{scheme}.png"
        chromium(
            tmp_path, *flags, "--window-size=1280,1600", f"--screenshot={file}", f"file://{pages / 'evaluation.html'}"
        )
        with Image.open(file) as picture:
            drawn[scheme] = np.asarray(picture.convert("L"))
    assert np.median(drawn["light"]) > 230 and np.median(drawn["dark"]) < 50
    # Words stand out from what is behind them.
    assert drawn["light"].min() < 60 and drawn["dark"].max() > 200
    assert all(len(np.unique(picture)) > 20 for picture in drawn.values())
