"""Tokens of preference data that others wrote: a prompt and its completions, text or messages.

The tokens are those of TRL 1.16: prompt and completion are tokenised as one text, and the
completion begins where its tokens and those of the prompt alone differ, at the same place on the
two sides of a pair. (Traces of this project's own generators are tokenised at the fixed border
where they were sampled, see `template`; a file has no such border.) Where TRL differs:

- There is one BOS at most: a text that begins with the BOS that the tokenizer adds gets no other.
- There is always one end token. TRL leaves it out where the template writes none, and doubles it
  where the text ends with another end token than `eos_token`, with the end token and white space,
  or where the message itself holds it.
- Nothing that the tokenizer's post-processor puts behind text (an EOS of its own) moves the border.
- Some templates render the prompt differently once an answer follows, or rewrite the answer
  (thinking templates drop the thoughts), which gives a context that the model never meets when it
  samples. Then the prompt is rendered alone, and the answer follows it as it was written; such rows
  are counted (`prompt_not_prefix`).
- In an answer of several messages the assistant's turns are targets, with their ends, and what the
  user says, messages with `weight` 0 and the headers of the turns are not. The same holds for text
  whose prompt names its turns as HH-RLHF does ("\\n\\nHuman:", "\\n\\nAssistant:").
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.text.template import ChatTokenizer, Messages, added_bos

Ids = np.ndarray
Spans = list[tuple[int, int]]  # start and stop, in characters

ANSWERS = re.compile(r"(?:\A\s*|\n\n)Assistant:")
"""Where the assistant begins to speak in a conversation that is stored as one text."""
_ASKS = re.compile(r"(?:\A\s*|\n\n)Human:")


class Example(NamedTuple):
    """A prompt with a chosen and a rejected completion, or with one that is labelled."""

    prompt: Any  # text, messages, or int32 token ids, as are the completions
    completions: tuple[Any, ...]
    label: bool | None = None  # of a single completion: whether it is desirable
    tools: list[dict[str, Any]] | None = None  # JSON schemas for the template
    # int32 token ids that the completion follows in KTO's baseline; None: the row brings none
    mismatched_prompt: np.ndarray | None = None

    @property
    def labels(self) -> tuple[bool, ...]:
        """Whether each completion is desirable."""
        return (True, False) if self.label is None else (self.label,)


class Tokens(NamedTuple):
    """One prompt with one completion (an example) or two (a pair)."""

    prompt: Ids  # int32
    completions: tuple[Ids, ...]  # int32, the end token included
    prompt_not_prefix: bool = False  # prompt and completions were tokenised apart
    # bool, for each token of a completion: whether it is a target. None: all are; (): all are None.
    scored: tuple[np.ndarray | None, ...] = ()


class _Rendered(NamedTuple):
    prompt: str
    wholes: tuple[str, ...]  # prompt and completion; the completion alone where `apart`
    turns: tuple[
        Spans | None, ...
    ]  # what is scored of each of `wholes`; None: all behind the prompt
    apart: bool = False
    bos: bool = False  # the tokenizer adds its BOS


def tokenise(text: ChatTokenizer, examples: Sequence[tuple[Any, ...]]) -> list[Tokens]:
    """Ids of examples of text or messages, tokenised in one call.

    Args:
      text: tokenises and renders.
      examples: each an `Example`, or its leading fields.

    Raises:
      ConfigError: there are messages, and the tokenizer has no chat template.
      ValueError: the template cannot render the messages, an answer of several messages, or tools.
    """
    rendered = [
        _text(text, e.prompt, e.completions) if isinstance(e.prompt, str) else _chat(text, e)
        for e in (Example(*fields) for fields in examples)
    ]
    encoded = iter(text.encode([part for r in rendered for part in (r.prompt, *r.wholes)]))
    bos = added_bos(text.tokenizer)
    return [
        _split(r, [next(encoded) for _ in range(1 + len(r.wholes))], bos * r.bos, text)
        for r in rendered
    ]


def _split(
    rendered: _Rendered, encoded: list[list[int]], bos: list[int], text: ChatTokenizer
) -> Tokens:
    prompt, *wholes = (np.asarray([*bos, *ids], np.int32) for ids in encoded)
    if rendered.apart:
        alone = text.encode_continued(list(rendered.wholes))
        return Tokens(prompt, tuple(np.asarray(ids, np.int32) for ids in alone), True)
    border = min(_common(prompt, whole) for whole in wholes)
    masks = (
        None if turns is None else _mask(text.offsets(whole), turns)[border - len(bos) :]
        for whole, turns in zip(rendered.wholes, rendered.turns, strict=True)
    )
    return Tokens(
        prompt[:border],
        tuple(whole[border:] for whole in wholes),
        scored=tuple(None if mask is None or mask.all() else mask for mask in masks),
    )


def _common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _mask(offsets: np.ndarray, turns: Spans) -> np.ndarray:
    """Which tokens are scored; a token over the border of a turn goes by its last character."""
    # Byte-level tokenizers trim white space from offsets, so that only the end of a span is sure.
    last = np.maximum(offsets[:, 1] - 1, 0)
    return np.logical_or.reduce([(start <= last) & (last < stop) for start, stop in turns])


def _ends(text: ChatTokenizer) -> list[str]:
    """End tokens as they may stand in text; ordinary tokens, such as a line end, are left out."""
    special = [i for i in text.end_ids[1:] if i in text.tokenizer.added_tokens_decoder]
    return [str(text.tokenizer.convert_ids_to_tokens(i)) for i in (text.end_ids[0], *special)]


def _text(text: ChatTokenizer, prompt: str, completions: Sequence[str]) -> _Rendered:
    bos = str(text.tokenizer.bos_token) if added_bos(text.tokenizer) else ""
    ends = tuple(_ends(text))
    ended = [
        c if c.rstrip().endswith(ends) else c + str(text.tokenizer.eos_token) for c in completions
    ]
    prompt = prompt.removeprefix(bos)
    wholes = tuple((prompt + c).removeprefix(bos) for c in ended)
    turns = tuple(_spoken(prompt, whole) for whole in wholes)
    return _Rendered(prompt, wholes, turns, bos=bool(bos))


def _spoken(prompt: str, whole: str) -> Spans | None:
    """The assistant's turns behind a prompt of named turns; None where the user says no more."""
    begin, turns = len(prompt), []
    if not _ASKS.search(prompt):
        return None
    while asked := _ASKS.search(whole, begin):
        turns.append((begin, asked.start()))
        answered = ANSWERS.search(whole, asked.end())
        begin = answered.end() if answered else len(whole)
    return [*turns, (begin, len(whole))] if turns else None


