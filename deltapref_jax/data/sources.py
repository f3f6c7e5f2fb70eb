"""Prompts from files, data sets and generators of questions: one function per kind of source."""

import ast
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from deltapref_jax.callables import SOURCE, failure, is_callable_name, load_callable
from deltapref_jax.config import ConfigError, Prompts, check_choice, need_reasoning_gym
from deltapref_jax.data.blocks import RepeatedKeyError, unique_keys
from deltapref_jax.data.dataset import load_split
from deltapref_jax.data.messages import WHOLE_QUESTIONS, content, unread_part
from deltapref_jax.files import local_copy
from deltapref_jax.records import Prompt, digest
from deltapref_jax.synthetic import world
from deltapref_jax.synthetic.families import FAMILIES

Row = dict[str, Any]


def read_prompts(source: Prompts) -> tuple[list[Prompt], dict[str, int]]:
    """Distinct prompts of one source, and counts of its rows.

    Counts are `read`, `empty` (dropped: the question has no text) and `duplicate` (dropped).

    Raises:
      ConfigError: the source is missing, damaged, or lacks a column or an answer; the sentence
        says where.
    """
    rows = list(_of_kind(source)(source))
    kept: dict[str, Prompt] = {}
    empty = 0
    for row in rows:
        if not row.question.strip():
            empty += 1
            continue
        kept.setdefault(row.prompt_id, row)
    unique = list(kept.values())
    if source.count and source.count < len(unique):
        order = np.random.default_rng(source.seed).permutation(len(unique))[: source.count]
        unique = [unique[i] for i in sorted(order)]
    if not unique:
        raise ConfigError(
            f"The source {source.path or source.tasks} holds no question with text; give it some."
        )
    return unique, {"read": len(rows), "empty": empty, "duplicate": len(rows) - empty - len(kept)}


def _of_kind(source: Prompts) -> Callable[[Prompts], Iterable[Prompt]]:
    """The function of `SOURCES`, or the one that reads what the user's own function yields."""
    if is_callable_name(source.kind):
        return _own
    return SOURCES[check_choice("prompts.kind", source.kind, SOURCES)]


def _prompt(
    task: str, messages: list[dict[str, str]], answer: str, checker: str, meta: dict[str, Any]
) -> Prompt:
    text = json.dumps(messages, ensure_ascii=False)
    described = json.dumps(meta, sort_keys=True, ensure_ascii=False)
    return Prompt(digest(task, text), task, text, answer, checker, described)


def task_names(kind: str) -> tuple[str, ...]:
    """What `tasks` may name: the families of the synthetic world, or reasoning-gym's data sets.

    Raises:
      ConfigError: reasoning-gym is not installed.
    """
    if kind == "synthetic":
        return tuple(FAMILIES)
    need_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(DATASETS.keys() - {"composite"}))  # a mixture, which `tasks` is too


def _synthetic(source: Prompts) -> list[Prompt]:
    return world.prompts(source.tasks, source.count, source.difficulty, source.seed)


def _reasoning_gym(source: Prompts) -> Iterable[Prompt]:
    need_reasoning_gym()
    import reasoning_gym

    for place, task in enumerate(source.tasks):
        check_choice("reasoning_gym task", task, task_names("reasoning_gym"))
        share = source.count // len(source.tasks) + (place < source.count % len(source.tasks))
        for entry in reasoning_gym.create_dataset(task, size=share, seed=source.seed):
            kept = json.loads(json.dumps(entry, default=str))
            yield _prompt(
                task,
                [{"role": "user", "content": entry["question"]}],
                "" if entry["answer"] is None else str(entry["answer"]),  # some tasks name none
                "reasoning_gym",
                {"task": task, "entry": kept},
            )


_WORKED = re.compile(r"^####[ \t]*(\S.*?)\s*\Z", re.MULTILINE)  # GSM8K's last line
_LONGEST = 400  # characters of a reference answer; a longer one is a worked solution


