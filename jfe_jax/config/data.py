"""The `tokens` and `data` sections: how items are encoded, what is read, how a batch is laid out."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """The encoding of an item as tokens and pixels.

    Attributes:
      tokenizer: Directory of a Hugging Face tokenizer.
      template: "paligemma" is <image>…<bos> text newline <eos>; "clip" is <bos> text <eos>; "siglip" is text <eos>,
        padded to `max_text_tokens` + 1. In the last two an image takes no tokens, and an item with an image alone is a
        single placeholder.
      max_text_tokens: Instruction and text together are truncated to this many tokens.
      newline: End the text with "\\n", as PaliGemma's processor does ("paligemma" only).
    """

    tokenizer: str = ""
    template: Literal["paligemma", "clip", "siglip"] = "paligemma"
    max_text_tokens: int = 240
    newline: bool = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data source and batch layout. All sizes are those of the global batch.

    Attributes:
      path: Directory made by `jfe data prepare`.
      split: Split to train on.
      val_split: Split for the validation loss; "" disables validation.
      mixture: Sampling weight by task ("{dataset}_task{t}"); empty samples every task in proportion to its size.
      upsample: Data set → number of its queries to count in place of its size (configs/mbeir.yaml has M-BEIR's).
      homogeneous: Number of consecutive pairs of a batch drawn from the same task; 1 mixes tasks.
      instruction_probability: Probability that a query gets one of its instructions instead of none.
      pairs: Query-positive pairs per step.
      hard_negatives: Negatives from `neg_cand_list` per pair.
      negative_modality: "any" of these negatives, or only those of the "positive"'s modality.
      layout: "packed" puts several items into a row of `row_tokens` tokens, "padded" one.
      rows, row_tokens, image_slots: Shape of the packed batch: rows, tokens per row, images.
      bins: {length: count}: attention runs on this many bins of these lengths instead of on rows. An item is contained
        in one bin and may cross the ends of rows, so rows have no gaps. Bins usually need a fifth more room than the
        tokens of the rows. Where items are shorter than rows, attention also multiplies less. {} uses rows.
      image_shift: Maximum random shift of training images, in pixels; edges are repeated. Drawn for each use.
      shuffle: False preserves the order on disk (for debugging).
      workers: Reader processes; 0 reads in threads of the main process.
      max_bad_share: Pairs with an unreadable image are skipped and counted; a larger share than this stops the run.
      image_cache_mib: Memory in each reader for decoded images; candidates' tokens may take a quarter more.
    """

    path: str = ""
    split: str = "train"
    val_split: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    upsample: dict[str, float] = field(default_factory=dict)
    homogeneous: int = 1
    instruction_probability: float = 1.0
    pairs: int = 256
    hard_negatives: int = 0
    negative_modality: Literal["any", "positive"] = "any"
    layout: Literal["packed", "padded"] = "packed"
    rows: int = 256
    row_tokens: int = 512
    image_slots: int = 256
    bins: dict[int, int] = field(default_factory=dict)
    image_shift: int = 0
    shuffle: bool = True
    workers: int = 0
    max_bad_share: float = 0.001
    image_cache_mib: int = 0