def _chat(text: ChatTokenizer, example: Example) -> _Rendered:
    text.check_template()
    _check_tools(text, example)
    ends = _ends(text)
    prompt, answers = example.prompt, [_without_ends(c, ends) for c in example.completions]
    render = functools.partial(text.render, tools=example.tools)
    try:
        asked = render(prompt)
        wholes = [render([*prompt, *a], answered=True) for a in answers]
        _check_written(text, [(asked, prompt), *zip(wholes, answers, strict=True)])
        if all(_kept(asked, whole, a) for whole, a in zip(wholes, answers, strict=True)):
            heads = [render([*prompt, *a[:-1]]) if len(a) > 1 else asked for a in answers]
            pairs = list(zip(answers, heads, wholes, strict=True))
            ended = [_ended(head, whole, a, ends) for a, head, whole in pairs]
            turns = [_turns(text, example, a, w) for a, w in zip(answers, ended, strict=True)]
            return _Rendered(asked, tuple(ended), tuple(turns))
    except (_PrefixError, _UnwrittenError) as e:
        raise ValueError(str(e)) from e
    except Exception as e:  # a template raises whatever its author chose
        raise ValueError(
            f"the chat template of {text.where} refuses the messages ({e}); fix their roles"
        ) from e
    several = any(len(a) > 1 for a in answers)
    calls = any(a[0].get("tool_calls") for a in answers)
    thoughts = any(a[0].get(name) for a in answers for name in _THOUGHTS)
    if several or calls or thoughts:
        what = "an answer of several messages" if several else "a tool call"
        what = what if several or calls else "a thought in a field of its own"
        raise ValueError(
            f"the chat template of {text.where} renders the prompt otherwise when an answer "
            f"follows, so that {what} has no place behind it; give one assistant message"
            + " of text"
            * (not several)
        )
    behind = tuple(_behind(asked, a[0]["content"]) + ends[0] for a in answers)
    return _Rendered(asked, behind, (None,) * len(behind), apart=True)


_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that templates write as the assistant's thought."""