def _stated(text: str, where: str, source: Prompts) -> str:
    r"""The answer in a cell: what "####" states, or a worked solution with a \boxed{}.

    The checkers read the box. A list of one text that is stored as text ('["34"]') is that text.

    Raises:
      ConfigError: it is a worked solution that states none.
    """
    if worked := _WORKED.search(text):
        return worked[1]
    if re.fullmatch(r"\[\s*([\"']).*\1\s*\]", text, re.DOTALL):
        with contextlib.suppress(ValueError, SyntaxError):  # several, or no list
            (text,) = (str(each) for each in ast.literal_eval(text))
    if len(text) > _LONGEST and "\\boxed" not in text:
        raise ConfigError(
            f"{where} has a text of {len(text)} characters in {source.answer_field!r}, which "
            "states no answer behind '####' or in \\boxed{}; give the answer alone, or set "
            "answer_field."
        )
    return text


def _reference_answers(answer: Any, where: str, source: Prompts) -> list[str]:
    """The accepted answers in a column: one, any of a list, or what GSM8K's "####" announces.

    Raises:
      ConfigError: nothing there can be an answer.
    """
    field = source.answer_field
    if answer is None:
        raise ConfigError(
            f"{where} has no {field!r} and the checker {source.checker!r} needs one; set "
            "answer_field, or checker to ''."
        )
    several = isinstance(answer, list | tuple)
    found = []
    for each in answer if several else [answer]:
        kind = "an object" if isinstance(each, dict) else "a list" if isinstance(each, list) else ""
        if isinstance(each, float) and not math.isfinite(each):
            kind = str(each)
        elif each is None or not str(each).strip():
            kind = "null" if each is None else "empty text"
        if kind:
            raise ConfigError(
                f"{where} has {kind} in {field!r}, which no trace can be checked against; give the "
                "answer as text or a number (or a list of the accepted ones), or set answer_field."
            )
        found.append(_stated(str(each).strip(), where, source))
    if not found:
        raise ConfigError(
            f"{where} has an empty list in {field!r}; give at least one accepted answer, or set "
            "answer_field."
        )
    return list(dict.fromkeys(found))


def _messages(row: Row, column: str, where: str) -> list[dict[str, str]]:
    """The conversation in a column, which ends with the user's message.

    Raises:
      ConfigError: it is no conversation, ends otherwise, or holds more than text.
    """
    if row[column] is None or row[column] == "":
        return [{"role": "user", "content": ""}]
    try:
        found = [{}] if row[column] == [] else content(row, column)
    except ValueError as e:
        detail = f" ({e})" if "JSON" in str(e) else ""
        raise ConfigError(
            f"{where} has a prompt that is neither text nor a list of chat messages; "
            f"each message needs 'role' and 'content', both text{detail}."
        ) from e
    messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if messages[-1].get("role") != "user":
        raise ConfigError(
            f"{where} has a prompt whose last message is not the user's; cut the answer off."
        )
    for name in ("tool_calls", "function_call", "reasoning_content", "thinking"):
        if any(message.get(name) for message in messages):
            raise ConfigError(f"{where} has messages with {name!r}, which is not read; remove it.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _check_unread(row: Row, messages: list[dict[str, str]], source: Prompts, where: str) -> None:
    """Refuses columns without which a question is another one, unless the prompt holds them.

    Raises:
      ConfigError: it names the column.
    """
    asked = "\n".join(message["content"] for message in messages)
    # Who sets prompt_field has chosen among the columns that hold questions.
    others = WHOLE_QUESTIONS if source.prompt_field != "prompt" else ()
    name = unread_part(row, asked, (source.prompt_field, source.answer_field, *others))
    if name is None and row.get("tools") and str(row["tools"]).strip() not in asked:
        name = "tools"
    if name is not None:
        raise ConfigError(
            f"{where} has a column {name!r} that would not be read, and "
            f"{source.prompt_field!r} does not hold it; write it into the prompt, or remove it."
        )


def _from_columns(source: Prompts, rows: Iterable[tuple[str, Row]], task: str) -> Iterable[Prompt]:
    """Prompts from a table's `prompt_field` and `answer_field`.

    Args:
      source: names the columns.
      rows: the place of each row, for messages, and the row.
      task: of all the prompts.
    """
    for where, row in rows:
        if source.prompt_field not in row:
            raise ConfigError(
                f"{where} has no column {source.prompt_field!r}; it has {sorted(row)}: "
                "set prompt_field."
            )
        answer = row.get(source.answer_field)
        own = is_callable_name(source.checker)
        if source.checker and not own:
            golds = _reference_answers(answer, where, source)
        else:
            golds = ["" if answer is None else str(answer)]
        messages = _messages(row, source.prompt_field, where)
        _check_unread(row, messages, source, where)
        meta: dict[str, Any] = {"answers": golds} if len(golds) > 1 else {}
        if own:  # it may need any of the row's columns
            others = {k: v for k, v in row.items() if k != source.prompt_field}
            meta = json.loads(json.dumps(others, default=str))
        yield _prompt(task, messages, golds[0], source.checker, meta)


def _own(source: Prompts) -> Iterable[Prompt]:
    """Prompts from the rows that the user's own function yields.

    Raises:
      ConfigError: it fails, or yields something else.
    """
    function = load_callable("prompts.kind", source.kind, SOURCE)
    try:
        found = list(function(source))
    except Exception as e:  # the user's function may raise any type
        raise failure(source.kind, "its prompts", e) from e
    rows = [(f"Row {i} of {source.kind}", row) for i, row in enumerate(found)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where} is {type(row).__name__}; yield a dict with {source.prompt_field!r}."
            )
    return _from_columns(source, rows, source.kind.rpartition(":")[2])


