"""A unit of an M-BEIR directory as a task of mteb, asked of an exported checkpoint by mteb's own evaluator.

    python -m tests.support.mteb_task EXPORTED M-BEIR UNIT [LIMIT]     prints mteb's figures beside `jfe eval`'s

EXPORTED is what `jfe convert to-hf --layout sentence-transformers` wrote. mteb is not among what the tests install: it
brings datasets, pandas and polars with it (`pip install mteb`).
"""

import sys
from pathlib import Path

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.evaluation.eval_set import EvalTask, read_mbeir
from jfe_jax.evaluation.evaluator import ask
from tests.support.tiny_retriever import quiet

CUTOFFS = (1, 5, 10, 20, 50)


def task_of(asked: EvalTask, candidates: list) -> AbsTaskRetrieval:
    """mteb's task of one unit: queries as instructed, its pool, its judgements."""
    sides = [one.replace("image,text", "it").replace("image", "i").replace("text", "t") for one in _modalities(asked)]

    class Unit(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="".join(part.capitalize() for part in asked.unit.name.split("_")),
            description="A unit of an M-BEIR directory.",
            dataset={"path": "local/local", "revision": "1"},
            type="Any2AnyRetrieval",
            category=f"{sides[0]}2{sides[1]}",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            modalities=["text", "image"],
        )
        k_values = (*CUTOFFS, len(candidates))

        def load_data(self, *args, **kwargs):
            if self.data_loaded:
                return
            queries = [one.item("all") for one in asked.asked]
            texts = [" ".join(filter(None, (item.instruction, item.text))) for item in queries]
            docs = [one.item() for one in candidates]
            self.dataset = {
                "default": {
                    "test": {
                        "queries": _rows([one.query.qid for one in asked.asked], texts, queries),
                        "corpus": _rows([one.did for one in candidates], [item.text for item in docs], docs),
                        "relevant_docs": {one.query.qid: one.relevant for one in asked.asked},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Unit()


def _modalities(asked: EvalTask) -> tuple[str, str]:
    # A query with an instruction has a text, whatever else it has.
    item = asked.asked[0].item("all")
    there = ("image", item.image is not None), ("text", bool(item.text or item.instruction))
    return ",".join(name for name, value in there if value), asked.asked[0].wanted


def _rows(ids: list[str], texts: list, items: list) -> datasets.Dataset:
    columns = {"id": ids}
    if all(texts):
        columns["text"] = texts
    if all(item.image is not None for item in items):
        columns["image"] = [str(item.image) for item in items]
    rows = datasets.Dataset.from_dict(columns)
    return rows.cast_column("image", datasets.Image()) if "image" in columns else rows


def compared(exported: Path, mbeir: Path, unit: str, limit: int | None = None) -> dict[str, tuple[float, float]]:
    """Metric → mteb's figure and ours, on the unit's local pool; of its first `limit` queries."""
    questions = read_mbeir(Mbeir(mbeir), "test", ["local"], [unit], 0)
    (asked,) = questions.units
    asked.asked = asked.asked[:limit]
    ours = ask(Retriever.load(exported), questions, depth=1, progress=quiet).results["units"][unit]
    ours = ours["pools"]["local"]["metrics"]
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(exported), trust_remote_code=True, device="cpu"))
    # mteb asks the library's own module types what they take; it does not know this one.
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    task = task_of(asked, questions.table.candidates)
    told = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    (theirs,) = told.task_results[0].scores["test"]
    names = {f"hit@{k}": f"hit_rate_at_{k}" for k in CUTOFFS} | {f"recall@{k}": f"recall_at_{k}" for k in CUTOFFS}
    names |= {"ndcg@10": "ndcg_at_10", "mrr@10": "mrr_at_10", "map": f"map_at_{len(questions.table.candidates)}"}
    return {name: (theirs[key], ours[name]) for name, key in names.items()}


if __name__ == "__main__":
    figures = compared(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if sys.argv[4:] else None)
    print("| | mteb | jfe eval |\n|---|---:|---:|")
    for key, (theirs, ours) in figures.items():
        print(f"| {key} | {theirs:.5f} | {ours:.5f} |")
