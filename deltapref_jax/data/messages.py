"""Messages in the forms in which data sets store them, as lists of {"role", "content"}.

Read are a list of messages, one message alone, one list per key (as Arrow stores them in some
files), JSON text of these, content in parts of text, and the names of ShareGPT ("from" and "value",
"human" and "gpt"). Messages may hold tool calls in OpenAI's form, and `weight` 0 where the
assistant's words are no target, as in OpenAI's files for fine-tuning.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

Row = dict[str, Any]

_ROLES = {  # other names of the roles that chat templates know
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("ai", "assistant", "bot", "chatgpt", "gpt", "model"), "assistant"),
    **{"system": "system", "tool": "tool", "observation": "tool"},
    **{name: name for name in ("developer", "function", "ipython", "environment")},
}
WHOLE_QUESTIONS = {"question", "problem", "query", "instruction"}
"""Columns that may hold the question in place of `prompt`."""
QUESTION_PARTS = WHOLE_QUESTIONS | {
    *("system", "system_prompt", "system_message", "functions", "context", "passage", "input"),
    *("history", "image", "images", "choices", "options", "endings"),
}
"""Columns that are a part of the question, and that neither a pair file nor a study reads."""
_KEYS = ({"role", "content"}, {"from", "value"})
_STORED = re.compile(r"\s*(?:\[\s*)?\{\s*[\"'](?:role|content|from|value)[\"']\s*:")


def content(row: Row, column: str) -> Any:
    """The text, or the list of messages with text, in a column.

    Raises:
      ValueError: the column is missing or holds something else; the sentence names it.
    """
    value = row.get(column)
    if isinstance(value, str):
        value = _stored(value, column)
        if isinstance(value, str):
            return value
    if isinstance(value, dict) and any(keys <= value.keys() for keys in _KEYS):
        value = [value] if _is_message(value) else _by_key(value, column)
    if not isinstance(value, list | tuple) or not value:
        what = "missing" if value is None else "neither text nor a list of messages"
        raise ValueError(f"{column!r} is {what}")
    return [_message(message, column) for message in value]


def unread_part(row: Row, asked: str, read: Collection[str]) -> str | None:
    """The first column of `QUESTION_PARTS` that holds something which `asked` does not hold.

    Args:
      row: by column.
      asked: the text of the prompt.
      read: columns that are read, which are passed over.
    """
    for name in sorted(row):
        if name in read or name.lower() not in QUESTION_PARTS:
            continue
        if any(text.strip() not in asked for text in _texts(row[name])):
            return name
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a column; of messages their contents, and of ARC's choices their texts."""
    if isinstance(value, dict):
        named = [value[key] for key in ("content", "value", "text") if key in value]
        value = named or list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif value is not None and value is not False and str(value).strip():
        yield str(value)


def _by_key(value: Row, column: str) -> list[Row]:
    """Messages of which there is one list per key."""
    if not all(isinstance(items, list | tuple) for items in value.values()):
        raise ValueError(f"{column!r} has a message without 'role' and 'content' as text")
    if len({len(items) for items in value.values()}) > 1:
        raise ValueError(f"{column!r} has messages with lists of different lengths")
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _is_message(value: Any) -> bool:
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return isinstance(role, str)


def _stored(text: str, column: str) -> Any:
    """Messages that are stored as JSON text; other text as it is.

    Raises:
      ValueError: a list of messages is written in another way, such as by Python's `str`.
    """
    if not _STORED.match(text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip().startswith("["):
            raise ValueError(
                f"{column!r} has a list of messages as text that is not JSON (store a list, or "
                "write it with json.dumps)"
            ) from None
        return text
    messages = value if isinstance(value, list) else [value]
    return value if all(_is_message(m) and _role(m) in _ROLES for m in messages) else text


def _role(message: Row) -> str:
    return str(message.get("role", message.get("from"))).lower()


def _message(message: Any, column: str) -> Row:
    """A message without fields that are null; the content of a tool call may be null."""
    if not isinstance(message, dict):
        message = {}
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and {"from", "value"} <= message.keys():
        renamed = {"from": "role", "value": "content"}
        message = {renamed.get(key, key): value for key, value in message.items()}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"{column!r} has 'tool_calls' that are no list of objects")
        message = {"content": ""} | message | {"tool_calls": [_call(call) for call in calls]}
    elif message.get("function_call"):
        message = {"content": ""} | message
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(map(_is_text, parts)):
        message = message | {"content": "".join(part["text"] for part in parts)}
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ValueError(f"{column!r} has a message without 'role' and 'content' as text")
    if message["role"] == "function_call":
        raise ValueError(
            f"{column!r} has a message of the role 'function_call' (give 'tool_calls')"
        )
    if _role(message) not in _ROLES:
        raise ValueError(
            f"{column!r} has a message of the role {message['role']!r}, which is none of "
            f"{', '.join(dict.fromkeys(_ROLES.values()))}"
        )
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{column!r} has a message with 'weight' {message['weight']!r}, which must be 0 or 1"
        )
    return message | {"role": _ROLES[_role(message)]}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _call(call: Row) -> Row:
    """A tool call with its arguments as an object, for templates; OpenAI writes them as JSON."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return call | {"arguments": arguments}
