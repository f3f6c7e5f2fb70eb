"""Tokens of preference data that others wrote: a prompt and its completions, as text or as messages.

The tokens are TRL's (1.16): prompt + completion is tokenised as one text, and the completion begins where its tokens
and those of the prompt alone part, for the two sides of a pair at the same place. (Traces of this project's own
generators are tokenised at the fixed border where they were sampled, see `template`; a file has no such border.)
Where peers are wrong, we are not, and tests hold the difference:

- One BOS at most: a text that begins with the BOS that the tokenizer adds does not get a second one.
- One end token, always: TRL leaves it out where the template writes none, and doubles it where the text ends with
  another end token than `eos_token`, with the end token and white space, or where the message itself holds it.
- Nothing that the tokenizer's post-processor puts *behind* text (an EOS of its own) moves the border.
- A template that renders the prompt otherwise once an answer follows, or rewrites the answer (thinking templates drop
  the thoughts), gives a context that the model never meets when it is asked. Then the prompt is rendered as it is
  asked, and the answer stands behind it as it was written; such rows are counted (`apart`).
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.text.template import ChatTokenizer, Messages, added_bos

Ids = np.ndarray


class Tokens(NamedTuple):
    """One prompt with one completion (an example) or two (a pair)."""

    prompt: Ids  # int32
    completions: tuple[Ids, ...]  # int32, the end token included
    # The template does not render the prompt as a prefix; prompt and completion were tokenised apart.
    prompt_not_prefix: bool = False
    # bool, for each token of a completion: whether it is a target. None: all are; (): all are None.
    scored: tuple[np.ndarray | None, ...] = ()


class _Rendered(NamedTuple):
    prompt: str
    wholes: tuple[str, ...]  # prompt and completion; the completion alone where `apart`
    apart: bool = False
    bos: bool = False  # the tokenizer adds its BOS


def tokenise(text: ChatTokenizer, examples: Sequence[tuple[Any, Sequence[Any]]]) -> list[Tokens]:
    """Ids of (prompt, completions), all three `str` or all three `Messages`; many are tokenised in one call.

    Raises:
      ConfigError: messages, and the tokenizer has no chat template.
      ValueError: the template cannot render the messages, or an answer of several messages has no place in it.
    """
    rendered = [
        _text(text, prompt, said) if isinstance(prompt, str) else _chat(text, prompt, said)
        for prompt, said in examples
    ]
    encoded = iter(text.encode([each for r in rendered for each in (r.prompt, *r.wholes)]))
    bos = added_bos(text.tokenizer)
    return [
        _split([next(encoded) for _ in range(1 + len(r.wholes))], r.apart, bos * r.bos)
        for r in rendered
    ]


def _split(encoded: list[list[int]], apart: bool, bos: list[int]) -> Tokens:
    prompt, *wholes = (np.asarray([*bos, *ids], np.int32) for ids in encoded)
    if apart:
        return Tokens(prompt, tuple(wholes), True)
    border = min(_common(prompt, whole) for whole in wholes)
    return Tokens(prompt[:border], tuple(whole[border:] for whole in wholes))


def _common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _ends(text: ChatTokenizer) -> list[str]:
    return [str(text.tokenizer.convert_ids_to_tokens(i)) for i in text.end_ids]


def _text(text: ChatTokenizer, prompt: str, completions: Sequence[str]) -> _Rendered:
    bos = str(text.tokenizer.bos_token) if added_bos(text.tokenizer) else ""
    ends = tuple(_ends(text))
    ended = [
        c if c.rstrip().endswith(ends) else c + str(text.tokenizer.eos_token) for c in completions
    ]
    return _Rendered(
        prompt.removeprefix(bos),
        tuple((prompt + c).removeprefix(bos) for c in ended),
        bos=bool(bos),
    )


def _chat(text: ChatTokenizer, prompt: Messages, completions: Sequence[Messages]) -> _Rendered:
    text.check_template()
    ends = _ends(text)
    answers = [_without_end(c, ends) for c in completions]
    try:
        asked = text.render(prompt)
        wholes = [
            str(text.tokenizer.apply_chat_template([*prompt, *a], tokenize=False)) for a in answers
        ]
    except Exception as e:  # a template raises whatever its author chose
        raise ValueError(
            f"the chat template of {text.where} refuses the messages ({e}); mend their roles"
        ) from e
    if all(_kept(asked, whole, a) for whole, a in zip(wholes, answers, strict=True)):
        return _Rendered(
            asked, tuple(_ended(asked, w, a, ends) for w, a in zip(wholes, answers, strict=True))
        )
    if any(len(a) > 1 for a in answers):
        raise ValueError(
            f"the chat template of {text.where} renders the prompt otherwise when an answer follows, so "
            "that an answer of several messages has no place behind it; give one assistant message"
        )
    return _Rendered(
        asked, tuple(_behind(asked, a[0]["content"]) + ends[0] for a in answers), apart=True
    )


def _without_end(messages: Messages, ends: Sequence[str]) -> list[dict[str, str]]:
    """The messages without an end token that the last one holds already; the template writes it."""
    content = messages[-1]["content"]
    for end in ends:
        if content.rstrip().endswith(end):
            content = content.rstrip().removesuffix(end)
            break
    return [*messages[:-1], dict(messages[-1]) | {"content": content}]


def _kept(asked: str, whole: str, answer: Messages) -> bool:
    """Whether the rendered conversation goes on from the prompt as it is asked, with the answer as it was written."""
    rest = whole[len(asked) :]
    return whole.startswith(asked) and all(m["content"].strip() in rest for m in answer)


def _ended(asked: str, whole: str, answer: Messages, ends: Sequence[str]) -> str:
    said = answer[-1]["content"].strip()
    after = whole.rfind(said) + len(said) if said else len(asked)
    return whole if any(end in whole[after:] for end in ends) else whole + ends[0]


def _behind(asked: str, content: str) -> str:
    """The answer without the opening tag (such as <think>) that the prompt ends with already."""
    for start in (i for i in range(max(0, len(asked) - 200), len(asked)) if asked[i] == "<"):
        tag = asked[start:].rstrip()
        if content.startswith(tag):
            rest = content[len(tag) :]
            return rest[len(os.path.commonprefix([rest, asked[start + len(tag) :]])) :]
    return content
