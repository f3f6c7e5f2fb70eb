r"""What a statement means: a number, an option's letter, words, or a formula.

The reference answer says which of these is wanted; it says nothing about the value. A statement
"12, because 3 * 4 = 12" holds one number and a reason; "7 or 9", "5-7" and "3 5 8" hold none,
because they commit to no single one.
"""

import math
import re
import unicodedata
from fractions import Fraction

from deltapref_jax.answers.numerals import in_words

_SIGNS = str.maketrans(
    {
        "−": "-", "﹣": "-", "－": "-", "⁄": "/", "’": "'", "‘": "'", "“": '"', "”": '"',
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "×": r"\times ", "·": r"\cdot ",
        "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "≈": r"\approx ", "`": "", "±": r"\pm ", "∪": r"\cup ", "°": r"^\circ ", "√": r"\sqrt ",
        "。": ". ", "、": ", ",
    }
)  # fmt: skip
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|emph|operatorname|boxed|fbox)"
    r"\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr|!|limits)(?![a-zA-Z])\.?")
_GAP = re.compile(r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])")


_ROW, _CENT = "\x00", "\x01"  # stand for LaTeX's line break and for \$


def normalize(text: str) -> str:
    """The text with one sign for each meaning, without fonts, layout and formulas' borders."""
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", unicodedata.normalize("NFC", text))
    text = re.sub("[₀-₉]", lambda m: f"_{ord(m[0]) - 0x2080}", text)
    text = re.sub(r"，(?!\d)", ", ", text)
    text = "".join(
        unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text
    )
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m[0].translate(_POWERS) + "}", text)
    text = re.sub("|".join(_VULGAR), lambda m: f" {_VULGAR[m[0]]}", text).translate(_SIGNS)
    text = text.replace(r"\\", _ROW).replace(r"\$", _CENT)
    text = re.sub(r"\\[()\[\]]|\$\$", " ", text)
    text = re.sub(r"\$\s*([^$\n]*[^$\s])\s*\$(?!\d)", r" \1 ", text)  # not "$5 and $6"
    text = re.sub(r"\$(?!\d)", " ", text)
    text = re.sub(r"(\d)(?:\{,\}|\\,|\\!,?)(?=\d{3}(?!\d))", r"\1,", text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _GAP.sub(" ", text)
    for _ in range(5):  # fonts within fonts
        text, count = _FONT.subn(r" \1 ", text)
        if not count:
            break
    text = _LAYOUT.sub("", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:leq|geq|neq)(?![a-zA-Z])", lambda m: m[0][:-1], text)
    text = re.sub(r"\\([%#&])", r"\1", text)
    return " ".join(text.replace(_ROW, r"\\").replace(_CENT, "$").split())


# ---------------------------------------------------------------- where an answer ends
_REASON = (
    r"because|since|as|so|which|where|when|for|but|not|hence|therefore|thus|i\.e\.|given|assuming|"
    r"who|whose|they|it|he|she|we|you|this|there|that|the|an?|"
    r"weil|denn|nicht|porque|pues|car|parce|perché|потому|так|а"
)
_END = re.compile(
    rf"[.!?](?=[\s*\"')]|$)|[。！？]|[，,]\s*(?:因为|不是|而)|;|\s\((?=[a-z])|\s[-–—]\s(?=[A-Za-z])|,\s+(?:{_REASON})\b|\s(?:because|since)\b"
    r"|\s[✓✔✅]|\n"
)
_FORMULA = re.compile(
    r"\$\$[^$]{1,2000}\$\$|\$[^$\n]{0,2000}[^$\s]\$(?!\d)|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\]",
    re.DOTALL,
)


def _formulas(text: str) -> list[tuple[int, int]]:
    r"""Spans of $…$, \(…\) and \[…\], whose full stops end no sentence."""
    return [m.span() for m in _FORMULA.finditer(text)]


def ends(text: str) -> list[int]:
    """Where the answer at the start of `text` may end, in order; the last is the text's end."""
    formulas = _formulas(text)
    found = []
    for m in _END.finditer(text):
        inside = any(a < m.start() < b for a, b in formulas)
        if m.start() and not inside and text[: m.start()].strip("*_ "):
            found.append(m.start())
        if len(found) == 8:
            break
    return [*found, len(text)]


_FILLER = re.compile(
    r"(?:[\s*_\"'`:=>~#]|\\approx|\\(?=\s)|(?:therefore|thus|hence|then|so|clearly|simply|just|also|"
    r"now|indeed|approximately|approx\.|about|around|roughly|exactly|equal to|equals|given by|"
    r"as follows|it is|it's|this is|that is|there (?:is|are)|a total of|only|still|actually|"
    r"probably|the (?:number|value|total|sum|result|product)(?: of| is| was)?)\b,?)*",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\([A-J]\)|[A-J][.):])[\s,:]*(?=\S)|(?:option|choice)\s+[A-J][\s,:]+"
)


