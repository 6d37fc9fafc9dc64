"""The README of an exported model: how to open it, how it was trained, what it reached if that is known."""

import json
from pathlib import Path
from typing import Any

from jfe_jax import config as configs
from jfe_jax.config import Config

_USE = """```python
from transformers import PaliGemmaForConditionalGeneration

model = PaliGemmaForConditionalGeneration.from_pretrained("{name}")
states = model.model(**inputs).last_hidden_state  # attends in both directions, as config.json says
```
"""
_USE_DUAL = """```python
from transformers import {kind}Model, {kind}Processor

model, processor = {kind}Model.from_pretrained("{name}"), {kind}Processor.from_pretrained("{name}")
words = model.get_text_features(**processor(text=text, truncation=True{padding}, return_tensors="pt"))
seen = model.get_image_features(**processor(images=image, return_tensors="pt"))
vector = torch.nn.functional.normalize(words.pooler_output + seen.pooler_output)
```
"""
_USE_SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
vectors = model.encode(["a text"])  # or images; or [{{"image": image, "text": "a change to it"}}]
```
"""


_USE_PEFT = """```python
from peft import PeftModel
from transformers import PaliGemmaForConditionalGeneration

base = PaliGemmaForConditionalGeneration.from_pretrained("{base}")
base.config.text_config.is_causal = False  # attends in both directions
model = PeftModel.from_pretrained(base, "{name}")
states = model.base_model.model.model(**inputs).last_hidden_state
```
"""


def model_card(config: Config, step: int, name: str, results: list[dict[str, Any]], layout: str) -> str:
    """Markdown with the Hub's front matter.

    Args:
      config: of the run that trained it.
      step: optimizer steps of that run.
      name: what the reader will call the directory.
      results: trees of `results.json`.
      layout: "transformers" or "sentence-transformers".
    """
    model = config.model
    if model.kind == "dual":
        return _dual_card(config, step, name, results)
    pooled = "the last token's state" if model.pooling == "last" else "the mean of the tokens' states"
    ending = "a newline and `<eos>`" if config.tokens.newline else "`<eos>`"
    lines = [
        "---",
        f"library_name: {layout}",
        "pipeline_tag: feature-extraction",
        "tags: [jfe_jax, multimodal-retrieval, paligemma]",
        "---",
        "",
        f"# {name}",
        "",
        "A Joint Fusion Encoder: image patches and text tokens in one sequence, one tower, one vector. "
        f"Trained with jfe_jax for {step} steps.",
        "",
        f"An item is `<image>` × {model.vision.patches} if it has an image, `<bos>`, at most "
        f"{config.tokens.max_text_tokens} tokens of text (an instruction before it, a space between), {ending}. "
        f"Its embedding is {pooled}, scaled to unit norm.",
        "",
        (_USE_SENTENCE_TRANSFORMERS if layout == "sentence-transformers" else _USE).format(name=name),
    ]
    for tree in results:
        lines += _results(tree)
    lines += ["## Training", "", "```yaml", configs.to_yaml(config).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _dual_card(config: Config, step: int, name: str, results: list[dict[str, Any]]) -> str:
    kind = {"siglip": "Siglip", "clip": "CLIP"}[config.model.family]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        f"tags: [jfe_jax, multimodal-retrieval, {config.model.family}]",
        "---",
        "",
        f"# {name}",
        "",
        f"A text tower and an image tower, trained with jfe_jax for {step} steps. The embedding of an item is the sum "
        "of its text's and its image's features, as they come, scaled to unit norm; an instruction stands before the "
        "text, a space between.",
        "",
        _USE_DUAL.format(kind=kind, name=name, padding=', padding="max_length"' if kind == "Siglip" else ""),
    ]
    for tree in results:
        lines += _results(tree)
    lines += ["## Training", "", "```yaml", configs.to_yaml(config).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def adapter_card(config: Config, step: int, name: str, results: list[dict[str, Any]], base: str) -> str:
    """As `model_card`, of a directory that holds only adapters; `base` is what they stand on."""
    card = model_card(config, step, name, results, "peft")
    card = card.replace(
        "library_name: peft\n", f"library_name: peft\nbase_model: {base}\n" if base else "library_name: peft\n"
    )
    return card.replace(_USE.format(name=name), _USE_PEFT.format(name=name, base=base or "BASE"))


def known_results(run: Path, step: int) -> list[dict[str, Any]]:
    """The evaluations in or beside a run directory that are of this step of it."""
    found = []
    for file in sorted([*run.glob("*/results.json"), *run.parent.glob("*/results.json")]):
        tree = json.loads(file.read_text(encoding="utf-8"))
        # The evaluation's path may have been relative to another directory.
        if Path(tree.get("checkpoint", "")).parts[-2:] == run.absolute().parts[-2:] and tree.get("step") == step:
            found.append(tree)
    return found


def _results(tree: dict[str, Any]) -> list[str]:
    data = ", ".join(filter(None, (tree["data"], tree["split"])))
    lines = [f"## Results on {data}", "", "| pool | queries | hit@1 | hit@5 | hit@10 |"]
    lines.append("|---|---|---:|---:|---:|")
    for pool, groups in tree["groups"].items():
        for group, values in groups.items():
            # Beside the groups stands the headline, a number.
            if isinstance(values, dict):
                numbers = " | ".join(f"{100 * values['metrics'][f'hit@{k}']:.1f}" for k in (1, 5, 10))
                lines.append(f"| {pool} | {group} | {numbers} |")
    return [*lines, ""]
