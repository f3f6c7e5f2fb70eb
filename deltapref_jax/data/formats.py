"""Rows of preference data in the formats that people bring, known by their columns.

    {prompt, chosen, rejected}         TRL paired; text or messages
    {chosen, rejected}                 the prompt is what both begin with (TRL implicit)
    {prompt, completion, label}        TRL unpaired; text or messages
    {prompt_ids, chosen_ids, rejected_ids}, {prompt_ids, completion_ids, label}      token ids

Labelled token ids may have a column `mismatched_prompt_ids`: the prompt behind which the row's
completion stands in KTO's baseline (null: the row has no mismatched row).
A `prompt` of text in front of whole conversations (UltraFeedback-binarized) and a list of messages
that the conversations repeat are understood too. `data.messages` lists the forms of messages. A
column `tools` may hold the JSON schemas of tools in OpenAI's form.
"""

import difflib
import json
import re
from collections.abc import Collection, Set
from typing import Any

import numpy as np

from deltapref_jax.config import ConfigError
from deltapref_jax.data.messages import QUESTION_PARTS, Row, content, unread_part
from deltapref_jax.text.preference import ANSWERS, Example

FORMATS = {  # columns that decide (the first match wins), then the other columns that are read
    "token ids, paired": (("prompt_ids", "chosen_ids", "rejected_ids"), ()),
    "token ids, unpaired": (("prompt_ids", "completion_ids", "label"), ("mismatched_prompt_ids",)),
    "paired": (("chosen", "rejected"), ("prompt", "tools", *QUESTION_PARTS)),
    "unpaired": (("prompt", "completion", "label"), ("tools", *QUESTION_PARTS)),
}
# Names that other formats give to what an answer replies to.
PROMPT_LIKE = {
    *("context", "conversation", "conversations", "dialogue", "history", "human", "input"),
    *("inputs", "instruction", "instructions", "messages", "post", "prefix", "problem"),
    *("prompt_text", "prompts", "query", "question", "questions", "request", "system"),
    *("system_message", "system_prompt", "text", "user", "user_input", "user_prompt"),
}


def format_of(path: str, columns: Collection[str]) -> str:
    """The name among `FORMATS` of rows with `columns`.

    Raises:
      ConfigError: no format has these columns; the sentence lists those of every format.
    """
    for name, (deciding, _) in FORMATS.items():
        if set(deciding) <= set(columns):
            return name
    near = [f"{c!r} is perhaps {k!r}" for c in sorted(columns) if (k := _near(c, columns))]
    hint = f" ({', '.join(near)})" if near else ""
    known = "; ".join(", ".join(deciding) for deciding, _ in FORMATS.values())
    raise ConfigError(
        f"{path} has the columns {', '.join(sorted(columns)) or '(none)'}, which are no preference "
        f"data; rename them to one of: {known}{hint}."
    )


_OTHER_NAMES = {
    **dict.fromkeys(("accepted", "preferred", "winner", "positive"), "chosen"),
    **dict.fromkeys(("dispreferred", "loser", "negative"), "rejected"),
}


def _near(column: str, columns: Collection[str]) -> str | None:
    """The column of a format that `column` nearly names, and that is not there itself."""
    names = {c for deciding, _ in FORMATS.values() for c in deciding if not c.endswith("_ids")}
    if column in names:
        return None
    parts = re.split(r"[^a-z]+", column.lower())
    found = [name for part in parts for name in (_OTHER_NAMES.get(part, part),) if name in names]
    found += difflib.get_close_matches(column.lower(), sorted(names), 1, 0.85)
    return next((name for name in found if name not in columns), None)


def columns_read(name: str) -> set[str]:
    """The columns of a format that are read."""
    return {*FORMATS[name][0], *FORMATS[name][1]}


def read_example(row: Row, name: str, vocab: int, columns: Set[str]) -> Example:
    """One row as an example.

    Args:
      row: by column.
      name: of the format.
      vocab: token ids must be below it; 0: any.
      columns: those that the source is known to have, besides the row's own.

    Raises:
      ValueError: a column is missing or holds something else; the sentence names it.
    """
    if name == "token ids, paired":
        sides = (_ids(row, "chosen_ids", vocab), _ids(row, "rejected_ids", vocab))
        return Example(_ids(row, "prompt_ids", vocab), sides)
    if name == "token ids, unpaired":
        completion = _ids(row, "completion_ids", vocab)
        prompt = _ids(row, "prompt_ids", vocab)
        other = _mismatched_prompt(row, prompt, vocab)
        return Example(prompt, (completion,), _label(row.get("label")), mismatched_prompt=other)
    completions: tuple[Any, ...]
    prompt, completions = _paired(row, columns) if name == "paired" else _unpaired(row)
    label = None if name == "paired" else _label(row.get("label"))
    _check_question(row, prompt)
    if isinstance(prompt, str):
        if "prompt" in row:
            _check_one_repeats(prompt, completions)
            completions = tuple(without_repeated(prompt, c) for c in completions)
    else:
        _check_answers(prompt, completions)
    return Example(prompt, completions, label, _tools(row, prompt))


