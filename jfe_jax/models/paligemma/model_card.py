"""The README of an exported PaliGemma encoder: what it is, and how to open it."""

from jfe_jax.config import Config

_USE = """```python
from transformers import PaliGemmaForConditionalGeneration

model = PaliGemmaForConditionalGeneration.from_pretrained("{name}")
states = model.model(**inputs).last_hidden_state  # attends in both directions, as config.json says
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


def paligemma_card(config: Config, step: int, name: str, layout: str, base: str) -> list[str]:
    """Returns the lines that say what the model is and how to open it.

    Args:
      config: The config of its run.
      step: Optimizer steps of that run.
      name: What the reader will call the directory.
      layout: "transformers", "sentence-transformers", or "peft" for adapters alone.
      base: The base model of adapters.
    """
    model = config.model
    pooled = "the last token's state" if model.pooling == "last" else "the mean of the tokens' states"
    ending = "a newline and `<eos>`" if config.tokens.newline else "`<eos>`"
    use = {"sentence-transformers": _USE_SENTENCE_TRANSFORMERS, "peft": _USE_PEFT}.get(layout, _USE)
    return [
        "A Joint Fusion Encoder: image patches and text tokens in one sequence, one tower, one vector. "
        f"Trained with jfe_jax for {step} steps.",
        "",
        f"An item is `<image>` × {model.vision.patches} if it has an image, `<bos>`, at most "
        f"{config.tokens.max_text_tokens} tokens of text (an instruction before it, a space between), {ending}. "
        f"Its embedding is {pooled}, scaled to unit norm.",
        "",
        use.format(name=name, base=base or "BASE"),
    ]
