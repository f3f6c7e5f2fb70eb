"""tokens: traces, or a file of preference data, to sequences of token ids, once per tokenizer.

    TRACE  ──the ids that were sampled, or the text under another tokenizer──▶ SEQUENCE
    file   ──text, messages or ids, under the length rule────────────────────▶ SEQUENCE

Scoring and training read this table and nothing else, so a trace has the same tokens when it is
sampled, scored and trained on. KTO's baseline needs every completion once more, behind another
prompt: these mismatched sequences are rows of the same table.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Model, Pairs
from deltapref_jax.data.preferences import LengthLimit, cut, read_sequences
from deltapref_jax.models.folder import resolve
from deltapref_jax.records import Prompt, TokenSequence, Trace, digest, to_table
from deltapref_jax.scoring.derange import derange
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import TraceTable
from deltapref_jax.text.template import ChatTokenizer

_DERANGEMENT_SEED = 0  # one for all studies and files, so that they can share reference tables


class SequenceTable(Node, stage="tokens", version=3, sharded=True):
    """SEQUENCE: prompts with completions, matched and mismatched, under one tokenizer.

    Attributes:
      tokenizer: `ChatTokenizer.identity` of the tokenizer.
      model: where the tokenizer is.
    """

    tokenizer: str
    model: Model = runtime()

    def load_tokenizer(self) -> ChatTokenizer:
        """The tokenizer whose ids these are."""
        return ChatTokenizer.load(resolve(self.model.place, weights=False))


class TraceSequences(SequenceTable):
    """Of the traces of one generator.

    Attributes:
      sampled: whether the generator has this tokenizer and template: then its sampled ids are the
        completion; otherwise its text is tokenised, with the end token where the trace ended so.
      shard: traces in one shard; its sequences are all matched ones, then all mismatched ones.
    """

    prompts: PromptTable
    traces: TraceTable
    sampled: bool
    shard: int

    def make(self, job: Job) -> None:
        """Counts `retokenised_differently`: traces whose text would have given other ids."""
        tokenizer = self.load_tokenizer()
        prompts = {
            prompt.prompt_id: np.asarray(tokenizer.prompt_ids(prompt.chat()), np.int32)
            for prompt in job.rows(Prompt, self.prompts)
        }
        traces = job.rows(Trace, self.traces)
        partners = derange([trace.prompt_id for trace in traces], _DERANGEMENT_SEED)

        def make(shard: int) -> tuple[pa.Table, Stats]:
            part = range(shard * self.shard, min((shard + 1) * self.shard, len(traces)))
            completions, differently = self._completions(tokenizer, [traces[i] for i in part])
            matched = [
                TokenSequence(
                    prompts[traces[i].prompt_id],
                    completion,
                    trace_id=traces[i].trace_id,
                    prompt_id=traces[i].prompt_id,
                )
                for i, completion in zip(part, completions, strict=True)
            ]
            mismatched = [
                sequence._replace(
                    prompt_ids=prompts[traces[partners[i]].prompt_id],
                    prompt_id=traces[partners[i]].prompt_id,
                    matched=False,
                )
                for i, sequence in zip(part, matched, strict=True)
            ]
            return to_table(TokenSequence, matched + mismatched), {
                "traces": float(len(part)),
                "retokenised_differently": float(differently),
            }

        job.shards(-(-len(traces) // self.shard), make, "rows", 2 * len(traces))

    def _completions(
        self, tokenizer: ChatTokenizer, traces: Sequence[Trace]
    ) -> tuple[list[np.ndarray], int]:
        """Token ids of every trace, and how many would have been others had the text been read."""
        encoded = tokenizer.completions_ids(
            [trace.text for trace in traces], [trace.finish == "eos" for trace in traces]
        )
        retokenised = [np.asarray(ids, np.int32) for ids in encoded]
        if not self.sampled:
            return retokenised, 0
        sampled = [trace.token_ids for trace in traces]
        differently = sum(
            not np.array_equal(*ids) for ids in zip(sampled, retokenised, strict=True)
        )
        return sampled, differently


class FileSequences(SequenceTable):
    """Of a file of preference data; the schema's metadata names its format and ignored columns.

    Attributes:
      content: hash of the file or folder, or the hub data set's name.
      data: where it is and how it is read.
      kind: of the objective: which sequences it trains on, and whether it needs mismatched ones.
      limit: the length rule.
    """

    content: str
    data: Pairs
    kind: str
    limit: LengthLimit

    def make(self, job: Job) -> None:
        """Reads and tokenises the file in one shard."""
        job.shards(1, lambda _: self.read(), "rows")

    def read(self) -> tuple[pa.Table, Stats]:
        """Reads and tokenises the file.

        Returns:
          The whole table, and its counts (see `read_sequences` and `_mismatched`).

        Raises:
          ConfigError: what `read_sequences`, `derange` and the length rule refuse.
        """
        read = read_sequences(self.data, self.load_tokenizer(), self.kind, self.limit)
        rows = [sequence for group in read.groups for sequence in group]
        counts = {name: float(count) for name, count in read.counts.items()}
        if OBJECTIVE_KINDS[self.kind].baseline:
            mismatched, dropped = self._mismatched(rows, read.mismatched_prompts)
            rows, counts = rows + mismatched, counts | dropped
        about = {"format": read.format, "ignored": json.dumps(read.ignored)}
        return to_table(TokenSequence, rows).replace_schema_metadata(about), counts

    def _mismatched(
        self, rows: Sequence[TokenSequence], given: Mapping[str, np.ndarray] | None
    ) -> tuple[list[TokenSequence], Stats]:
        """Every completion behind another prompt, under the length rule.

        Args:
          rows: matched.
          given: trace id to the prompt that the file brings for the completion, which has no
            mismatched row (counted as dropped) where there is none; None: prompts are drawn.

        Raises:
          ConfigError: the rule is "error" and such a sequence is too long.
        """
        mismatched: list[TokenSequence] = []
        dropped = truncated = 0
        for row, other, prompt in _behind_other_prompts(rows, given):
            if other is None:
                dropped += 1
                continue
            too_long = other.length > self.limit.length
            if too_long and self.limit.rule == "error":
                raise ConfigError(
                    f"{row.trace_id} has a completion that is {other.length} tokens long behind "
                    f"{prompt} (KTO's baseline), and "
                    f"config.training.row_length is {self.limit.length}; raise it, or set "
                    "config.training.over_length to 'drop' or 'truncate'."
                )
            drop = too_long and self.limit.rule == "drop"
            kept = None if drop else cut(other, self.limit)
            dropped += kept is None
            truncated += kept is not None and too_long
            mismatched += [] if kept is None else [kept]
        return mismatched, {
            "dropped_mismatched": float(dropped),
            "truncated_mismatched": float(truncated),
        }


def _behind_other_prompts(
    rows: Sequence[TokenSequence], given: Mapping[str, np.ndarray] | None
) -> Iterator[tuple[TokenSequence, TokenSequence | None, str]]:
    """Every row, the row with another prompt (None: it has none), and where that prompt is from."""
    partners = derange([row.prompt_id for row in rows], _DERANGEMENT_SEED) if given is None else []
    for i, row in enumerate(rows):
        other = row._replace(matched=False, group=None, desirable=None)
        if given is None:
            partner = rows[partners[i]]
            prompt_ids, prompt_id = partner.prompt_ids, partner.prompt_id
            yield (
                row,
                other._replace(prompt_ids=prompt_ids, prompt_id=prompt_id),
                f"the prompt of {partner.trace_id}",
            )
        elif row.trace_id in given:
            ids = given[row.trace_id]
            other = other._replace(prompt_ids=ids, prompt_id=digest(ids.tolist()))
            yield row, other, "its mismatched_prompt_ids"
        else:
            yield row, None, ""
