"""Text → token ids, encoded word by word with a cache where that gives the same ids: words repeat often."""

import json
import re
from typing import Any

from tokenizers import Tokenizer

# A word with the spaces before it, or spaces at the end.
_PIECE = re.compile(" *[^ ]+| +")
_SPACE = "▁"
_SPLITS_NOTHING = [
    {"type": "Split", "pattern": {"String": " "}, "behavior": behavior, "invert": False}
    for behavior in ("MergedWithPrevious", "MergedWithNext", "Isolated", "Removed")
]
# Number of cached words, and the longest of them in characters: together a few megabytes.
_MOST, _LONGEST = 100_000, 40


class TextEncoder:
    """Encodes a text into ids of `tokenizer`, without special tokens. Picklable.

    Gemma's tokenizer treats an entire text as one word and merges it pair by pair. No entry of its vocabulary spans a
    space into the next word, so concatenating the ids of the words gives the same result. Most words are cached.
    """

    def __init__(self, tokenizer: Tokenizer):
        # A text that spells a special token is text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.by_word = is_word_separable(tokenizer)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if not self.by_word or _SPACE in text:
            return self._encode([text])[0]
        pieces = _PIECE.findall(text)
        known = self._known
        try:
            return [one for piece in pieces for one in known[piece]]
        except KeyError:
            pass
        new = [piece for piece in {*pieces} if piece not in known]
        encoded = dict(zip(new, self._encode(new), strict=True))
        ids = [one for piece in pieces for one in (encoded[piece] if piece in encoded else known[piece])]
        # Threads share the cache. A thread that still holds a dictionary that another has dropped is equally correct.
        if len(known) > _MOST:
            self._known = known = {}
        known.update((piece, one) for piece, one in encoded.items() if len(piece) <= _LONGEST)
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The fast variant leaves out the offsets, which take as long as the ids.
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokenizer": self._tokenizer, "by_word": self.by_word}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known={})
        # Pickling does not preserve this flag.
        self._tokenizer.encode_special_tokens = True


def is_word_separable(tokenizer: Tokenizer) -> bool:
    """Returns True if a text's ids are the concatenated ids of its words, each with its leading spaces.

    This holds for BPE with byte fallback that maps a space to "▁" and has no vocabulary entry in which "▁" follows
    another character, provided that no other step of the tokenizer looks beyond a single word.
    """
    tree = json.loads(tokenizer.to_str())
    model, added = tree["model"], tree["added_tokens"]
    if tree["normalizer"] != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        return False
    # Gemma's own file splits at spaces that the normalizer has replaced: nowhere.
    if tree["pre_tokenizer"] not in (None, *_SPLITS_NOTHING):
        return False
    if model["type"] != "BPE" or not model["byte_fallback"] or model["dropout"]:
        return False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    # Without an unknown character none is fused with the next. Gemma has the tab in place of its byte.
    if not all(f"<0x{byte:02X}>" in model["vocab"] or chr(byte) in model["vocab"] for byte in range(128)):
        return False
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(128, 256)):
        return False
    if any(one["lstrip"] or one["rstrip"] or one["single_word"] or " " in one["content"] for one in added):
        return False
    return not any(_SPACE in token.lstrip(_SPACE) for token in model["vocab"])
