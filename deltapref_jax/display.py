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


COUNTS = {
    "prompts": {
        "empty": "rows without a question, dropped",
        "duplicate": "prompts that repeat another, dropped",
        "overlap_exact": "prompts that are questions of a suite, dropped",
        "overlap_13_gram": "prompts that share 13 words in a row with a suite, dropped",
    },
    "sample": {"truncated": "traces cut at max_tokens"},
    "evaluate": {"truncated": "answers cut at max_tokens, which count as wrong"},
    "audit": {
        "uneditable": "edits that a trace has no place for, left out",
        "too_long": "corrupted texts too long for the judge's rows, left out",
    },
    "retest": {"too_long": "pairs too long for the judge's rows under another wording, left out"},
    "verify": {"unfinished": "unfinished traces, which count as wrong"},
    "score": {"too_long": "sequences longer than row_length, not scored"},
    "pair": {
        "dropped_unfinished": "prompts without a finished trace of every generator, dropped",
        "dropped_identical": "prompts whose traces have one text, dropped",
        "dropped_tie": "prompts whose traces the judge rates alike, dropped",
        "dropped_stratum": "prompts whose pair is of another stratum, dropped",
        "dropped_sample": "prompts without a right, or wrong, sample as the arm wants it, dropped",
        "dropped_unshared": "prompts without a pair in every stratum that is shared, dropped",
        "dropped_unscored": "pairs too long for the reference that ranks them, dropped",
        "dropped_balance": "pairs that balance over the rungs leaves out",
        "tied_samples": "traces drawn by seed from samples that are equally good",
        "tied_at_cut": "pairs as good as the last one kept, drawn by seed",
    },
    "train": {
        "dropped_long": "examples with a sequence that is too long, left out",
        "dropped_mismatched": "mismatched rows too long or not given, left out",
    },
    "tokens": {
        "read": "rows read",
        "groups": "trained on",
        "same": "of them pairs whose two answers are the same",
        "shared_prompt": "without 'prompt', which is what both answers begin with",
        "empty_prompt": "an empty prompt, kept",
        "merged_prompt": "no token of the prompt stays: it merges with the answer, kept",
        "repeated_prompt": "answers that begin with the whole 'prompt', which is taken out of them",
        "echoed_prompt": "an answer that begins with a prompt of one or two words, kept as it is",
        "text_among_messages": "rows of text (no chat template) in a file that has messages too",
        "one_label": "examples, and all of them have the same label",
        "empty": "an empty answer, dropped",
        "too_long": "longer than row_length, dropped",
        "truncated": "sequences cut to row_length",
        "truncated_to_nothing": "no answer within row_length, dropped",
        "unscored": "nothing to score, dropped",
        "undesirable": "not desirable, left out (SFT)",
        "prompt_not_prefix": "template no prefix, tokenised apart",
        "masked_turns": "tokens of user turns (or of weight 0) inside answers, not trained on",
        "dropped_mismatched": "mismatched rows too long or not given, left out",
        "truncated_mismatched": "mismatched rows cut to row_length",
    },
}
"""Counts of a manifest in words, by stage: what was dropped, cut or read in a special way."""
