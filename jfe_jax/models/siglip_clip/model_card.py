"""The README of an exported dual encoder: what it is, and how to open it."""

from jfe_jax.config import Config

_USE = """```python
from transformers import {kind}Model, {kind}Processor

model, processor = {kind}Model.from_pretrained("{name}"), {kind}Processor.from_pretrained("{name}")
words = model.get_text_features(**processor(text=text, truncation=True{padding}, return_tensors="pt"))
seen = model.get_image_features(**processor(images=image, return_tensors="pt"))
vector = torch.nn.functional.normalize(words.pooler_output + seen.pooler_output)
```
"""


def dual_card(config: Config, step: int, name: str) -> list[str]:
    """Returns the lines that say what the model is and how to open it; arguments as of `paligemma_card`."""
    kind = {"siglip": "Siglip", "clip": "CLIP"}[config.model.family]
    return [
        f"A text tower and an image tower, trained with jfe_jax for {step} steps. The embedding of an item is the sum "
        "of its text's and its image's features, as they come, scaled to unit norm; an instruction stands before the "
        "text, a space between.",
        "",
        _USE.format(kind=kind, name=name, padding=', padding="max_length"' if kind == "Siglip" else ""),
    ]
