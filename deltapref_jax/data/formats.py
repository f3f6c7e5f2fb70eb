"""Rows of preference data in the formats that people bring, known by their columns.

    {prompt, chosen, rejected}         TRL paired; text or messages
    {chosen, rejected}                 the prompt is what both begin with (TRL implicit)
    {prompt, completion, label}        TRL unpaired; text or messages
    {prompt_ids, chosen_ids, rejected_ids}, {prompt_ids, completion_ids, label}      token ids

A `prompt` of text in front of whole conversations (UltraFeedback-binarized) and a list of messages
that both conversations repeat are understood too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.config import ConfigError

FORMATS = {  # columns that decide (the first match wins), then the other columns that are read
    "token ids, paired": (("prompt_ids", "chosen_ids", "rejected_ids"), ()),
    "token ids, unpaired": (("prompt_ids", "completion_ids", "label"), ()),
    "paired": (("chosen", "rejected"), ("prompt",)),
    "unpaired": (("prompt", "completion", "label"), ()),
}
Row = dict[str, Any]
Content = Any  # text, a list of messages, or an int32 array of token ids


class Example(NamedTuple):
    """One row: a prompt with a chosen and a rejected completion, or with one that is labelled."""

    prompt: Content
    completions: tuple[Content, ...]
    label: bool | None  # None for a pair

    @property
    def labels(self) -> tuple[bool, ...]:
        """Whether each completion is desirable."""
        return (True, False) if self.label is None else (self.label,)


def format_of(path: str, columns: Sequence[str]) -> str:
    """The name among `FORMATS` of rows with `columns`.

    Raises:
      ConfigError: no format has these columns; the sentence lists those of every format.
    """
    for name, (deciding, _) in FORMATS.items():
        if set(deciding) <= set(columns):
            return name
    known = "; ".join(", ".join(deciding) for deciding, _ in FORMATS.values())
    raise ConfigError(
        f"{path} has the columns {', '.join(sorted(columns)) or '(none)'}, which are no preference "
        f"data; rename them to one of: {known}."
    )


def columns_read(name: str) -> set[str]:
    """The columns of a format that are read."""
    return {*FORMATS[name][0], *FORMATS[name][1]}


def read_example(row: Row, name: str, vocab: int) -> Example:
    """One row of format `name`; token ids must be below `vocab` (0: any).

    Raises:
      ValueError: a column is missing or holds something else; the sentence names it.
    """
    if name == "token ids, paired":
        sides = (_ids(row, "chosen_ids", vocab), _ids(row, "rejected_ids", vocab))
        return Example(_ids(row, "prompt_ids", vocab), sides, None)
    if name == "token ids, unpaired":
        completion = _ids(row, "completion_ids", vocab)
        return Example(_ids(row, "prompt_ids", vocab), (completion,), _label(row.get("label")))
    return _paired(row) if name == "paired" else _unpaired(row)


def is_empty(answer: Content) -> bool:
    """Whether an answer has no id or nothing but white space: at most an end token is a target."""
    if isinstance(answer, str):
        return not answer.strip()
    if isinstance(answer, list):
        return not any(message["content"].strip() for message in answer)
    return not len(answer)


def _label(value: Any) -> bool:
    if value in (True, False):  # 0 and 1 are equal to them
        return bool(value)
    raise ValueError(f"'label' is {value!r} and must be true or false")


def _ids(row: Row, column: str, vocab: int) -> np.ndarray:
    value = row.get(column)
    try:
        array = np.asarray(value if value is not None else "missing")
        fine = not len(array) or array.dtype.kind in "iu"
    except (ValueError, TypeError):
        fine = False
    if (
        not fine
        or array.ndim != 1
        or (len(array) and (array.min() < 0 or (vocab and array.max() >= vocab)))
    ):
        below = f" from 0 to {vocab - 1}, the model's vocabulary" if vocab else ""
        raise ValueError(f"{column!r} is not a list of token ids{below}")
    return array.astype(np.int32)


def _content(row: Row, column: str) -> Any:
    """The text, or the list of messages with text, in a column."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        # Arrow stores a list of messages as one list per key in some files.
        value = [
            {"role": r, "content": c} for r, c in zip(value["role"], value["content"], strict=True)
        ]
    if not isinstance(value, list | tuple) or not value:
        what = "missing" if value is None else "neither text nor a list of messages"
        raise ValueError(f"{column!r} is {what}")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError(f"{column!r} has a message without 'role' and 'content' as text")
    # Parquet gives every message the keys of all messages, null where it has none.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _answer(value: Any, column: str) -> list[Row]:
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{column!r} ends with a message of the {messages[-1]['role']} and must end with the "
            "assistant's"
        )
    return messages


def _paired(row: Row) -> Example:
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    prompt = None if row.get("prompt") is None else _content(row, "prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of 'chosen' and 'rejected' is text and the other is messages")
    if isinstance(chosen, str) and not isinstance(prompt, list):
        if prompt is None and "prompt" in row:
            raise ValueError("'prompt' is missing")
        border = _shared(chosen, rejected) if prompt is None else 0
        return Example(
            prompt if prompt is not None else chosen[:border],
            (chosen[border:], rejected[border:]),
            None,
        )
    chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    whole = chosen[0]["role"] != "assistant"
    if isinstance(prompt, str) and not whole:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        repeated = whole and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
        n = len(prompt) if repeated else 0
    else:  # whole conversations; a prompt of text repeats their question
        n = _shared(chosen, rejected)
        prompt = chosen[:n]
        if not n:
            raise ValueError(
                "the conversations in 'chosen' and 'rejected' share no first message, so there is "
                "no prompt"
            )
    if n == min(len(chosen), len(rejected)):
        raise ValueError("'chosen' or 'rejected' has no answer behind the prompt")
    return Example(prompt, (chosen[n:], rejected[n:]), None)


def _shared(chosen: Any, rejected: Any) -> int:
    """Length of what both begin with, in characters or messages, as in TRL's `extract_prompt`.

    Something of each stays, and a space before the border belongs to the completions.
    """
    most = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    if n > 0 and isinstance(chosen, str) and chosen[n] != rejected[n] and chosen[n - 1] == " ":
        n -= 1
    return n


def _unpaired(row: Row) -> Example:
    prompt, completion = _content(row, "prompt"), _content(row, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = _answer(completion, "completion")
    return Example(prompt, (completion,), _label(row.get("label")))
