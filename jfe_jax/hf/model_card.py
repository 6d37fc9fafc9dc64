"""The README of an exported model: how to open it, how it was trained, and its results where they are known."""

import json
from pathlib import Path
from typing import Any

from jfe_jax import config as configs
from jfe_jax.config import Config
from jfe_jax.hf.settings import get_hf_format


def model_card(config: Config, step: int, name: str, results: list[dict[str, Any]], layout: str, base: str = "") -> str:
    """Returns Markdown with the Hub's front matter.

    Args:
      config: The config of the run that trained it.
      step: Optimizer steps of that run.
      name: What the reader will call the directory.
      results: Trees of `results.json`.
      layout: "transformers", "sentence-transformers", or "peft" for a directory that holds only adapters.
      base: The base model of those adapters.
    """
    hf_format = get_hf_format(config.model)
    lines = ["---", f"library_name: {layout}"]
    if base:
        lines.append(f"base_model: {base}")
    lines += [
        "pipeline_tag: feature-extraction",
        f"tags: [jfe_jax, multimodal-retrieval, {hf_format.tag(config.model)}]",
        "---",
        "",
        f"# {name}",
        "",
        *hf_format.card(config, step, name, layout, base),
    ]
    for tree in results:
        lines += _results(tree)
    lines += ["## Training", "", "```yaml", configs.to_yaml(config).rstrip(), "```"]
    return "\n".join(lines) + "\n"


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
