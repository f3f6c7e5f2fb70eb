"""The final answer of a trace."""

import re

_LINE = re.compile(r"\banswer\s*(?:is\b\s*[:=]?|[:=])\s*(.+)", re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _boxed(text: str) -> str:
    """Contents of the last \\boxed{...}, braces balanced; "" if there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len(r"\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return ""


def final_answer(text: str) -> str:
    r"""The last `<answer>…</answer>`, else `\boxed{…}`, else "Answer: …", else the last number.

    "The answer is …" and "answer = …" count as "Answer: …". A sentence's full stop and markdown's
    asterisks around the answer are taken off; "" if there is nothing.
    """
    if tags := _TAG.findall(text):
        return tags[-1].strip()
    if boxed := _boxed(text):
        return boxed.strip()
    if lines := _LINE.findall(text):
        return lines[-1].strip().strip("*").rstrip(".").strip("* ")
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""
