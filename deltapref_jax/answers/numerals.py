"""Numbers that are written in words: "minus three", "one hundred and five", "two thirds"."""

import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: i for i, word in enumerate(_SMALL.split())} | {
    word: 10 * i for i, word in enumerate(_TENS.split(), 2)
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6}
_SCALES |= {"billion": 10**9, "trillion": 10**12}
_ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth"
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_PARTS |= {word + plural: i for i, word in enumerate(_ORDINALS.split(), 3) for plural in ("", "s")}
_WORD = "|".join(sorted([*_VALUES, *_SCALES], key=len, reverse=True))
_PART = "|".join(sorted(_PARTS, key=len, reverse=True))
_NUMERAL = re.compile(
    rf"(?P<sign>minus |negative )?(?P<a>an? (?=(?:{'|'.join(_SCALES)}|{_PART})\b))?"
    rf"(?P<words>(?:{_WORD})\b(?:(?:\s*-\s*|\s+(?:and\s+)?)(?:{_WORD})\b)*)?"
    rf"(?P<part>[\s-]*(?:{_PART})\b)?"
    rf"(?P<more>\s+and\s+an?\s(?P<half>half|third|quarter)\b)?",
)


def _cardinal(words: str) -> int | None:
    """The value of "two hundred and five"; None of words in no such order, such as "two five"."""
    total, group, last = 0, 0, 10**15
    for word in re.findall("[a-z]+", words):
        if word == "and":
            continue
        if word in _SCALES:
            scale = _SCALES[word]
            if scale <= 100:
                group, last = max(group, 1) * scale, 100
            else:
                total, group, last = total + max(group, 1) * scale, 0, 10**15
            continue
        value = _VALUES[word]
        if value >= last or (last < 100 and (last < 20 or value > 9)):
            return None
        group, last = group + value, max(value, 1)
    return total + group


def in_words(text: str) -> tuple[Fraction, str] | None:
    """The number that `text`, in lower case, starts with, and its words.

    None where it starts with none, or where what follows makes it another one.
    """
    m = _NUMERAL.match(text)
    if m is None or not (m["words"] or m["part"]):
        return None
    rest = text[m.end() :]
    if re.match(
        r"[\w-]|\s+a\s+(?:dozen|hundred|thousand|million|billion)\b|\s+\w+(?:ths?|rds?)\b", rest
    ) or re.search(r"\d|\b(?:or|and|to)\b", rest):
        return None
    if m["words"] and not m["part"] and rest.startswith(" of"):
        return None  # "one of them"
    value = Fraction(1)
    if m["words"]:
        cardinal = _cardinal(m["words"])
        if cardinal is None:
            return None
        value = Fraction(cardinal)
    if m["part"]:
        part = re.sub(r"[^a-z]", "", m["part"])
        alone = part in _ORDINALS.split() and not (m["words"] or m["a"])
        if alone or (value != 1 and not part.endswith("s")):
            return None  # "third" and "twenty-fifth" are places in an order
        value /= _PARTS[part]
    if m["half"]:
        value += Fraction(1, _PARTS[m["half"]])
    return (-value if m["sign"] else value), m[0].strip()