# ---------------------------------------------------------------- numbers
# Thousands are set apart by commas or spaces, and in India hundreds of thousands too (1,00,000).
_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?![,\d])|\d+)(?:\.\d+)?|\.\d+"
_GROUPED = re.compile(
    r"(?<![\w.,'])\d{1,3}(?:(?:'\d{3})+|(?:_\d{3})+|(?:\.\d{3}){2,})(?![\w']|\.\d)"
)
_FRACTION = r"\\frac\s*(?:\{\s*(?P<a>-?\d+)\s*\}|(?P<a1>\d))\s*(?:\{\s*(?P<b>\d+)\s*\}|(?P<b1>\d))"
_VALUE = re.compile(
    r"(?P<sign>[-–+]?|(?i:minus |negative ))\s*"
    r"(?:(?:US|A|C)?[$€£¥₹]|(?:USD|EUR|GBP)\s)?\s*(?P<sign2>-?)"
    rf"(?:(?P<whole>\d+)?\s*{_FRACTION}"
    r"|(?P<mixed>\d+) (?P<over>\d+)/(?P<under>\d+)"
    r"|(?P<ten>10)\s*\^\s*(?:\{\s*(?P<e>[-+]?\d+)\s*\}|(?P<e1>[-+]?\d+))"
    rf"|(?P<digits>{_DIGITS})"
    r"(?:\s*/\s*(?P<divisor>\d+(?:,\d{3})*)(?![\d.])"
    r"|[eE](?P<exp>[-+]?\d+)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<exp2>[-+]?\d+)\s*\}|(?P<exp3>[-+]?\d+)))?)"
    r"(?P<percent>\s*(?:%|percent\b|per cent\b|pct\b))?"
    r"(?P<scale>k\b|\s*(?:hundred|thousand|million|billion|trillion)\b)?"
)
_SCALES = {"k": 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CURRENCY = re.compile(r"[$€£¥₹]")
# More than one number, or no number alone: a list, a range, a ratio, a term of a formula.
_MORE = re.compile(
    r"\s*(?:[-–]\s*\d|:\s*\d|,\s*(?:and\s+|or\s+)?[-$]?\d|[+*/^<>!_]|-\s*[\\\w]|\s\d|\d"
    r"|\\(?!circ|%)[a-zA-Z]|\((?![^()]*[A-Za-z]{3})|or\s+(?:more|less|fewer|greater|higher|lower|above|below)\b"
    r"|[A-Za-z]+,?\s+(?:and\s+)?\d)"
)
_JOINED = re.compile(r"(?:^|\W)(?:or|and|to|through|until)\s+[-$]?\s*[\d\\]", re.IGNORECASE)
_UNIT_LETTERS = "mgshLlJNWVKCF"
_ONE_LETTER = re.compile(r"\s?([A-Za-z])(?![A-Za-z])")
_EXPONENT_LIMIT = 400
_MAX_DIGITS = 400  # Python refuses to read integers of more than 4300


def _power(digits: str) -> Fraction | None:
    exponent = int(digits)
    return Fraction(10) ** exponent if abs(exponent) <= _EXPONENT_LIMIT else None


def _fraction(m: re.Match[str]) -> Fraction | None:
    """The value of a match of `_VALUE`, without its percent sign; None if it has none."""
    if len(m[0]) > _MAX_DIGITS:
        return None
    over, under = m["a"] or m["a1"], m["b"] or m["b1"]
    if m["digits"]:
        value = Fraction(m["digits"].replace(",", "").replace(" ", ""))
        if m["divisor"]:
            divisor = int(m["divisor"].replace(",", ""))
            if divisor == 0:
                return None
            value /= divisor
        if exp := m["exp"] or m["exp2"] or m["exp3"]:
            if (power := _power(exp)) is None:
                return None
            value *= power
    elif m["ten"]:
        power = _power(m["e"] or m["e1"])
        if power is None:
            return None
        value = power
    else:
        over, under = (m["over"], m["under"]) if m["mixed"] else (over, under)
        if int(under) == 0:
            return None
        value = Fraction(int(over), int(under)) + int(m["mixed"] or m["whole"] or 0)
    if m["scale"]:
        value *= 10 ** _SCALES[m["scale"].strip().lower()]
    return -value if (m["sign"] not in ("", "+")) != (m["sign2"] == "-") else value


def _unfilled(text: str) -> str:
    """Without "therefore", "about", "=" and the like in front."""
    return text[_FILLER.match(text).end() :]  # type: ignore[union-attr]


_HEDGE = re.compile(
    r"\b(?:or|and|to|between|from|either|neither|both|through|at|least|most|more|less|fewer|"
    r"greater|than|not|no|cannot|if|unless|step|divided|times|plus|minus)\b|n't",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"(?:(?<=\s)|^)[-$€£]{0,2}(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?=[\s.,;!?%]|$)")


def _at_start(head: str) -> tuple[frozenset[Fraction], str] | None:
    """The number that `head`, a normalized text, starts with, if only a unit or words follow."""
    head = _unfilled(head).strip("*_\"' ")
    if alone := re.fullmatch(r"\(\s*([-−]?[\d./]+)\s*\)", head):
        head = alone[1]
    if spelled := in_words(head.lower()):
        return frozenset([spelled[0]]), spelled[1]
    m = _VALUE.match(head)
    if m is None:
        return None
    rest = head[m.end() :]
    if not re.match(r"\s*[*_\"')\]}]*[.,!?]*\s*$", rest):
        if _MORE.match(rest) and not re.match(r"\^\s*\{?\s*\\circ", rest):
            return None
        if _JOINED.search(rest):
            return None
        one = _ONE_LETTER.match(rest)
        if one and one[1] not in _UNIT_LETTERS and not re.match(r"\sa\s[a-z]", rest):
            return None
    value = _fraction(m)
    if value is None:
        return None
    return frozenset({value, value / 100} if m["percent"] else {value}), m[0].strip()


_FACTORIAL = re.compile(r"\s*\$[^$]*[\w)]!\s*\$[\s.]*")  # "$5!$"; behind words it ends a sentence


def factorial(text: str) -> Fraction | None:
    """The value of "3!" where that is all that is said; None of other text and above 20!."""
    m = re.fullmatch(r"\s*\$?\s*(\d{1,2})!\s*\$?\s*", text)
    return Fraction(math.factorial(int(m[1]))) if m and int(m[1]) <= 20 else None


def number(text: str) -> tuple[frozenset[Fraction], str] | None:
    """The number that `text` commits to and what was read; None if there is no single one.

    Args:
      text: a statement or a reference answer.

    Returns:
      Its values, several for a percentage (50% is 50 and 1/2) and for "1/3 ≈ 0.333".
    """
    if _FACTORIAL.fullmatch(text):
        return None
    text = _unfilled(text)
    if option := _OPTION.match(text):
        text = _unfilled(text[option.end() :])
    head = _unfilled(normalize(text[: ends(text)[0]]))
    head = re.split(r"(?<=[A-Za-z]{2})\s\(", head)[0]  # "12 apples (3 * 4)"
    head = re.sub(r",?\s+or\s+(?:about|approximately|roughly)\b", r" \\approx", head)
    exact, *approximate = re.split(r"\s*\(?\\approx", head)
    sides = re.split(r"(?<![<>!=])=(?!=)", exact)
    if len(sides) > 1:
        # "x = 3", "3 * 4 = 12", "12 = 3 * 4"; with words or several equations it is none of these.
        if re.search(
            r",\s|\b(?:and|or)\b|[<>]|\\[lg]e|[A-Za-z]{3}", re.sub(r"\\[a-z]+", "", sides[-2])
        ):
            return None
        if re.search(r",\s|\b(?:and|or)\b|[<>]", sides[-1]):
            return None
        found = _at_start(sides[-1]) or _at_start(sides[0])
    elif len(either := re.split(r",?\s+or\s+", exact)) == 2:
        one, other = _at_start(either[0]), _at_start(either[1])
        same = one and other and one[0] & other[0]  # "3/4 or 0.75"
        return (one[0] | other[0], one[1]) if one and other and same else None
    else:
        found = _at_start(exact)
    if approximate and (about := _at_start(approximate[-1].rstrip(")"))):
        return (found[0] | about[0], found[1]) if found else about
    if found is None and len(sides) == 1 and not _HEDGE.search(exact):
        # "She makes 18 dollars": a sentence with one number.
        tokens = list(_TOKEN.finditer(exact))
        if len(tokens) == 1 and re.match(r"(?:[A-Za-z']+,?\s+){2,}", exact[: tokens[0].start()]):
            return _at_start(exact[tokens[0].start() :])
    return found


# ---------------------------------------------------------------- letters
_GOLD_LETTER = re.compile(r"(?i:(?:option|choice|answer)\s+)?\(?([A-Ja-j])\)?[.):]?")
_LETTER = re.compile(
    r"(?i:(?:the\s+)?(?:option|choice|answer|statement)\s+)?([(\[{]?)\s*([A-Ja-j])"
    r"((?:\s*[)\]}])?)(?!\w|'\w)"
)
_NOT_ALONE = re.compile(
    r"\s*(?:(?:,|/|&|and|or|,\s*and|,\s*or|and/or)\s*)\(?[A-Ja-j]\)?(?![\w'])|\s*(?:=|\+|\^|<|>|\*)"
)


def letter(text: str) -> str | None:
    """The option's letter, upper case, that `text` starts with; None if none or several."""
    head = _unfilled(normalize(text))
    m = _LETTER.match(head)
    if m is None:
        return None
    rest = re.sub(r"^\s+(?=[.,;:!])", "", head[m.end() :].lstrip("*_\"'`"))
    if _NOT_ALONE.match(rest):
        return None
    bracketed = bool(m[1] or m[3])
    named = m.start(2) > 0 and not m[1]  # "option B"
    ended = re.match(r"\s*$|[.,;:!]+(?=\s|$)", rest) is not None
    if bracketed or named or ended:
        return m[2].upper()
    # "A cat" has an article, "A - the cat" and "B because …" an option.
    if m[2].isupper() and re.match(rf"\s[-–—]\s|\s(?:{_REASON}|is)\b|\s*\(|\s*[\d$\\]", rest):
        return m[2]
    return None


_SEVERAL = re.compile(
    r"\d\s*[–—]\s*[-\d]|\b(?:or|and|to|between|from|either|neither|both|through)\b|,\s|\\pm"
    r"|[<>]|\\(?:[lg]eq?|neq?|[lg]t)(?![a-z])"
)


def several(text: str) -> bool:
    """Whether a statement that is no number speaks of more than one."""
    return _SEVERAL.search(normalize(text[: ends(text)[0]])) is not None


def gold_letter(text: str) -> str | None:
    """The letter, upper case, if the reference answer is one option's letter and no more."""
    m = _GOLD_LETTER.fullmatch(normalize(text))
    return m[1].upper() if m else None


# ---------------------------------------------------------------- words and formulas
def words(text: str) -> str:
    """The text without case, markup, an article in front, spaces around signs and a full stop."""
    text = normalize(text).casefold()
    text = re.sub(r"[*_`\"]|^'|'$", "", text).strip()
    text = re.sub(r"\s*([,:;/])\s*", r"\1", text)
    text = re.sub(r"^(?:the|an|a)\s+(?=\S)", "", text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return text.rstrip(".!? ").strip()


_UNIT = re.compile(
    r"(?<=[\w})])(?:\\[,;: ]|~|\s)*\\(?:text|textrm|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?"
    r"(?=(?:[\s$.]|\\[)\]])*$)"
)


def formula(text: str) -> str:
    r"""The formula without spaces and needless braces: \frac12 is \frac{1}{2}, x^{2} is x^2."""
    text = normalize(_UNIT.sub("", text)).strip("*_ ")
    text = text.replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"\{[bB]matrix\}", "{pmatrix}", text)  # brackets of a matrix are a choice
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(
        r"\\(sqrt|ln|log|sin|cos|tan)\s*(?:\{(\w)\}|\((\w)\)|(\w))", r"\\\1{\2\3\4}", text
    )
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return re.sub(r"\s+", "", text).rstrip(".,;")


def same_formula(said: str, gold: str) -> bool:
    """Whether both are written alike; "f(x) = x^2" is x^2."""
    said, gold = formula(said), formula(gold)
    if said != gold and "=" not in gold:
        said = re.sub(
            r"^(?:[A-Za-z](?:_\w)?(?:\([a-z](?:,[a-z])*\))?|\([a-z](?:,[a-z])+\))=", "", said
        )
    return said == gold


def is_words(gold: str) -> bool:
    """Whether the reference is words, which math-verify would take for a product of letters."""
    plain = normalize(gold)
    return (
        re.search(r"[^\W\d_]{3}|^(?:no|ok)\W?$", plain, re.IGNORECASE) is not None
        and re.search(r"[\\^_=<>{}+*]|sqrt|\bpi\b|\d\(", plain) is None
    )


def readings(text: str) -> list[str]:
    """The statement up to each place where it may end, with and without filler in front."""
    begin = len(text) - len(_unfilled(text))
    found = [text[begin:end] for end in ends(text) if end > begin]
    if aside := re.search(r"\s\(", text[begin:]):
        found.append(text[begin : begin + aside.start()])
    return list(dict.fromkeys([*found, *([text] if begin else [])]))


def formula_reading(text: str) -> str:
    """The formula that the statement starts with: between its borders where it has them."""
    text = _unfilled(text).strip()
    spans = _formulas(text)
    front = text[: spans[0][0]] if spans else ""
    if re.fullmatch(r"(?:[A-Za-z]+ ){1,4}", front) and not _HEDGE.search(front):
        return normalize(text[slice(*spans[0])])  # "the point $(1, 2)$"
    if spans and spans[0][0] == 0:
        last = spans[0][1]
        for a, b in spans[1:]:
            if not re.fullmatch(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*", text[last:a]):
                break
            last = b
        return normalize(text[:last])
    return normalize(text[: ends(text)[0]]).strip("*_ ")
