r"""What a trace states as its answer.

In this order: the last `<answer>…</answer>`, the last `\boxed{…}`, a last line "#### …" (GSM8K),
the last "Answer: …" or "The answer is …", the last number. Thoughts (`<think>…</think>`) are no
part of a trace's answer. Every step takes time linear in the text.
"""

import re
from typing import NamedTuple

_MAX_STATEMENT = 2000  # characters
_THINK = "(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis)"
_THOUGHT_ENDS = re.compile(
    rf"</{_THINK}>|<\|end_of_thought\|>|◁/think▷|(?-i:\[/THINK\])", re.IGNORECASE
)
_THOUGHT_BEGINS = re.compile(
    rf"<{_THINK}>|<\|begin_of_thought\|>|◁think▷|(?-i:\[THINK\])", re.IGNORECASE
)
_TAG_BEGINS = re.compile(r"<(?:final[_ ])?answer>|(?-i:\[ANSWER\])", re.IGNORECASE)
_TAG_ENDS = re.compile(r"</(?:final[_ ])?answer>|(?-i:\[/ANSWER\])", re.IGNORECASE)
_CONTROL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</s>|<end_of_turn>")
_REJECTED = re.compile(r"(?:\bnot|n't be|\binstead of|\brather than)[\s$\\(]{0,9}\Z")
_REVISED = re.compile(
    r"\b(?:wait|hold on|oops|sorry|correction|i made (?:a|an) \w{0,12} ?(?:mistake|error)|"
    r"(?:that|this) (?:is|was) (?:wrong|incorrect|not right))\b",
    re.IGNORECASE,
)
# "Wait, no. It's 7." corrects what was announced before, where the number is all that is said.
_CORRECTED = re.compile(
    r"\b(?:it's|it is|it should be|that's|i mean|make that)\s{1,3}"
    r"(\$?-?\d[\d,]{0,20}(?:\.\d{1,20})?\$?)(?=[.!]?\s*(?:\Z|\n))",
    re.IGNORECASE,
)
_INVERTED = re.compile(  # "Thus 5 is the answer"
    r"(?:\A|\n|[.!:]\s|\b(?:so|thus|hence|therefore),?\s)[ \t*_]{0,9}"
    r"(\$?-?\d[\d,]{0,20}(?:\.\d{1,20})?\$?)[*_]{0,2} is the (?:final |correct |right )?answer\b",
    re.IGNORECASE,
)
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s{0,9}\{)|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"[\s$,;()\[\]\\]{0,20}(?:\\text\{)?[\s$,]{0,9}(and|or|,)?[\s$,}()\[\]\\]{0,20}"
)
_HASHES = re.compile(r"^####[ \t]{1,9}(\S[^\n]{0,99})$", re.MULTILINE)
_VERB = (
    r"(?:is|are|was|would be|should be|must be|will be|equals|comes (?:out )?to|came (?:out )?to|"
    r"turns out to be|works out to)\b(?:[ \t]{0,9}[:=])?"
)
_MARKER = re.compile(
    # "Answer:", "**Answer** =", "answer (in cm):"
    r"\banswers?\b[*_\"' \t]{0,9}(?:\([^()\n]{0,40}\)[*_ \t]{0,9})?[:=]"
    # "the answer is", "the answer to the question is:"
    r"|\banswers?\b(?:\s{1,9}(?:to|for|of|in|here|that|we|i|choice|option)\b[^\n.:=?!]{0,80}?)?"
    rf"[*_ \t]{{0,9}}(?:\b{_VERB}|:)"
    rf"|\b(?:correct|right|best) (?:option|choice|statement)[*_ \t]{{0,9}}(?:\b{_VERB}|:)"
    # "we get the answer 12", "Ans: 12", "I choose (C)", and "hence C." at the end.
    r"|(?<!is )\b(?:the|an) answer(?=[ \t]{1,9}\$?-?\d)|\[\[(?=[A-J]\]\])|\bans[.:=]{1,2}(?=\s)"
    r"|\b(?:I|we)(?:'ll| will| would)? (?:choose|pick|select|go with)\b"
    r"(?= (?:option |choice |answer )?[*(]{0,3}[A-J]\b)"
    r"|\b(?:so|hence|thus|therefore),?(?= [*(]{0,3}[A-J][).*]{0,3}\s{0,9}\Z)"
    # Other languages, such as "答案是42", "故选B", "Ответ: 42" and "Die Antwort ist 42".
    r"|(?:答案|答え|정답)[* ]{0,9}(?:是|为|為|は|은|는|选|選|[:：])[:： ]{0,9}"
    r"|(?:故|应|所以|因此)选(?:择)?[:： ]{0,9}(?=[A-J])"
    r"|(?:\b(?:ответ|respuesta|réponse|antwort|resposta|risposta|đáp án)|الإجابة|الجواب|उत्तर)"
    r"(?: (?:finale?|correct[ae]|final))?[* ]{0,9}"
    r"(?:\b(?:es|est|ist|é|è|là)\b|هي|है|هو|[:=])"
    # A heading or a line of its own.
    r"|^[ \t#*_>-]{0,9}(?:the )?(?:final |correct )?answer[ \t*_:]{0,9}$",
    re.IGNORECASE | re.MULTILINE,
)
_SPACE = re.compile(r"[\s*_>]*")
_NO_STATEMENT = re.compile(
    r"not\s+(?:[-$\\(\d]|[A-J]\b|correct|right|clear|known|yet|quite|just|simply|the|an?)(?!\w)"
    r"|not\s+[-$\\(]?\d|(?:wrong|incorrect|unclear|in|within|as a|given in|to be|expected to)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−])?(?:\\[dt]?frac\{-?\d+\}\{\d+\}|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"(?:/\d+|[-–]\d+(?:\.\d+)?|e[-+]?\d+\b)?)"
    r"(?: ?(?:×|x|\\times|\\cdot|\*) ?10(?=[\^⁰¹²³⁴-⁹⁻]))?(?:\^\{?[-−]?\d+\}?|[⁰¹²³⁴-⁹⁻]+)?"
    r"(?:\\?%|[ ](?:thousand|million|billion|trillion)\b)?"
)
_APPROXIMATION = re.compile(
    r"(?:,? {0,3}\bor {1,3}(?:about|approximately|roughly)|[≈]|\\approx)[ $\\(]{0,5}[\d.,]+"
)
_FORMULA = re.compile(
    r"\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,2000}\$|\\\([^\n]{1,500}?\\\)|\\\[.{1,500}?\\\]", re.DOTALL
)