def _existing(source: Prompts) -> Path:
    path = Path(local_copy(source.path))
    if not path.exists():
        raise ConfigError(f"There is no prompt file {source.path}; check prompts.path.")
    return path


def _jsonl(source: Prompts) -> Iterable[Prompt]:
    path = _existing(source)

    def lines() -> Iterable[tuple[str, Row]]:
        with path.open("rb") as file:  # as bytes, so that an encoding error has its line
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line, object_pairs_hook=unique_keys)
                except RepeatedKeyError as e:
                    raise ConfigError(f"Line {number} of {path}: {e}; fix or remove it.") from e
                except ValueError as e:
                    raise ConfigError(
                        f"Line {number} of {path} is not JSON ({e}); fix or remove it."
                    ) from e
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"Line {number} of {path} is not a JSON object; fix or remove it."
                    )
                yield f"Line {number} of {path}", row

    return _from_columns(source, lines(), path.stem)


def _parquet(source: Prompts) -> Iterable[Prompt]:
    path = _existing(source)
    try:
        rows = pq.read_table(path).to_pylist()
    except Exception as e:  # pyarrow raises many types for a damaged file
        raise ConfigError(f"{path} is not a readable Parquet file ({e}); write it again.") from e
    return _from_columns(
        source, ((f"Row {i} of {path}", row) for i, row in enumerate(rows)), path.stem
    )


def _hub(source: Prompts) -> Iterable[Prompt]:
    return _from_columns(
        source,
        ((f"Row {i} of {source.path}", dict(row)) for i, row in enumerate(load_split(source))),
        Path(source.path).name,
    )


def _tfds(source: Prompts) -> Iterable[Prompt]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(_existing(source)))
        data = builder.as_data_source(split=source.split)
    except ConfigError:
        raise
    except Exception as e:  # tfds raises many types
        raise ConfigError(
            f"The TFDS data set in {source.path} (split {source.split!r}) cannot be read "
            f"({type(e).__name__}: {e}); give the builder's version directory, in array_record "
            "format."
        ) from e

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        return (
            [plain(v) for v in value]
            if isinstance(value, list)
            else (value.decode() if isinstance(value, bytes) else value)
        )

    return _from_columns(
        source,
        ((f"Row {i} of {source.path}", plain(row)) for i, row in enumerate(data)),
        builder.info.name,
    )


SOURCES: dict[str, Callable[[Prompts], Iterable[Prompt]]] = {
    "synthetic": _synthetic,
    "reasoning_gym": _reasoning_gym,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hub": _hub,
    "tfds": _tfds,
}
