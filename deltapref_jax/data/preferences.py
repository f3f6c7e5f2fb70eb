"""Preference data in the formats that people bring, as tokenised sequences under one length rule.

    {prompt, chosen, rejected}         TRL paired; text or messages
    {chosen, rejected}                 the prompt is what both begin with: TRL implicit, open-instruct, UltraFeedback
    {prompt, completion, label}        TRL unpaired; text or messages
    {prompt_ids, chosen_ids, rejected_ids}, {prompt_ids, completion_ids, label}      token ids

from JSON lines, Parquet, a hub name or a data set folder. A `prompt` of text in front of whole conversations
(UltraFeedback-binarized) and a list of messages that both conversations repeat are understood too. Blocks of rows are
read and tokenised by Grain, in worker processes where the file is large; the order is the file's, with any number.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from deltapref_jax.config import ConfigError, Pairs
from deltapref_jax.data.blocks import BLOCK, Blocks, json_row, open_blocks
from deltapref_jax.records import digest

FORMATS = {  # columns that decide, first match wins; then the columns that are read
    "token ids, paired": (("prompt_ids", "chosen_ids", "rejected_ids"), ()),
    "token ids, unpaired": (("prompt_ids", "completion_ids", "label"), ()),
    "paired": (("chosen", "rejected"), ("prompt",)),
    "unpaired": (("prompt", "completion", "label"), ()),
}
Row = dict[str, Any]
Example = tuple[
    Any, tuple[Any, ...], bool | None
]  # prompt, completions, label; text, messages or ids
Tokenise = Callable[
    [list[tuple[Any, tuple[Any, ...]]]], Sequence[Any]
]  # to .prompt, .completions, .apart


@dataclasses.dataclass
class Preferences:
    """What a source holds.

    Attributes:
      groups: pairs (two rows) or examples (one) in the order of the file; rows of `records.SEQUENCE` without `group`,
        and whether the answer is `empty`: no id, or white space, of which at most the end token would be trained.
      format: one of `FORMATS`.
      ignored: columns that are not read.
      counts: `read` rows of the source, `apart` (see `text.preference`).
    """

    groups: list[list[Row]]
    format: str
    ignored: list[str]
    counts: dict[str, int]


def read_preferences(
    source: Pairs, tokenise: Tokenise, unpair: bool, vocab: int = 0, workers: int = -1
) -> Preferences:
    """Reads and tokenises all of `source`.

    Args:
      source: where, and with how many processes.
      tokenise: (prompt, completions) to ids, such as `text.preference.tokenise` of a model; it is pickled.
      unpair: a pair becomes two examples (KTO, SFT), each with a border of its own, as in TRL.
      vocab: token ids given must be below it; 0: not checked.
      workers: overrides `source.workers` and the rule that small files need fewer.

    Raises:
      ConfigError: the source is missing, damaged or of no known format, or a row is broken; file, line and remedy.
    """
    blocks, columns = open_blocks(source, lambda columns: _read(_format(source.path, columns)))
    name = _format(source.path, columns)
    needed = _read(name)
    if workers < 0:
        workers = min(source.workers, len(blocks) * BLOCK // 1000)
    prepare = functools.partial(
        _prepare,
        blocks=blocks,
        name=name,
        needed=needed,
        tokenise=tokenise,
        unpair=unpair,
        vocab=vocab,
    )
    read = grain.MapDataset.range(len(blocks)).map(prepare).to_iter_dataset(grain.ReadOptions(0, 0))
    groups: list[list[Row]] = []
    ignored, counts = set(columns) - needed, Counter[str](read=0, apart=0)
    if (
        workers and not flags.FLAGS.is_parsed()
    ):  # Grain asks absl's flags, which a notebook or test never parses
        flags.FLAGS.mark_as_parsed()
    for done in read.mp_prefetch(grain.MultiprocessingOptions(workers, 2)) if workers else read:
        if done.broken:
            raise ConfigError(done.broken)
        groups += done.groups
        ignored |= done.columns - needed
        counts.update(done.counts)
    if not groups:
        raise ConfigError(f"{source.path} holds no row; give it some.")
    return Preferences(groups, name, sorted(ignored), dict(counts))


@dataclasses.dataclass
class _Done:
    """A block prepared; an error travels as its sentence, because workers raise it with their own tracebacks."""

    groups: list[list[Row]] = dataclasses.field(default_factory=list)
    columns: set[str] = dataclasses.field(default_factory=set)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    broken: str = ""


def _prepare(
    number: int,
    blocks: Blocks,
    name: str,
    needed: set[str],
    tokenise: Tokenise,
    unpair: bool,
    vocab: int,
) -> _Done:
    examples: list[tuple[str, Example]] = []
    columns: set[str] = set()
    where = ""
    try:
        block = blocks[number]
        for where, raw in block:
            row = json_row(raw) if isinstance(raw, bytes) else raw
            columns |= row.keys()
            found = (
                _ids(row, name, vocab)
                if "ids" in name
                else _paired(row)
                if name == "paired"
                else _unpaired(row)
            )
            prompt, completions, label = found
            if unpair and len(completions) == 2:
                examples += [
                    (where, (prompt, (c,), good))
                    for c, good in zip(completions, (True, False), strict=True)
                ]
            else:
                examples.append((where, (prompt, completions, label)))
        if "ids" in name:
            tokens = [(prompt, completions, False) for _, (prompt, completions, _) in examples]
        else:
            asked = [(prompt, completions) for _, (prompt, completions, _) in examples]
            tokens = [
                (t.prompt, t.completions, t.apart) for t in _tokenised(tokenise, asked, examples)
            ]
    except ConfigError as e:  # of the file or the tokenizer, not of a row
        return _Done(broken=str(e))
    except ValueError as e:
        at, _, what = str(e).rpartition(" ¦ ")
        return _Done(broken=f"{at or where}: {what}; mend or remove the row.")
    groups = []
    for (place, (prompt, said, label)), (ids, completions, _) in zip(examples, tokens, strict=True):
        key = digest(prompt.tolist() if isinstance(prompt, np.ndarray) else prompt)
        labels = (label,) if len(completions) == 1 else (True, False)
        groups.append(
            [
                {
                    "prompt_id": key,
                    "prompt_ids": ids,
                    "completion_ids": c,
                    "desirable": good,
                    "where": place,
                    "empty": _empty(answer),
                }
                for c, good, answer in zip(completions, labels, said, strict=True)
            ]
        )
    return _Done(
        groups, columns, {"read": len(block), "apart": sum(apart for _, _, apart in tokens)}
    )


def _tokenised(
    tokenise: Tokenise,
    asked: list[tuple[Any, tuple[Any, ...]]],
    examples: list[tuple[str, Example]],
) -> Sequence[Any]:
    try:
        return tokenise(asked)
    except ConfigError:  # of the tokenizer, not of a row
        raise
    except ValueError:  # find the row
        for (where, _), each in zip(examples, asked, strict=True):
            try:
                tokenise([each])
            except ValueError as e:
                raise ValueError(f"{where} ¦ {e}") from e
        raise


def _read(name: str) -> set[str]:
    """Columns of a format that are read."""
    return {*FORMATS[name][0], *FORMATS[name][1]}


def _format(path: str, columns: Sequence[str]) -> str:
    for name, (deciding, _) in FORMATS.items():
        if set(deciding) <= set(columns):
            return name
    known = "; ".join(", ".join(deciding) for deciding, _ in FORMATS.values())
    raise ConfigError(
        f"{path} has the columns {', '.join(sorted(columns)) or '(none)'}, which are no preference data; "
        f"rename them to one of: {known}."
    )


def _label(value: Any) -> bool:
    if value in (True, False):  # 0 and 1 are equal to them
        return bool(value)
    raise ValueError(f"'label' is {value!r} and must be true or false")


def _ids(row: Row, name: str, vocab: int) -> Example:
    def ids(column: str) -> np.ndarray:
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

    if "unpaired" in name:
        return ids("prompt_ids"), (ids("completion_ids"),), _label(row.get("label"))
    return ids("prompt_ids"), (ids("chosen_ids"), ids("rejected_ids")), None


def _empty(answer: Any) -> bool:
    """Of ids, text or messages."""
    if isinstance(answer, str):
        return not answer.strip()
    return (
        not any(m["content"].strip() for m in answer)
        if isinstance(answer, list)
        else not len(answer)
    )


def _said(row: Row, column: str) -> Any:
    """Text, or a list of messages with text."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if (
        isinstance(value, dict) and {"role", "content"} <= value.keys()
    ):  # a list of messages, column-wise
        value = [
            {"role": r, "content": c} for r, c in zip(value["role"], value["content"], strict=True)
        ]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"{column!r} is {'missing' if value is None else 'neither text nor a list of messages'}"
        )
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError(f"{column!r} has a message without 'role' and 'content' as text")
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
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    prompt = None if row.get("prompt") is None else _said(row, "prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of 'chosen' and 'rejected' is text and the other is messages")
    if isinstance(chosen, str) and not isinstance(prompt, list):
        if prompt is None and "prompt" in row:
            raise ValueError("'prompt' is missing")
        border = _shared(chosen, rejected) if prompt is None else 0
        return (
            (prompt if prompt is not None else chosen[:border]),
            (chosen[border:], rejected[border:]),
            None,
        )
    chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    whole = chosen[0]["role"] != "assistant"
    if isinstance(prompt, str) and not whole:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        n = (
            len(prompt)
            if whole and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
            else 0
        )
    else:  # whole conversations; a prompt of text repeats their question
        n = _shared(chosen, rejected)
        prompt = chosen[:n]
        if not n:
            raise ValueError(
                "the conversations in 'chosen' and 'rejected' share no first message, so there is no "
                "prompt"
            )
    if n == min(len(chosen), len(rejected)):
        raise ValueError("'chosen' or 'rejected' has no answer behind the prompt")
    return prompt, (chosen[n:], rejected[n:]), None