def is_repeated(prompt: str, completion: str) -> bool:
    """Whether an answer of text begins with its whole prompt, which is no target then.

    A prompt of one or two words ("Hello") says nothing: an answer may begin with the same ones.
    """
    return len(prompt.split()) > 2 and completion.startswith(prompt)


def without_repeated(prompt: str, completion: str) -> str:
    """The answer behind the prompt, where it repeats that."""
    return completion[len(prompt) * is_repeated(prompt, completion) :]


def _check_one_repeats(prompt: str, completions: tuple[str, ...]) -> None:
    repeats = [is_repeated(prompt, completion) for completion in completions]
    if any(repeats) and not all(repeats):
        one, other = ("'chosen'", "'rejected'") if repeats[0] else ("'rejected'", "'chosen'")
        raise ValueError(
            f"{one} begins with the whole 'prompt' and {other} does not (take it out of {one})"
        )


def _check_answers(prompt: list[Row], completions: tuple[list[Row], ...]) -> None:
    """Refuses answers of messages that would be another turn, or in which nothing is a target."""
    for answer in completions:
        if prompt[-1]["role"] == answer[0]["role"] == "assistant":
            raise ValueError(
                "'prompt' ends with a message of the assistant, and the answer would be another "
                "turn behind it (write its words at the start of both answers)"
            )
        spoken = [message for message in answer if message["role"] == "assistant"]
        if all(message.get("weight") == 0 for message in spoken):
            raise ValueError(
                "an answer has no message of the assistant but those with 'weight' 0, so that "
                "nothing in it is a target"
            )


def without_nulls(value: Any) -> Any:
    """A row of Arrow or Parquet, where every struct has the keys of all structs of its column."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def is_empty(answer: Any) -> bool:
    """Whether an answer has no id, or neither a tool call nor more text than white space."""
    if isinstance(answer, str):
        return not answer.strip()
    if isinstance(answer, list):
        return not any(m["content"].strip() or m.get("tool_calls") for m in answer)
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


def _mismatched_prompt(row: Row, prompt: np.ndarray, vocab: int) -> np.ndarray | None:
    """The other prompt that a row brings for KTO's baseline; None where it brings none."""
    if row.get("mismatched_prompt_ids") is None:
        return None
    other = _ids(row, "mismatched_prompt_ids", vocab)
    if np.array_equal(other, prompt):
        raise ValueError(
            "'mismatched_prompt_ids' is the row's own prompt, and KTO's baseline needs another one"
        )
    return other


def _check_question(row: Row, prompt: Any) -> None:
    """Refuses a part of the question in a column of its own that the prompt does not hold."""
    asked = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    name = unread_part(row, asked, ())
    if name is None:
        return
    how = "write it into 'prompt'"
    if name.lower().startswith("system"):
        how = "give it as a first message of 'prompt'"
    elif name.lower() == "functions":
        how = "give it as 'tools'"
    elif name.lower().startswith("image"):
        how = "models of text see no image: leave out such rows"
    raise ValueError(f"{name!r} would not be read ({how}, or remove the column)")


def _tools(row: Row, prompt: Any) -> list[Row] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # so that tools of different arguments fit one column
        try:
            tools = json.loads(tools or "null")
        except ValueError as e:
            raise ValueError(f"'tools' is not JSON ({e})") from e
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is not a list of JSON schemas")
    if isinstance(prompt, str):
        raise ValueError("'tools' are given and 'prompt' is text, which has no place for them")
    return tools


def _answer(value: Any, column: str) -> list[Row]:
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{column!r} ends with a message of the {messages[-1]['role']} and must end with the "
            "assistant's"
        )
    return messages


_BEFORE_DIFFERS = "'chosen' and 'rejected' begin with different messages before the answer"


