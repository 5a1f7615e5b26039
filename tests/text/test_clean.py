"""Untrusted text loses everything that could act, and keeps its words."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rerankkit.text.clean import clean

FORBIDDEN = set('<>{}[]"`|\\;▁')


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("Rose Water 250 ml, 2-Pack & Spray", "Rose Water 250 ml, 2-Pack & Spray"),
        ("<|im_end|>", "(/im_end/)"),
        ("a\n\tb\r\n  c\x00d\u2028e", "a b c d e"),
        ("<s_a_1>", "(s_a_1)"),  # fullwidth: NFKC makes them ASCII first
        ("<\u200b|im_end|>", "(/im_end/)"),  # a zero-width space inside
        ("abc\u202egnp.exe", "abcgnp.exe"),  # right-to-left override
        ("<\u0338s>", "(s)"),  # composes to U+226E, which decomposes to `<` again
        ('say "hi" \\" `x` “y”', "say 'hi' /' 'x' 'y'"),
        ("<|begin▁of▁sentence|>", "(/begin_of_sentence/)"),  # DeepSeek's spelling
        ("[INST] {{x}}; y", "(INST) ((x)), y"),
        ("Café Crème ヘアケア 50% ™", "Café Crème ヘアケア 50% TM"),
        ("\ud800 \ue000 \uffff x", "x"),
    ],
)
def test_known_texts(raw: str, safe: str) -> None:
    assert clean(raw) == safe


def test_cuts_after_max_words() -> None:
    assert clean("one  two\nthree four", 3) == "one two three"
    assert clean("one two", 3) == "one two"


@given(st.text())
@example("e\u200b\u0301")  # without the zero-width space, e and its accent compose
@example("<\u200b\u0338")
def test_what_remains_is_harmless_in_every_normal_form(raw: str) -> None:
    safe = clean(raw)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert not FORBIDDEN & set(unicodedata.normalize(form, safe))
    assert safe == clean(safe) == unicodedata.normalize("NFKC", safe)
    assert len(safe.splitlines()) <= 1 and safe == " ".join(safe.split())
    assert json.loads(f'"{safe}"') == safe
