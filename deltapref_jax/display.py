"""Text of a config, a file or a model, made fit to be shown: on a terminal, or in XML and HTML."""

import re

# C0 without tab and newline, DEL and C1; marks that change the direction of text; surrogates, which
# no encoding can write.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What XML 1.0 (section 2.2, "Char") does not allow in any form, not even escaped.
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str) -> str:
    r"""Returns `text` with what would steer a terminal written as Python does, such as `\x1b`."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def count(number: float, noun: str) -> str:
    """A number of things, such as "1 step" and "1,200 steps"."""
    return f"{number:,.0f} {noun}{'s' * (number != 1)}"


def xml_text(text: str) -> str:
    """Returns `text` with what XML does not allow replaced by U+FFFD; it is not escaped."""
    return _NOT_XML.sub("\ufffd", text)
