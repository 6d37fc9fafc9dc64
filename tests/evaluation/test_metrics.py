"""Our metrics against trec_eval's, on random runs with ties, unjudged candidates and right ones outside the pool."""

import hypothesis
import numpy as np
import pytest
import pytrec_eval
from hypothesis import strategies as st

from jfe_jax.evaluation import metrics


@st.composite
def runs(draw):
    """A query's run (few distinct scores, so that most tie) and its graded judgements."""
    count = draw(st.integers(1, 70))
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=count, max_size=count))
    names = draw(st.permutations([f"d:{number}" for number in range(count)]))
    judged = draw(st.dictionaries(st.sampled_from([*names, "x:1", "x:2"]), st.integers(0, 3), max_size=12))
    return dict(zip(names, scores, strict=True)), judged


def ranks_of(run, judged):
    order = sorted(run, key=lambda name: (run[name], name), reverse=True)
    right = [name for name, gain in judged.items() if gain > 0]
    ranks = [order.index(name) + 1 if name in run else metrics.NOT_RETRIEVED for name in right]
    return np.array([ranks], np.int64).reshape(1, -1), np.array([[judged[name] for name in right]], float)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(runs())
def test_equal_trec_eval(case):
    run, judged = case
    hypothesis.assume(any(gain > 0 for gain in judged.values()))
    ranks, gains = ranks_of(run, judged)
    padded = np.pad(ranks, ((0, 0), (0, 3))), np.pad(gains, ((0, 0), (0, 3)))
    ours = {name: value[0] for name, value in metrics.per_query(*padded).items()}
    theirs = pytrec_eval.RelevanceEvaluator(
        {"q": judged}, {"success.1,5,10,20,50", "recall.1,5,10,20,50", "ndcg_cut.10", "map"}
    ).evaluate({"q": run})["q"]
    first_ten = dict(sorted(run.items(), key=lambda pair: pair[::-1], reverse=True)[:10])
    reciprocal = pytrec_eval.RelevanceEvaluator({"q": judged}, {"recip_rank"}).evaluate({"q": first_ten})["q"]
    expected = {f"hit@{k}": theirs[f"success_{k}"] for k in metrics.CUTOFFS}
    expected |= {f"recall@{k}": theirs[f"recall_{k}"] for k in metrics.CUTOFFS}
    expected |= {"ndcg@10": theirs["ndcg_cut_10"], "map": theirs["map"], "mrr@10": reciprocal["recip_rank"]}
    assert ours == pytest.approx(expected, abs=1e-6)


def test_a_query_with_nothing_right_is_left_out_of_the_mean():
    values = metrics.per_query(np.array([[1, 0], [0, 0], [3, metrics.NOT_RETRIEVED]]))
    assert np.isnan(values["hit@1"][1])
    assert metrics.means(values)["hit@1"] == 0.5
    assert metrics.means(values)["recall@5"] == 0.75


def test_all_queries_with_nothing_right_give_nan():
    assert np.isnan(metrics.means(metrics.per_query(np.zeros((2, 0))))["map"])


def test_without_moves_up_what_stood_behind():
    ranks = np.array([[3, 1, 0, metrics.NOT_RETRIEVED]])
    moved = metrics.without(ranks, np.array([[2, 5, 0]]))
    assert moved.tolist() == [[2, 1, 0, metrics.NOT_RETRIEVED]]
