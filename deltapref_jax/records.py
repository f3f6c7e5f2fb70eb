"""Records that stages exchange, and their Parquet tables: one row per trace wherever work is.

A record type declares its table: `schema` reads the columns from the annotations, `to_table` and
`from_table` convert. Joins go by `prompt_id`, `trace_id` and `sequence_id`; all are content hashes,
so they mean the same in every workspace.
"""

import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

Float32 = Annotated[float, pa.float32()]
Floats32 = Annotated[list[float], pa.list_(pa.float32())]
Mask = Annotated[np.ndarray | None, pa.list_(pa.bool_())]  # bool, read as an array
TokenIds = Annotated[np.ndarray, pa.list_(pa.int32())]  # int32, read as an array


class Prompt(NamedTuple):
    """A question."""

    prompt_id: str  # digest of task and messages
    task: str  # synthetic family, reasoning-gym task, or the file's stem
    messages: str  # JSON list of {"role", "content"}; the last message is the user's
    answer: str  # reference answer; "" where there is none
    checker: str  # one of config.CHECKERS, or "module:function"
    # JSON that the checker needs (the problem's parameters; for the user's own checker the other
    # columns of the row), "{}" otherwise
    meta: str

    def chat(self) -> list[dict[str, str]]:
        """The messages, parsed."""
        return json.loads(self.messages)

    @property
    def question(self) -> str:
        """Text of the last message."""
        return str(self.chat()[-1]["content"])


class Trace(NamedTuple):
    """One completion of a prompt by one generator."""

    trace_id: str  # digest of prompt, generator identity and sample index
    prompt_id: str
    generator: str  # name in the config
    weights: str  # hash of the generator's weights
    sample: int  # index among the traces of this prompt by this generator
    text: str  # decoded without special tokens and without the stop string
    token_ids: TokenIds  # as sampled, the end token included where there is one
    finish: str  # "eos", "stop" or "length"
    logprob: float  # nats; sum over token_ids, temperature 1, unfiltered
    tokens: int  # len(token_ids)


class Verdict(NamedTuple):
    """Whether a trace's answer is right."""

    trace_id: str
    correct: bool | None  # None where the prompt has no checker, or its own one cannot say
    answer: str  # what was extracted from the trace; "" if nothing
    note: str  # "", "no answer", "unfinished", "timeout" or the checker's error


class Rating(NamedTuple):
    """One judge's rating of one trace on one dimension."""

    trace_id: str
    judge: str
    dimension: str
    rating: Float32  # expectation over the labels 1 to 5
    spread: Float32  # standard deviation over the labels
    mass: Float32  # probability on the label set before renormalising
    distribution: Floats32  # [5], over the labels 1 to 5, sums to 1


class TokenSequence(NamedTuple):
    """A prompt with a completion, as token ids: what is scored and trained on.

    The first two fields suffice to build one; the others say where it came from.
    """

    prompt_ids: TokenIds
    completion_ids: TokenIds
    scored: Mask = None  # which completion tokens are targets; None: all of them
    trace_id: str = (
        ""  # of the completion; in a file its place, such as "Line 3 of pairs.jsonl, chosen"
    )
    prompt_id: str = ""  # of the prompt in front of the completion
    matched: bool = True  # False: the completion answers another prompt (rows of KTO's baseline)
    group: int | None = (
        None  # data from a file: the two sequences of a pair share a number, chosen first
    )
    desirable: bool | None = None  # data from a file: chosen, or labelled true

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def targets(self) -> np.ndarray:
        """bool [length]: tokens that are scored; a first token never is, nothing predicts it."""
        targets = np.zeros(self.length, bool)
        targets[len(self.prompt_ids) :] = True if self.scored is None else self.scored
        targets[:1] = False
        return targets

    @property
    def sequence_id(self) -> str:
        """16 hex digits of the tokens, of where the completion begins and of what is scored."""
        ids = np.concatenate([[len(self.prompt_ids)], self.prompt_ids, self.completion_ids])
        mask = b"" if self.scored is None else np.packbits(self.scored).tobytes()
        return hashlib.sha256(ids.astype("<i4").tobytes() + mask).hexdigest()[:16]


class LogProb(NamedTuple):
    """Log-probability of a sequence's targets under one model.

    The metadata of the table's schema names the weights and the dtype of the model.
    """

    prompt_id: str  # of the prompt in front of the completion
    trace_id: str  # of the completion
    matched: bool  # False: the completion answers another prompt (rows of KTO's baseline)
    logprob: float | None  # nats; sum over the targets; None where the sequence was too long
    tokens: int  # targets summed over; 0 where the sequence was too long
    sequence_id: str  # of the tokens that were scored: what tables are joined by