def _shared(chosen: Any, rejected: Any) -> int:
    """What both begin with, in characters or messages, as TRL's `extract_prompt`: something of each stays, and in text
    a space before the border belongs to the completions."""
    most = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    if n > 0 and isinstance(chosen, str) and chosen[n] != rejected[n] and chosen[n - 1] == " ":
        n -= 1
    return n


def _unpaired(row: Row) -> Example:
    prompt, completion = _said(row, "prompt"), _said(row, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = _answer(completion, "completion")
    return prompt, (completion,), _label(row.get("label"))


def limit(
    preferences: Preferences, length: int, rule: str, mode: str
) -> tuple[list[list[Row]], dict[str, int]]:
    """The length rule: groups whose sequences have `length` tokens at most, and counts of what was done.

    Counts are `too_long` (groups dropped), `cut` (sequences shortened), `cut_away` (groups dropped because nothing of a
    completion, or no scored token, would stay) and `unscored` (groups dropped because a completion of one token has
    no token before it to be scored by).

    Args:
      preferences: as read.
      length: tokens, prompt and completion.
      rule: one of `config.OVER_LENGTHS`.
      mode: one of `config.TRUNCATION_MODES`, for "truncate".

    Raises:
      ConfigError: the rule is "error" and a sequence is too long, or nothing is left.
    """
    kept, counts = [], Counter[str](too_long=0, cut=0, cut_away=0, unscored=0)
    for group in preferences.groups:
        if any(_unscored(row["prompt_ids"], row["completion_ids"]) for row in group):
            counts["unscored"] += 1
            continue
        sizes = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in group]
        long = sum(size > length for size in sizes)
        if long and rule == "error":
            raise ConfigError(
                f"{group[0]['where']} has a sequence of {max(sizes)} tokens, and "
                f"config.training.row_length is {length}; raise it, or set config.training.over_length "
                "to 'drop' or 'truncate'."
            )
        if long and rule == "drop":
            counts["too_long"] += 1
            continue
        cuts = [cut(row["prompt_ids"], row["completion_ids"], length, mode) for row in group]
        if any(c is None for c in cuts):
            counts["cut_away"] += 1
            continue
        counts["cut"] += long
        kept.append(
            [
                row | {"prompt_ids": c[0], "completion_ids": c[1]}
                for row, c in zip(group, cuts, strict=True)
                if c is not None
            ]
        )
    if not kept:
        raise ConfigError(
            f"None of the {len(preferences.groups)} pairs or examples is left: {counts['too_long']} are "
            f"longer than config.training.row_length ({length} tokens), {counts['cut_away']} have no "
            f"answer within it and {counts['unscored']} have nothing to score; raise it."
        )
    return kept, dict(counts)


def _unscored(prompt: np.ndarray, completion: np.ndarray) -> bool:
    return len(completion) == 0 or len(prompt) + len(completion) < 2


def cut(
    prompt: np.ndarray, completion: np.ndarray, length: int, mode: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """A sequence within `length` tokens: its start (TRL's default) or its end; None if no scored token stays."""
    over = max(0, len(prompt) + len(completion) - length)
    if mode == "keep_end":
        prompt, completion = prompt[over:], completion[max(0, over - len(prompt)) :]
    else:
        prompt, completion = prompt[:length], completion[: max(0, len(completion) - over)]
    return None if _unscored(prompt, completion) else (prompt, completion)