def _check_tools(text: ChatTokenizer, example: Example) -> None:
    """Refuses tools, tool calls and thoughts that the template would drop without a word."""
    template = str(text.tokenizer.chat_template)
    messages = [m for part in (example.prompt, *example.completions) for m in part]
    fields = ("tool_calls", "function_call", *_THOUGHTS)
    held = [(name, any(message.get(name) for message in messages)) for name in fields]
    for name, given in (("tools", example.tools), *held):
        if given and not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"the chat template of {text.where} does not write {name!r}; remove them, or use a "
                "model whose template does"
            )


class _UnwrittenError(ValueError):
    """The template leaves out a message."""


def _check_written(text: ChatTokenizer, parts: Sequence[tuple[str, Messages]]) -> None:
    """Refuses instructions and questions that the template drops, such as a later system message.

    Args:
      text: renders.
      parts: rendered text, and messages that it must hold.
    """
    for rendered, messages in parts:
        for message in messages:
            asks = message["role"] in ("system", "developer", "user")
            if asks and message["content"].strip() not in rendered:
                raise _UnwrittenError(
                    f"the chat template of {text.where} does not write a message of the role "
                    f"{message['role']!r} where it stands; move or remove it"
                )


class _PrefixError(ValueError):
    """The template does not render the beginning of a conversation as its rendering begins."""


def _turns(text: ChatTokenizer, example: Example, answer: Messages, whole: str) -> Spans | None:
    """The assistant's turns in the rendered conversation, with their ends; None for one message.

        <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n        prompt
        4<|im_end|>\\n                                                     turn, scored
        <|im_start|>user\\nSure?<|im_end|>\\n<|im_start|>assistant\\n
        4!<|im_end|>\\n                                                    turn, scored

    A turn begins where the messages before it end with a generation prompt, and ends where the
    messages up to it end.
    """
    if len(answer) == 1:
        return None
    prompt, render = example.prompt, functools.partial(text.render, tools=example.tools)
    turns = []
    for i, message in enumerate(answer):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        header = render([*prompt, *answer[:i]])
        possible = [
            render([*prompt, *answer[: i + 1]], answered=True),
            # Some templates give the last turn a thought, which earlier turns do not have.
            *(header + message["content"].strip() + end for end in _ends(text)),
        ]
        if i == len(answer) - 1:
            possible = [whole]
        until = next((p for p in possible if whole.startswith(p) and p.startswith(header)), None)
        if until is None:
            raise _PrefixError(
                f"the chat template of {text.where} renders a message otherwise when others "
                "follow, so that the assistant's turns in an answer of several messages cannot be "
                "found; give one assistant message"
            )
        turns.append((len(header) if i else 0, len(until)))
    return turns


def _without_ends(messages: Messages, ends: Sequence[str]) -> list[dict[str, Any]]:
    """The messages without end tokens in the assistant's contents; the template writes them."""
    return [
        dict(m) | {"content": _without_end(m["content"], ends)} if m["role"] == "assistant" else m
        for m in messages
    ]


def _without_end(content: str, ends: Sequence[str]) -> str:
    for end in ends:
        if content.rstrip().endswith(end):
            return content.rstrip().removesuffix(end)
    return content


def _kept(asked: str, whole: str, answer: Messages) -> bool:
    """Whether the rendering is that of the prompt alone, then the answer as it was written."""
    rest = whole[len(asked) :]
    said = [m["content"] for m in answer] + [str(m.get(n, "")) for m in answer for n in _THOUGHTS]
    return whole.startswith(asked) and all(text.strip() in rest for text in said)


def _ended(head: str, whole: str, answer: Messages, ends: Sequence[str]) -> str:
    """The conversation with an end token behind its last message, which `head` precedes."""
    said = answer[-1]["content"].strip()
    after = whole.rfind(said) + len(said) if said else len(head)
    found = sorted((whole.index(end, after), len(end)) for end in ends if end in whole[after:])
    if not found:
        return whole + ends[0]
    until = sum(found[0])
    # Some templates end the conversation once more behind the turn's end, as that of Phi-3 does.
    return whole[:until] if any(end in whole[until:] for end in ends) else whole


def _behind(asked: str, content: str) -> str:
    """The answer without the opening tag (such as <think>) that the prompt ends with already."""
    for start in (i for i in range(max(0, len(asked) - 200), len(asked)) if asked[i] == "<"):
        tag = asked[start:].rstrip()
        if content.startswith(tag):
            rest = content[len(tag) :]
            return rest[len(os.path.commonprefix([rest, asked[start + len(tag) :]])) :]
    return content
