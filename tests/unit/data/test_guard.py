"""Text between special tokens is encoded by itself only where that is the same."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from fwasync.data.guard import TextGuard

pieces = st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "the", " fox", "\n", "\n\n", "  ", "é", "a b"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(texts=pieces)
def test_tokens_are_those_of_the_whole(texts: list[str], bpe: Tokenizer) -> None:
    text = "".join(texts)
    whole = bpe.encode(text, add_special_tokens=False)
    guard = TextGuard(bpe)
    assert guard.encode(text, {}) == whole.ids
    ids, offsets = guard.encode_with_offsets(text, {})
    assert ids == whole.ids
    assert all(start < end for start, end in offsets)
    assert {character for start, end in offsets for character in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize("scheme", ["first", "always", "never", "prepend", "strip"])
def test_tokenizers_that_treat_a_beginning_differently_get_whole_texts(scheme: str) -> None:
    vocabulary = {token: id for id, token in enumerate(["<s>", "<unk>", "▁", "a", "b", "▁a", "▁b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if scheme == "strip" else scheme)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False, rstrip=scheme == "strip")])
    guard = TextGuard(tokenizer)
    for text in ("a<s>a b", "<s>a<s> a", "<s> b<s><s>a", "a b"):
        assert guard.encode(text, {}) == tokenizer.encode(text, add_special_tokens=False).ids