class Pair(NamedTuple):
    """A chosen and a rejected trace of one prompt."""

    pair_id: str  # digest of chosen_id and rejected_id
    prompt_id: str
    chosen_id: str  # trace ids
    rejected_id: str
    chosen_model: str  # generator names
    rejected_model: str
    chosen_rating: (
        Floats32 | None
    )  # by the arm's judge, in its order of dimensions; None if unrated
    rejected_rating: Floats32 | None
    chosen_correct: bool | None
    rejected_correct: bool | None


class Result(NamedTuple):
    """Evaluation: one sample of one question."""

    suite: str
    domain: str
    task: str
    prompt_id: str
    sample: int
    text: str  # decoded without special tokens and without the stop string
    answer: str  # what was extracted from the text; "" if nothing
    correct: bool  # an unfinished trace is wrong
    finish: str  # "eos", "stop" or "length"
    logprob: float  # nats; sum over the sampled tokens, temperature 1, unfiltered
    tokens: int


class SuiteAccuracy(NamedTuple):
    """Accuracy on one suite: of a run of an arm, of a generator, or of the student before training.

    Second read-outs have rows of their own.
    """

    arm: str | None  # None: a generator or the student, neither of which has a seed or a draw
    generator: str | None  # None: an arm, or the student before training
    seed: int | None  # of training
    draw: int | None  # of the arm's pairs
    suite: str
    domain: str  # of its questions
    readout: str  # "" averaged into the domain; else a second read-out: accuracy or pass@k, and how
    questions: int
    samples: int  # per question
    accuracy: float  # percent, or pass@k in percent
    low: float  # 95% interval over questions
    high: float
    doubt: str  # why the judge that shaped the arm's pairs can't carry a conclusion; "" if it can


class RateTrial(NamedTuple):
    """A learning rate that an objective tried, by the answers to the tuning questions."""

    learning_rate: float
    questions: int
    accuracy: float  # percent
    low: float  # 95% interval over questions
    high: float
    chosen: bool


class Audit(NamedTuple):
    """A judge's rating of a text that was corrupted on purpose; no prompt has several texts."""

    prompt_id: str
    judge: str
    target: str  # dimension that was corrupted; "" for the text as it was
    degree: int  # 0 (as it was) to 4
    dimension: str  # dimension that was rated
    rating: Float32
    correct: bool | None  # whether the text's answer is right; None where that is not known
    characters: int  # length of the text


class Retest(NamedTuple):
    """A judge's ratings of a pair's traces when its rubric is worded otherwise."""

    chosen_id: str  # trace ids
    rejected_id: str
    judge: str
    wording: int  # index into judging.rubric.PARAPHRASES
    dimension: str
    chosen: Float32  # ratings
    rejected: Float32


Record = TypeVar("Record", bound=tuple)

_COLUMNS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float64(),
    bool: pa.bool_(),
}


@functools.cache
def schema(record: type[Any]) -> pa.Schema:
    """Columns of the table of `record`: names and Arrow types of its fields, in order."""
    hints = typing.get_type_hints(record, include_extras=True)
    return pa.schema([(name, _arrow(hints[name])) for name in record._fields])


def _arrow(hint: Any) -> pa.DataType:
    if typing.get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    if typing.get_origin(hint) in (
        types.UnionType,
        typing.Union,
    ):  # "or None": every column may hold nulls
        return next(_arrow(part) for part in typing.get_args(hint) if part is not type(None))
    return _COLUMNS[hint]


def to_table(record: type[Record], rows: Iterable[Record]) -> pa.Table:
    """Rows as a table of the schema of `record`."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema(record))
    return pa.table(
        [
            pa.array(list(values), field.type)
            for values, field in zip(columns, schema(record), strict=True)
        ],
        schema=schema(record),
    )


def from_table(record: type[Record], table: pa.Table) -> list[Record]:
    """Rows of a table, without columns that `record` does not have; lists of ids are arrays."""
    columns = [
        _arrays(table[field.name])
        if field.type in (pa.list_(pa.int32()), pa.list_(pa.bool_()))
        else table[field.name].to_pylist()
        for field in schema(record)
    ]
    return [record(*values) for values in zip(*columns, strict=True)]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """A column of lists as arrays, without a Python object per element."""
    arrays: list[np.ndarray | None] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        flat = chunk.values.to_numpy(zero_copy_only=False)
        present = chunk.is_valid().to_pylist()
        arrays += [
            flat[start:stop] if valid else None
            for start, stop, valid in zip(offsets[:-1], offsets[1:], present, strict=True)
        ]
    return arrays


def digest(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of `parts` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