class Statement(NamedTuple):
    """What a trace states, and how."""

    text: str  # "" if there is nothing
    how: str  # "box", "tags", "line": more words may follow; "number": the last one of the text


def without_thoughts(text: str) -> str:
    """The text behind the last thought, and before one that does not end, without end tokens."""
    begin = 0
    for end in _THOUGHT_ENDS.finditer(text):
        begin = end.end()
    text = text[begin:]
    unended = _THOUGHT_BEGINS.search(text)
    return _CONTROL.sub(" ", text[: unended.start()] if unended else text)


def _tagged(text: str) -> str | None:
    ends = [m.start() for m in _TAG_ENDS.finditer(text)]
    begins = [m.end() for m in _TAG_BEGINS.finditer(text)]
    if ends and (before := [b for b in begins if b <= ends[-1]]):
        return text[before[-1] : ends[-1]]
    if begins and not ends:  # the tag is left open
        return text[begins[-1] :]
    return None


def _solution(text: str) -> str:
    """What stands in the last <solution>…</solution>, or the whole text."""
    end = text.rfind("</solution>")
    begin = text.rfind("<solution>", 0, max(end, 0)) + len("<solution>")
    inside = text[begin:end] if end > begin >= len("<solution>") else ""
    return inside if inside.strip() else text


