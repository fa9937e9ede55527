"""Compare an answer with a reference as text. Each function returns a score from 0 to 1."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
"""Letters of scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both are equal up to white space at their ends."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """Return 1 if the answer has the reference in it, where any white space counts as one blank."""
    return float(" ".join(reference.split()) in " ".join(answer.split()))


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of words, as the SQuAD script does.

    Words are compared without case, punctuation and articles. If one text has no word, the score is
    1 if both have none. Source: Rajpurkar et al., arXiv:1606.05250, and evaluate-v2.0.py.
    """
    ours, theirs = _squad_words(answer), _squad_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L: F1 of the longest common subsequence of words, without case.

    Words are runs of letters and digits, and are not stemmed: of ASCII text those of the package
    rouge-score. In scripts that put no blanks between words, each letter is one. Source: Lin, ROUGE,
    ACL workshop 2004, section 3, with beta = 1.
    """
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return 0.0
    return _f1(_longest_common(ours, theirs), len(ours), len(theirs))


def regex_match(answer: str, reference: str, pattern: str) -> float:
    """Return 1 if the pattern is found in the answer, and its first group is the same in both.

    A pattern without a group judges the answer alone. Where it has a group and the reference does
    not match, the group must equal the whole reference up to white space.
    """
    found = re.search(pattern, answer)
    if found is None or not found.re.groups:
        return float(found is not None)
    wanted = re.search(pattern, reference)
    return float((found[1] or "").strip() == ((wanted[1] or "") if wanted else reference).strip())


def _squad_words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def _words(text: str) -> list[str]:
    text = UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", text.lower()))
    return "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text).split()


def _f1(num_common: int, num_ours: int, num_theirs: int) -> float:
    return 2.0 * num_common / (num_ours + num_theirs)


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; bits of one number are a row of the table.

    Letters of long answers would take minutes cell by cell. Source: Hyyrö, AWOCA 2004.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(theirs):
        places[word] = places.get(word, 0) | 1 << j
    whole = row = (1 << len(theirs)) - 1
    for word in ours:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & whole
    return len(theirs) - row.bit_count()
