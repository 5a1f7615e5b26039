"""Makes untrusted text (titles, categories, teacher replies) safe to put into a prompt or an answer."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Every control token of every tokenizer we know is spelled with one of < > [ ] { } | or sentencepiece's U+2581;
# JSON is delimited by " [ ] { } and escaped by \; `;` separates the fields of our own item lines. Without these
# characters none of them can be forged. The substitutes are ASCII, because byte-level tokenizers charge three
# tokens for a look-alike.
_SUBSTITUTES = {
    **dict.fromkeys("<{[‹⟨〈⟪《⟦【「『❮❰", "("),
    **dict.fromkeys(">}]›⟩〉⟫》⟧】」』❯❱", ")"),
    **dict.fromkeys('"`“”„‟«»〝〞〟❝❞', "'"),
    **dict.fromkeys("|\\¦∣│┃❘⧵∖", "/"),
    **dict.fromkeys("▁", "_"),
    **dict.fromkeys(";", ","),
}
# "So" and friends stay (registered-trade-mark signs and emoji are harmless); these categories go.
_INVISIBLE = {"Cf", "Cs", "Co", "Cn"}  # format (zero-width, bidi), surrogates, private use, unassigned
_SPACE = {"Cc", "Zl", "Zp", "Zs"}


def _safe(char: str) -> str:
    """One character's harmless form; empty for the invisible."""
    if char in _SUBSTITUTES:
        return _SUBSTITUTES[char]
    kind = unicodedata.category(char)
    if kind in _INVISIBLE:
        return ""
    if kind in _SPACE:
        return " "
    # U+226E is `<` with a stroke: a tokenizer that decomposes its input would see the `<` again.
    base = unicodedata.normalize("NFKD", char)[:1]
    return _SUBSTITUTES.get(base, char)


def _pass(text: str) -> str:
    return " ".join("".join(map(_safe, unicodedata.normalize("NFKC", text))).split())


@lru_cache(maxsize=1 << 16)
def clean(text: str, max_words: int = 0) -> str:
    """`text` on one line, in NFKC, holding nothing that could act: no control token, SID or JSON delimiter.

    Angle, square and curly brackets become round ones, double quotes and backticks become `'`, bars and backslashes
    become `/`, `;` becomes `,`. Control characters and line ends become a space; invisible characters (zero-width,
    bidirectional marks, private use) go. Only the first `max_words` words stay, if it is not 0.
    `clean(clean(x)) == clean(x)`.
    """
    if text.isascii():
        done = _pass(text)
    else:
        # Dropping an invisible character can bring two together that compose (a letter and its accent).
        done, before = _pass(text), text
        while done != before:
            done, before = _pass(done), done
    return " ".join(done.split()[:max_words]) if max_words else done
