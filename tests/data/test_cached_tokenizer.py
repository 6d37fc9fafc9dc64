import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jfe_jax.data.cached_tokenizer import TextEncoder, is_word_separable

TEXTS = ["the old red house by the sea", "the sea is red", "a  house   with two spaces", "old, older; oldest!\n"] * 5


def gemma_like(crossing: bool = False, without: str = "") -> Tokenizer:
    """BPE with bytes to fall back to and "▁" for a space; `crossing`: merges reach over spaces; `without` an entry."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    if not crossing:
        trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    tree = json.loads(trained.to_str())["model"]
    # The tab is there in place of its byte, as in Gemma's.
    vocabulary = {"<unk>": 0} | {"\t" if byte == 9 else f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for token in tree["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in tree["merges"]]
    # Runs of spaces are entries, as in Gemma's vocabulary.
    for run in ("▁▁", "▁▁▁"):
        vocabulary.setdefault(run, len(vocabulary))
        merges.append(("▁", run[1:]))
    vocabulary.pop(without, None)
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_tokens([AddedToken("<loc01>", normalized=False)])
    return tokenizer


def test_gemmas_own_tokenizer_is_read_word_by_word():
    """Its two forms: spaces are gone before they are split at; and without that step."""
    split = gemma_like()
    split.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    assert is_word_separable(split) and is_word_separable(GEMMA)
    text = "the old  red\thouse\n"
    assert TextEncoder(split)(text) == split.encode(text, add_special_tokens=False).ids


GEMMA = gemma_like()
ENCODER = TextEncoder(gemma_like())


@given(st.text(alphabet="theold rdhouse ▁\n\t,é<loc01>  ", max_size=60) | st.text(max_size=30))
@settings(deadline=None, max_examples=300)
def test_ids_word_by_word_are_those_of_the_text(text):
    wanted = GEMMA.encode(text, add_special_tokens=False).ids
    assert ENCODER.by_word
    # Twice: when its words are new, and when they are known.
    assert ENCODER(text) == wanted
    assert ENCODER(text) == wanted


def test_a_copy_in_another_process_starts_empty_and_encodes_the_same():
    ENCODER("the sea")
    copy = pickle.loads(pickle.dumps(ENCODER))
    assert ENCODER._known and not copy._known
    assert copy("the sea <loc01>") == ENCODER("the sea <loc01>")


def test_a_tokenizer_that_looks_beyond_words_is_given_the_whole_text():
    assert is_word_separable(GEMMA)
    over_spaces = gemma_like(crossing=True)
    assert not is_word_separable(over_spaces)
    assert TextEncoder(over_spaces)("the sea is") == over_spaces.encode("the sea is", add_special_tokens=False).ids
    unknown = gemma_like(without="<0xC3>")
    strips = gemma_like()
    strips.add_tokens([AddedToken("<x>", lstrip=True)])
    splits = gemma_like()
    splits.pre_tokenizer = pre_tokenizers.ByteLevel()
    lower = gemma_like()
    lower.normalizer = normalizers.Lowercase()
    for other in (unknown, strips, splits, lower):
        assert not is_word_separable(other)


@pytest.mark.parametrize("most", [0, 3])
def test_what_is_known_is_bounded(monkeypatch, most):
    monkeypatch.setattr("jfe_jax.data.cached_tokenizer._MOST", most)
    encoder = TextEncoder(gemma_like())
    for text in [*TEXTS, "a" * 100]:
        assert encoder(text) == GEMMA.encode(text, add_special_tokens=False).ids
        # One text's own words may come on top.
        assert len(encoder._known) <= most + 8 and "a" * 100 not in encoder._known
