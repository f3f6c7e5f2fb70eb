"""score: log-probabilities of sequences under one model, the reference of DPO and KTO."""

import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import ConfigError, MeshShape, Model
from deltapref_jax.files import content_hash, local_copy
from deltapref_jax.mesh import make_mesh, rows_of
from deltapref_jax.models.weights import open_model
from deltapref_jax.records import LogProb, TokenSequence, to_table
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.stages.tokens import SequenceTable


class LogProbTable(Node, stage="score", version=4, sharded=True):
    """LOGPROB: one row per sequence; the schema's metadata names the weights that scored it.

    Attributes:
      weights: hash of the model's weights.
      rows: B of a packed batch.
      row_length: L of a packed batch; longer sequences have no log-probability.
      shard: sequences in one shard.
      known: content of `table`, "" without one.
      model: where the weights are.
      table: Parquet file or folder of log-probabilities that need not be computed again, or "".
    """

    sequences: SequenceTable
    weights: str
    dtype: str
    rows: int
    row_length: int
    shard: int
    known: str = ""
    model: Model = runtime()
    table: str = runtime(default="")
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Scores what `table` does not hold; counts what it held as `from_table`."""
        sequences = job.rows(TokenSequence, self.sequences)
        known = read_logprobs(table_files(self.table), self.weights) if self.table else {}
        # The model is loaded with the first sequence that the table does not hold.
        model = functools.cache(lambda: open_model(self.model.place, self.dtype, self.dtype))

        def make(shard: int) -> tuple[pa.Table, Stats]:
            part = sequences[shard * self.shard : (shard + 1) * self.shard]
            keys = [sequence.sequence_id for sequence in part]
            new = [i for i, key in enumerate(keys) if key not in known]
            logprobs = [known.get(key) for key in keys]
            stats = {"from_table": float(len(part) - len(new))}
            if new:
                loaded, mesh = model(), make_mesh(self.mesh)
                scores = score_sequences(
                    loaded.spec,
                    loaded.state,
                    [part[i] for i in new],
                    rows_of(self.rows, mesh.shape),
                    self.row_length,
                    mesh,
                    self.dtype,
                )
                for i, logprob in zip(new, scores.sums, strict=True):
                    logprobs[i] = logprob
                stats |= {"positions": scores.positions, "filled": scores.filled}
            read = sum(part[i].length for i in new if logprobs[i] is not None)
            rows = [
                LogProb(
                    sequence.prompt_id,
                    sequence.trace_id,
                    sequence.matched,
                    logprob,
                    0 if logprob is None else int(sequence.targets.sum()),
                    key,
                )
                for sequence, logprob, key in zip(part, logprobs, keys, strict=True)
            ]
            # The metadata lets a later run refuse a table that other weights made.
            about = {"weights": self.weights, "dtype": self.dtype}
            return to_table(LogProb, rows).replace_schema_metadata(about), stats | {
                "tokens": float(read),
                "too_long": float(logprobs.count(None)),
            }

        count = -(-len(sequences) // self.shard)
        job.shards(count, make, "rows", len(sequences), together=True)


def logprobs_of(table: pa.Table) -> dict[str, float]:
    """Log-probability by sequence id, of the sequences that have one."""
    columns = table["sequence_id"].to_pylist(), table["logprob"].to_pylist()
    return {key: value for key, value in zip(*columns, strict=True) if value is not None}


def check_weights(table: pa.Schema, weights: str, where: object) -> None:
    """Refuses log-probabilities that other weights than `weights` made.

    Raises:
      ConfigError: `where` names no weights, or others, or is no table of log-probabilities.
    """
    if not {"sequence_id", "logprob"} <= set(table.names):
        raise ConfigError(
            f"{where} has the columns {', '.join(table.names)} and is no table of "
            "log-probabilities, which has sequence_id and logprob; leave config.table empty to "
            "have them computed."
        )
    made = (table.metadata or {}).get(b"weights", b"").decode()
    if made != weights:
        raise ConfigError(
            f"The table {where} was made by the weights {made or '(not named)'} and the reference "
            f"has the weights {weights}; name the model that made it in config.reference.path, or "
            "leave config.table empty to have it computed."
        )


def table_files(path: str) -> list[Path]:
    """Parquet files of a table: the file itself, or all in a folder and its folders.

    Raises:
      ConfigError: there is none.
    """
    place = Path(local_copy(path))
    files = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
    if not files:
        raise ConfigError(
            f"There is no Parquet file at {path}; check config.table, or leave it empty to have "
            "the log-probabilities computed."
        )
    return files


def known_table(path: str, weights: str) -> str:
    """Content of a table that is to be used, after looking at it; "" where no table is given.

    Raises:
      ConfigError: there is no table at `path`, or `weights` did not make it.
    """
    if not path:
        return ""
    for file in table_files(path):
        check_table_file(file, weights)
    return content_hash(Path(local_copy(path)))


def read_logprobs(files: list[Path], weights: str) -> dict[str, float]:
    """Log-probability by sequence id, from tables that `weights` made.

    Raises:
      ConfigError: a file is not readable, or not made by these weights.
    """
    known: dict[str, float] = {}
    for file in files:
        check_table_file(file, weights)
        known |= logprobs_of(pq.read_table(file))
    return known


def check_table_file(file: Path, weights: str) -> None:
    """Refuses a file that is no table of log-probabilities by `weights`; reads its schema alone.

    Raises:
      ConfigError: see `check_weights`, or the file is not readable.
    """
    try:
        schema = pq.read_schema(file)
    except Exception as e:  # pyarrow raises many kinds for a damaged file
        raise ConfigError(f"{file} is not a readable Parquet file ({e}); write it again.") from e
    check_weights(schema, weights, file)


def input_logprobs(job: Job, node: LogProbTable, weights: str) -> dict[str, float]:
    """Log-probability by sequence id, from an input table.

    Raises:
      ConfigError: other weights than `weights` made it.
    """
    table = job.table(node)
    check_weights(table.schema, weights, job.workspace.path(node))
    return logprobs_of(table)