def _paired(row: Row, columns: Set[str]) -> tuple[Any, tuple[Any, Any]]:
    """The prompt, and the chosen and the rejected completion."""
    chosen, rejected = content(row, "chosen"), content(row, "rejected")
    prompt = None if row.get("prompt") is None else content(row, "prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of 'chosen' and 'rejected' is text and the other is messages")
    if isinstance(chosen, str) and prompt is None:
        return _split_text(chosen, rejected, columns | row.keys())
    if isinstance(chosen, str) and isinstance(prompt, str):
        return prompt, (chosen, rejected)
    chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and whole):
        n = _shared(chosen, rejected)
        if not n:
            if prompt is not None:
                raise ValueError(_BEFORE_DIFFERS)
            _check_unread(columns)
            raise ValueError(
                "the conversations in 'chosen' and 'rejected' share no first message, so there is "
                "no prompt"
            )
        if prompt is not None and not any(_same_text(m["content"], prompt) for m in chosen[:n]):
            raise ValueError(_differ("chosen"))
        before, after, answers = chosen[:n], chosen[:n], (chosen[n:], rejected[n:])
    else:
        before, first = _without_prompt(_asked(prompt), chosen, "chosen")
        after, second = _without_prompt(_asked(prompt), rejected, "rejected")
        answers = (first, second)
    if before != after:
        raise ValueError(_BEFORE_DIFFERS)
    if not all(answers):
        raise ValueError("'chosen' or 'rejected' has no answer behind the prompt")
    return before, answers


def _unpaired(row: Row) -> tuple[Any, tuple[Any]]:
    """The prompt, and the completion."""
    prompt, completion = content(row, "prompt"), content(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, (completion,)
    answer = _answer(completion, "completion")
    prompt, answer = _without_prompt(_asked(prompt), answer, "completion")
    if not answer:
        raise ValueError("'completion' has no answer behind the prompt")
    return prompt, (answer,)


def _asked(prompt: Any) -> list[Row]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _without_prompt(
    prompt: list[Row], messages: list[Row], column: str
) -> tuple[list[Row], list[Row]]:
    """Prompt and answer, where `messages` may repeat the prompt, even behind a system message."""
    systems = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    for i in range(systems + 1):
        end = i + len(prompt)
        if messages[i:end] == prompt:
            return messages[:end], messages[end:]
    goes_on = messages[0]["role"] == "assistant" or prompt[-1]["role"] == "assistant"
    if not goes_on or messages[0]["role"] == "system":
        raise ValueError(_differ(column))
    return prompt, messages


def _differ(column: str) -> str:
    return (
        f"'prompt' and the first messages of {column!r} differ (make them equal, or leave one of "
        "them out)"
    )


def _same_text(content: str, prompt: str) -> bool:
    """Whether a message is the prompt, or a part of it where several turns were joined."""
    return prompt.strip() in content or (content.strip() != "" and content.strip() in prompt)


def _check_unread(columns: Set[str]) -> None:
    """Refuses a source without a prompt that has a column which may be one."""
    unread = sorted(c for c in columns - {"prompt"} if c.lower() in PROMPT_LIKE | {"prompt"})
    if unread:
        raise ValueError(
            f"'prompt' is missing, and {', '.join(map(repr, unread))} would not be read (rename "
            "the question's column to 'prompt', or remove them if the answers begin with the "
            "question)"
        )


def _split_text(chosen: str, rejected: str, columns: Set[str]) -> tuple[str, tuple[str, str]]:
    """Answers of text that begin with their prompt, in a source without a column for it."""
    if "prompt" in columns:
        raise ValueError("'prompt' is missing")
    _check_unread(columns)
    n = _shared(chosen, rejected)
    if not chosen[:n].strip():
        raise ValueError(
            "'prompt' is missing, and 'chosen' and 'rejected' begin with no text that they share"
        )
    # Behind the last name of the assistant stand words of the answers, though they share them.
    if spoken := list(ANSWERS.finditer(chosen, 0, n)):
        n = spoken[-1].end()
    return chosen[:n], (chosen[n:], rejected[n:])


def _shared(chosen: Any, rejected: Any) -> int:
    """Length of what both begin with, in characters or messages, as in TRL's `extract_prompt`.

    Something of each stays, and a space before the border belongs to the completions.
    """
    most = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    if n > 0 and isinstance(chosen, str) and chosen[n] != rejected[n] and chosen[n - 1] == " ":
        n -= 1
    return n