def _boxed(text: str) -> str:
    r"""Contents of the last \boxed{…}; two that "and", "or" or a comma joins are taken together."""
    stack: list[
        tuple[int, int]
    ] = []  # (start of the box, -1 for a plain brace; start of what is in it)
    boxes: list[tuple[int, int, int]] = []  # start, start of the contents, end of the contents
    for token in _BRACES.finditer(text):
        if token[1]:
            stack.append((token.start(), token.end()))
        elif token[0] == "{":
            stack.append((-1, token.end()))
        elif token[0] == "}" and stack:
            start, inside = stack.pop()
            if start >= 0:
                while boxes and boxes[-1][0] > start:  # a box inside this one
                    boxes.pop()
                boxes.append((start, inside, token.start()))
    open_boxes = [inside for start, inside in stack if start >= 0]
    if open_boxes and (not boxes or open_boxes[-1] > boxes[-1][2]):
        line = text[open_boxes[-1] : open_boxes[-1] + _MAX_STATEMENT].partition("\n")[0].strip()
        if line.strip("$\\ "):
            return line
    if not boxes:
        return ""
    while len(boxes) > 1 and _REJECTED.search(text, max(0, boxes[-1][0] - 40), boxes[-1][0]):
        boxes.pop()  # "5, not 7"
    first = len(boxes) - 1
    while first and (
        between := _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0])
    ):
        if not between[1] and "," not in between[0]:
            break
        first -= 1
    if first < len(boxes) - 1:
        return text[boxes[first][0] : boxes[-1][2] + 1]
    return text[boxes[-1][1] : boxes[-1][2]]


def _line(text: str, begin: int) -> str:
    """What stands behind a marker: the rest of its line or the next one, or a formula of lines."""
    begin = _SPACE.match(text, begin).end()  # type: ignore[union-attr]
    for opening, closing in ((r"\[", r"\]"), ("$$", "$$")):
        if text.startswith(opening, begin):
            end = text.find(closing, begin + 2, begin + _MAX_STATEMENT)
            return text[begin : end + 2] if end >= 0 else text[begin : begin + _MAX_STATEMENT]
    if text.startswith("```", begin):  # a code block
        inside = text[begin + 3 : begin + 3 + _MAX_STATEMENT].partition("```")[0]
        return inside.partition("\n")[2].strip() or inside.strip()
    end = text.find("\n", begin, begin + _MAX_STATEMENT)
    return text[begin : end if end >= 0 else begin + _MAX_STATEMENT]


def _said(text: str) -> str:
    """What the last marker that states something states."""
    for marker in reversed(list(_MARKER.finditer(text))):
        line = _line(text, marker.end()).strip().rstrip("*_")
        if line.strip("*_.:$ ") and not _NO_STATEMENT.match(line):
            revised = _REVISED.search(text, marker.end())
            corrected = _CORRECTED.search(text, revised.end()) if revised else None
            return corrected[1] if corrected else line
    inverted = _INVERTED.findall(text)
    return inverted[-1] if inverted else ""


def statement(text: str) -> Statement:
    """What the trace states as its answer."""
    text = without_thoughts(text)
    tagged = _tagged(text)
    if tagged is not None:
        if boxed := _boxed(tagged).strip():
            return Statement(boxed, "box")
        return Statement((_said(tagged) or tagged).strip(), "tags")
    text = _solution(text)
    if boxed := _boxed(text).strip():
        rest = text[max(text.rfind("\\boxed"), text.rfind("\\fbox")) :]
        while boxed.startswith("\\boxed{") and boxed == f"\\boxed{{{_boxed(boxed)}}}":
            boxed = _boxed(boxed)
        revised = _REVISED.search(rest)
        if revised and (line := _said(rest[revised.end() :])):
            return Statement(line, "line")
        return Statement(boxed, "box")
    hashes = _HASHES.findall(text)  # as a heading they announce no number
    if hashes and re.match(r"[-−$\\]{0,3}\d", hashes[-1]):
        return Statement(hashes[-1].strip(), "line")
    if line := _said(text):
        return Statement(line, "line")
    exact = _APPROXIMATION.sub("", text)
    numbers = _numbers(exact) or _numbers(text)
    return Statement(numbers[-1] if numbers else "", "number")


def _numbers(text: str) -> list[str]:
    """Numbers in the text, without those that "not" stands before."""
    return [
        m[0]
        for m in _NUMBER.finditer(text)
        if not _REJECTED.search(text, max(0, m.start() - 40), m.start())
    ]


def last_formula(text: str) -> str:
    """The last formula between dollars or LaTeX's borders; "" if there is none."""
    formulas = _FORMULA.findall(without_thoughts(text))
    return formulas[-1] if formulas else ""


def final_answer(text: str) -> str:
    r"""What the trace states, without a sentence's full stop and markdown's asterisks around it.

    Tags' contents are given as they are.
    """
    tagged = _tagged(without_thoughts(text))
    if tagged is not None:
        return tagged.strip()
    return statement(text).text.strip().strip("*").rstrip(".").strip("* ")
