"""The `tokens` and `data` sections: how items are encoded, what is read, how a batch is laid out."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How an item becomes tokens and pixels.

    Attributes:
      tokenizer: directory of a Hugging Face tokenizer.
      template: "paligemma" is <image>…<bos> text newline <eos>; "clip" is <bos> text <eos>; "siglip" is text <eos>,
        padded to `max_text_tokens` + 1. In the last two an image takes no tokens; an image alone is one placeholder.
      max_text_tokens: instruction and text together are cut to this many tokens.
      newline: close the text with "\\n", as PaliGemma's processor does ("paligemma" only).
    """

    tokenizer: str = ""
    template: Literal["paligemma", "clip", "siglip"] = "paligemma"
    max_text_tokens: int = 240
    newline: bool = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how a step's items are laid out. All sizes are of the global batch.

    Attributes:
      path: a directory made by `jfe data prepare`.
      split: the split that is trained on.
      val_split: the split that the validation loss is taken on; "" for none.
      mixture: sampling weight by unit ("{dataset}_task{t}"); empty means every unit in proportion to its size.
      upsample: data set → how many queries of it count, in place of its size (configs/mbeir.yaml has M-BEIR's).
      homogeneous: so many neighbouring pairs of a batch come from one unit; 1 mixes them.
      instruction_probability: how often a query gets one of its instructions; otherwise none.
      pairs: query-positive pairs of a step.
      hard_negatives: negatives from `neg_cand_list` that go with each pair.
      negative_modality: "any" of these negatives, or only those of the "positive"'s modality.
      layout: "packed" puts several items into a row of `row_tokens`; "padded" one.
      rows, row_tokens, image_slots: shape of the global packed batch.
      bins: {tokens: how many}: attention works on so many bins of these lengths instead of on rows; an item lies
        whole in one, across the ends of rows. A fifth more room than the rows' tokens is usual; rows then have no
        gaps; where items are shorter than rows, attention multiplies less as well. {} for rows.
      image_shift: training images are moved by up to so many pixels, their edges repeated; a new draw each time.
      shuffle: False keeps the order on disk (for debugging).
      workers: reader processes; 0 reads in threads of the main process.
      max_bad_share: pairs with an unreadable image are skipped and counted; more than this share stops the run.
      image_cache_mib: decoded images kept in memory by each reader; candidates' tokens may take a quarter as much more.
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
