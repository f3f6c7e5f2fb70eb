"""A source of preference data as token sequences, under one rule of length.

The source is a JSON lines or Parquet file, a hub name or a data set folder; `data.formats` lists
the formats. Grain reads and tokenises blocks of rows, in worker processes where the source is
large; the order is the source's with any number of workers.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Pairs
from deltapref_jax.data.blocks import BLOCK, Blocks, json_row, open_blocks
from deltapref_jax.data.formats import (
    columns_read,
    format_of,
    is_empty,
    is_repeated,
    read_example,
    without_nulls,
)
from deltapref_jax.data.messages import QUESTION_PARTS, Row
from deltapref_jax.records import TokenSequence, digest
from deltapref_jax.text.preference import Example, Tokens, tokenise
from deltapref_jax.text.template import ChatTokenizer

Group = list[TokenSequence]

_COUNTED = (  # while blocks are read
    *("read", "prompt_not_prefix", "undesirable", "empty", "empty_prompt", "shared_prompt"),
    *("merged_prompt", "repeated_prompt", "echoed_prompt", "text_among_messages"),
)


class LengthLimit(NamedTuple):
    """What happens to sequences that are too long."""

    length: int  # tokens of prompt and completion that a sequence may have
    rule: str  # one of config.OVER_LENGTHS
    mode: str = "keep_start"  # one of config.TRUNCATION_MODES, for the rule "truncate"


@dataclasses.dataclass
class Preferences:
    """What a source holds.

    Attributes:
      groups: pairs (chosen, rejected) or single examples, in the order of the source.
      format: one of `formats.FORMATS`.
      ignored: columns that are not read.
      counts: what was read, dropped and changed; see `read_sequences`.
      mismatched_prompts: trace id to the prompt (int32 ids) that the completion follows in KTO's
        baseline; None where the source has no column for it.
    """

    groups: list[Group]
    format: str
    ignored: list[str]
    counts: dict[str, int]
    mismatched_prompts: dict[str, np.ndarray] | None = None


def read_sequences(
    source: Pairs, tokenizer: ChatTokenizer, kind: str, limit: LengthLimit, workers: int = -1
) -> Preferences:
    """Reads and tokenises `source` for an objective, and drops what cannot be trained on.

    Objectives of examples (KTO, SFT) get a pair as two groups, each of which has its own border
    between prompt and completion, as in TRL. `counts` has

        read                  rows of the source
        prompt_not_prefix     groups whose prompt and answers were tokenised apart, by
                              `text.preference`
        undesirable           examples dropped because SFT trains on desirable ones only
        empty                 groups dropped because an answer is empty
        empty_prompt          rows whose prompt has no text
        shared_prompt         rows of text whose prompt is what both answers begin with
        merged_prompt         groups whose prompt has text and no token: the first one holds the
                              start of the answer too, so that all is completion
        repeated_prompt       rows of text whose answers begin with the whole prompt, which is
                              taken out of them
        echoed_prompt         rows of text with an answer that begins with a prompt of one or two
                              words, kept as it is
        text_among_messages   rows of text, in a source that has rows of messages too
        too_long, truncated, truncated_to_nothing, unscored     see `limit_lengths`
        same                  pairs kept whose two answers have the same tokens
        masked_turns          completion tokens kept that are no targets: the user says them, or
                              the message has the weight 0
        one_label             examples kept, where all of them are of one label
        groups                groups kept

    Args:
      source: place of the data, and number of worker processes.
      tokenizer: of the student; it is pickled for the workers.
      kind: one of `config.OBJECTIVE_KINDS`.
      limit: on the length of sequences.
      workers: overrides `source.workers` and the rule that small sources need fewer.

    Raises:
      ConfigError: the source is missing, damaged or of no known format, a row cannot be read (the
        sentence gives file, line and remedy), the objective needs pairs and there are none, a
        sequence is too long and the rule is "error", or no group is left.
    """
    unit = OBJECTIVE_KINDS[kind].unit
    blocks, columns = open_blocks(
        source,
        lambda names: {
            *columns_read(format_of(source.path, names)),
            *(name for name in names if name.lower() in QUESTION_PARTS),
        },
    )
    name = format_of(source.path, columns)
    if "unpaired" in name and unit == "pair":
        raise ConfigError(
            f"{source.path} holds labelled examples and no pairs, which the objective {kind!r} "
            "needs; set config.objective.kind to 'kto' or 'sft', or give chosen and rejected."
        )
    prepare = functools.partial(
        _prepare, blocks=blocks, name=name, known=set(columns), tokenizer=tokenizer, unit=unit
    )
    read = grain.MapDataset.range(len(blocks)).map(prepare).to_iter_dataset(grain.ReadOptions(0, 0))
    if workers < 0:
        workers = min(source.workers, len(blocks) * BLOCK // 1000)
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which a notebook never parses
    groups: list[Group] = []
    mismatched_prompts: dict[str, np.ndarray] = {}
    seen, counts, shared = set(columns), Counter[str](dict.fromkeys(_COUNTED, 0)), ""
    for block in read.mp_prefetch(grain.MultiprocessingOptions(workers, 2)) if workers else read:
        if block.error:
            raise ConfigError(block.error)
        groups += block.groups
        mismatched_prompts |= block.mismatched_prompts
        seen |= block.columns
        counts.update(block.counts)
        shared = shared or block.shared_prompt
        if shared and "prompt" in seen:
            raise ConfigError(f"{shared}: 'prompt' is missing; fix or remove the row.")
    if counts["text_among_messages"] == counts["read"]:
        counts["text_among_messages"] = 0
    _check_any_left(source.path, len(groups), counts)
    groups, limited = limit_lengths(groups, limit)
    groups = [[s._replace(group=i) for s in group] for i, group in enumerate(groups)]
    ignored = sorted(seen - columns_read(name))
    given = "mismatched_prompt_ids" in seen & columns_read(name)
    return Preferences(
        groups,
        name,
        ignored,
        dict(counts) | limited | _kept(groups, unit),
        mismatched_prompts if given else None,
    )


def _check_any_left(path: str, groups: int, counts: Counter[str]) -> None:
    if groups:
        return
    if not counts["read"]:
        raise ConfigError(f"{path} holds no row; give it some.")
    if not counts["empty"]:
        raise ConfigError(
            f"{path} has no example that is chosen or labelled true, which SFT trains on; choose "
            "another objective."
        )
    raise ConfigError(
        f"All {counts['empty']} pairs or examples of {path} have an empty answer; give it some "
        "that have none."
    )


def _kept(groups: Sequence[Group], unit: str) -> dict[str, int]:
    """Counts of what is trained on."""
    one_label = unit == "example" and len({group[0].desirable for group in groups}) == 1
    masks = [s.scored for group in groups for s in group if s.scored is not None]
    return {
        "same": sum(
            np.array_equal(group[0].completion_ids, group[1].completion_ids)
            for group in groups
            if len(group) == 2
        ),
        "masked_turns": sum(int(np.sum(~mask)) for mask in masks),
        "one_label": len(groups) * one_label,
        "groups": len(groups),
    }


@dataclasses.dataclass
class _Prepared:
    """A block of rows as groups.

    An error travels as its sentence, because an exception in a worker gets Grain's traceback.
    """

    groups: list[Group] = dataclasses.field(default_factory=list)
    columns: set[str] = dataclasses.field(default_factory=set)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    mismatched_prompts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shared_prompt: str = ""  # place of a row of text whose prompt is what its answers begin with
    error: str = ""


class _BrokenRow(ValueError):
    """A row that cannot be used: its place, and what is wrong with it."""


def _prepare(
    number: int, blocks: Blocks, name: str, known: set[str], tokenizer: ChatTokenizer, unit: str
) -> _Prepared:
    columns: set[str] = set()
    examples: list[tuple[str, Example]] = []
    counts, shared_prompt = Counter[str](), ""
    try:
        block = blocks[number]
        for where, raw in block:
            try:
                row = json_row(raw) if isinstance(raw, bytes) else raw
                if row is raw and "ids" not in name:
                    row = without_nulls(row)
                example = read_example(row, name, len(tokenizer.tokenizer), known)
            except ValueError as e:
                raise _BrokenRow(where, e) from e
            columns |= row.keys()
            counts["empty_prompt"] += is_empty(example.prompt)
            if isinstance(example.prompt, str):
                counts["text_among_messages"] += 1
                if "prompt" in row:
                    counts.update(_repeated(row, example))
                else:
                    counts["shared_prompt"] += 1
                    shared_prompt = shared_prompt or where
            examples += _units(where, example, unit)
        tokens = _tokenised(examples, tokenizer)
    except ConfigError as e:  # of the file or the tokenizer, not of one row
        return _Prepared(error=str(e))
    except _BrokenRow as e:
        where, what = e.args
        return _Prepared(error=f"{where}: {what}; fix or remove the row.")
    groups: list[Group] = []
    counts.update(read=len(block), prompt_not_prefix=sum(t.prompt_not_prefix for t in tokens))
    counts["merged_prompt"] = sum(
        not len(ids.prompt) and not is_empty(example.prompt)
        for (_, example), ids in zip(examples, tokens, strict=True)
    )
    for (where, example), ids in zip(examples, tokens, strict=True):
        if unit == "token" and not example.labels[0]:
            counts["undesirable"] += 1
        elif any(map(is_empty, example.completions)):
            counts["empty"] += 1
        else:
            groups.append(list(_sequences(where, example, ids)))
    mismatched_prompts = {
        _without_folder(where): example.mismatched_prompt
        for where, example in examples
        if example.mismatched_prompt is not None
    }
    return _Prepared(groups, columns, dict(counts), mismatched_prompts, shared_prompt)


def _repeated(row: Row, example: Example) -> list[str]:
    """The name of the count of a row of text whose answers begin with its prompt."""
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    if any(is_repeated(example.prompt, answer) for answer in answers):
        return ["repeated_prompt"]
    echoed = example.prompt.strip() and any(a.startswith(example.prompt) for a in answers)
    return ["echoed_prompt"] if echoed else []


def _units(where: str, example: Example, unit: str) -> Iterator[tuple[str, Example]]:
    """An example with its place, or each side of a pair where the objective is one of examples."""
    if unit == "pair" or example.label is not None:
        yield where, example
        return
    for completion, label in zip(example.completions, example.labels, strict=True):
        yield f"{where}, {_side(label)}", example._replace(completions=(completion,), label=label)


def _side(desirable: bool) -> str:
    return "chosen" if desirable else "rejected"


def _tokenised(
    examples: Sequence[tuple[str, Example]], tokenizer: ChatTokenizer
) -> Sequence[Tokens]:
    """Tokens of the examples; a row that the template refuses is found and named."""
    asked = [example for _, example in examples]
    if any(isinstance(example.prompt, np.ndarray) for example in asked):  # token ids in every row
        return [Tokens(example.prompt, example.completions) for example in asked]
    try:
        return tokenise(tokenizer, asked)
    except ConfigError:
        raise
    except ValueError:
        for where, example in examples:
            try:
                tokenise(tokenizer, [example])
            except ValueError as e:
                raise _BrokenRow(_row_of(where), e) from e
        raise


def _sequences(where: str, example: Example, tokens: Tokens) -> Iterator[TokenSequence]:
    name = _without_folder(where)
    prompt = example.prompt.tolist() if isinstance(example.prompt, np.ndarray) else example.prompt
    prompt_id = digest(prompt, example.tools) if example.tools else digest(prompt)
    masks = tokens.scored or (None,) * len(tokens.completions)
    for completion, mask, label in zip(tokens.completions, masks, example.labels, strict=True):
        place = name if example.label is not None else f"{name}, {_side(label)}"
        yield TokenSequence(
            tokens.prompt, completion, mask, trace_id=place, prompt_id=prompt_id, desirable=label
        )


def _without_folder(where: str) -> str:
    """The place of a row as tables have it: that of a file that was moved is the same."""
    row, _, path = where.partition(" of ")
    return f"{row} of {os.path.basename(os.path.normpath(path))}"


def _row_of(place: str) -> str:
    """The place of a row from that of one of its completions."""
    return place.removesuffix(", chosen").removesuffix(", rejected")


def limit_lengths(
    groups: Sequence[Group], limit: LengthLimit
) -> tuple[list[Group], dict[str, int]]:
    """Groups whose sequences have `limit.length` tokens at most, and counts of what was done.

    Counts are `too_long` (groups dropped), `truncated` (sequences shortened),
    `truncated_to_nothing` (groups dropped because no target of a completion would stay) and
    `unscored` (groups dropped because a sequence has no target: a first token has none before it).

    Raises:
      ConfigError: the rule is "error" and a sequence is too long, or nothing is left.
    """
    kept: list[Group] = []
    counts = Counter[str](too_long=0, truncated=0, truncated_to_nothing=0, unscored=0)
    for group in groups:
        if not all(s.targets.any() for s in group):
            counts["unscored"] += 1
            continue
        sizes = [s.length for s in group]
        long = sum(size > limit.length for size in sizes)
        if long and limit.rule == "error":
            raise ConfigError(
                f"{_row_of(group[0].trace_id)} has a sequence of {max(sizes)} tokens, and "
                f"config.training.row_length is {limit.length}; raise it, or set "
                "config.training.over_length to 'drop' or 'truncate'."
            )
        if long and limit.rule == "drop":
            counts["too_long"] += 1
            continue
        cuts = [s for s in (cut(s, limit) for s in group) if s is not None]
        if len(cuts) < len(group):
            counts["truncated_to_nothing"] += 1
            continue
        counts["truncated"] += long
        kept.append(cuts)
    if not kept:
        raise ConfigError(
            f"None of the {len(groups)} pairs or examples is left: {counts['too_long']} are longer "
            f"than config.training.row_length ({limit.length} tokens), "
            f"{counts['truncated_to_nothing']} have no answer within it and {counts['unscored']} "
            "have nothing to score; raise it."
        )
    return kept, dict(counts)


def cut(sequence: TokenSequence, limit: LengthLimit) -> TokenSequence | None:
    """The start (TRL's default) or the end of a sequence; None if no target stays."""
    over = max(0, sequence.length - limit.length)
    prompt, completion, scored = sequence.prompt_ids, sequence.completion_ids, sequence.scored
    if limit.mode == "keep_end":
        answer = slice(max(0, over - len(prompt)), None)
        prompt = prompt[over:]
    else:
        answer = slice(0, max(0, len(completion) - over))
        prompt = prompt[: limit.length]
    mask = None if scored is None or scored[answer].all() else scored[answer]
    shorter = sequence._replace(prompt_ids=prompt, completion_ids=completion[answer], scored=mask)
    return shorter if shorter.targets.any() else None
