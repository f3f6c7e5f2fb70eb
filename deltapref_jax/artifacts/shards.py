"""Tables in shards: every process makes the next shards that nobody holds, under leases of its own.

A shard is a Parquet file and a sidecar with its checksum, rows, counts and seconds. The sidecar is
written last, so the shard is done when it stands. Several artifacts can be made from one pool of
shards (`make_shards`): shards of several artifacts may then be made in one pass, and processes that
share the pool wait for each other only at its end.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from deltapref_jax.artifacts.lease import Lease
from deltapref_jax.files import ArtifactError, sha256, write_atomic
from deltapref_jax.processes import agreed, process_count, process_index
from deltapref_jax.progress import Counter

if TYPE_CHECKING:
    from deltapref_jax.artifacts.job import Job

Stats = dict[str, float]

_WAIT_SECONDS = 0.2  # between looks at the shards that other processes of the job hold


class Busy(Exception):
    """Another runner holds what is left of an artifact; the runner comes back to it."""


class Made(NamedTuple):
    """One shard of a pass."""

    table: pa.Table
    stats: Stats
    share: float = 1.0  # of the seconds of its pass


class Shards:
    """The shards of one artifact, and which of them are missing.

    Attributes:
      job: the making of the artifact.
      total: rows in all; None if that is not known.
      sizes: of every shard, in the unit in which a pass is limited.
    """

    def __init__(
        self, job: "Job", sizes: Sequence[int], total: int | None = None, together: bool = False
    ):
        """`total` and `together` are those of `Job.shards`."""
        self.sizes = tuple(sizes) or (0,)
        self.job, self.total = job, total
        self._together = together
        # Where the processes make a shard together, all of them must take the same branch.
        self._decide: Callable[[bool], bool] = agreed if together else bool
        self._writes = process_index() == 0 or not together
        count = len(self.sizes)
        self._names = [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
        self._sidecars: dict[int, dict[str, Any]] = {}  # of the shards that are seen to stand

    @property
    def missing(self) -> list[int]:
        """Indices of the shards that were not seen to stand."""
        return [i for i in range(len(self._names)) if i not in self._sidecars]

    def stands(self, index: int) -> int | None:
        """Rows of a shard that stands, which is noted; None: it is missing."""
        if not self._decide(self._sidecar(index).exists()):
            return None
        self._sidecars[index] = read_sidecar(self.job, self._names[index])
        return self._sidecars[index]["rows"]

    def claim(self, index: int) -> Lease | None:
        """The lease of a shard; None: another process is at it."""
        lease = Lease(self.job.dir / "claims" / self._names[index])
        return lease if self._decide(self._writes and lease.take()) else None

    def log_start(self) -> None:
        """Says in the log that the artifact is being made, and how much of it stands."""
        stood = f" ({len(self._sidecars)} of {len(self._names)} shards stand)"
        self.job.log_start(stood if self._sidecars else "")

    def write(self, index: int, made: Made, seconds: float) -> None:
        """Puts a shard in place, by the one process that writes it."""
        # A process that was suspended past its lease may come after another that made the shard.
        if not self._writes or self._sidecar(index).exists():
            return
        # The file is made in memory, so that the checksum is that of what was meant to be written.
        sink = pa.BufferOutputStream()
        pq.write_table(made.table, sink, compression="zstd", version="2.6", data_page_version="1.0")
        data = sink.getvalue().to_pybytes()
        write_atomic(self.job.dir / f"{self._names[index]}.parquet", data)
        side = {
            "rows": made.table.num_rows,
            "stats": made.stats,
            "sha256": sha256(data),
            "seconds": made.share * seconds,
        }
        write_atomic(self._sidecar(index), json.dumps(side).encode())

    def add_up(self) -> None:
        """Gives the job its files, counts and seconds, when all shards stand."""
        for i, name in enumerate(self._names):
            side = self._sidecars[i]
            self.job.files.append(f"{name}.parquet")
            self.job.shard_seconds += side["seconds"]
            for key, value in (side["stats"] | {"rows": side["rows"]}).items():
                self.job.stats[key] = self.job.stats.get(key, 0) + value

    def _sidecar(self, index: int) -> epath.Path:
        return self.job.dir / f"{self._names[index]}.json"


# The shards of one pass, and what makes them: every shard's table, in the same order.
Pass = list[tuple[Shards, int]]
Make = Callable[[Pass, Callable[[int], None]], Sequence[Made]]


def make_shards(work: Sequence[Shards], make: Make, most: int, unit: str = "traces") -> None:
    """Makes the missing shards of several artifacts, each of which is finished as soon as it can.

    Args:
      work: the shards of every artifact.
      make: the shards of one pass, and a function that moves the bar by so many rows, to tables.
      most: sizes of a pass in all; a bigger shard is a pass of its own.
      unit: of the rows, for the progress bar.

    Raises:
      Busy: other runners hold all shards that are left; artifacts that are complete are finished.
    """
    for job in standing(work, make, most, unit):
        job.conclude()


def standing(work: Sequence[Shards], make: Make, most: int, unit: str) -> "Iterator[Job]":
    """Makes missing shards as `make_shards`, and yields every job when all of its shards stand.

    Raises:
      Busy: other runners hold all shards that are left.
    """
    show = work[0].job.show
    label = os.path.commonprefix([list(part.job.node.label) for part in work])
    totals = [part.total for part in work if part.total is not None]
    total = sum(totals) if len(totals) == len(work) else None
    stood = sum(part.stands(i) or 0 for part in work for i in part.missing)
    left = list(work)
    with Counter("/".join(label), total, unit, show, stood) as counter:
        while left:
            before = sum(len(part.missing) for part in left)
            _make_pass(left, make, most, counter)
            more = sum(len(part.missing) for part in left) < before
            for part in [part for part in left if not part.missing]:
                left.remove(part)
                part.add_up()
                yield part.job
                more = True
            if not more:
                if process_count() == 1:
                    raise Busy
                # The processes of a job take the same steps, so this one waits for the others.
                time.sleep(_WAIT_SECONDS)


def _make_pass(work: Sequence[Shards], make: Make, most: int, counter: Counter) -> None:
    """Makes shards that nobody holds in one pass, and notes those that others have made."""
    # The processes of a job leave each other their part of the pool.
    missing = sum(part.sizes[i] for part in work for i in part.missing)
    most = min(most, -(-missing // process_count()))
    chosen: Pass = []
    with contextlib.ExitStack() as leases:
        for part, i in [(shards, j) for shards in work for j in shards.missing]:
            rows = part.stands(i)
            if rows is None:
                if chosen and sum(p.sizes[j] for p, j in chosen) + part.sizes[i] > most:
                    break
                if (lease := part.claim(i)) is None:
                    continue
                leases.callback(lease.release)
                # Another runner may have finished the shard between the look and the lease.
                rows = part.stands(i)
            if rows is None:
                chosen.append((part, i))
            else:
                counter.advance(rows)
        if chosen:
            _make_claimed(chosen, make, counter)


def _make_claimed(chosen: Pass, make: Make, counter: Counter) -> None:
    advanced = 0

    def advance(rows: int) -> None:
        nonlocal advanced
        advanced += rows
        counter.advance(rows)

    for part, _ in chosen:
        part.log_start()
    began = time.time()
    tables = make(chosen, advance)
    seconds = time.time() - began
    for (part, i), made in zip(chosen, tables, strict=True):
        part.write(i, made, seconds)
        # Rows that the bar counted while the shards were made are not counted again.
        rows = part.stands(i) or 0
        known = min(advanced, rows)
        advanced -= known
        counter.advance(rows - known)


def read_sidecar(job: "Job", name: str) -> dict[str, Any]:
    """What the maker of a shard wrote about it.

    Raises:
      ArtifactError: it is unreadable.
    """
    path = job.dir / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise bad_shard(job, name, f"{path} is unreadable") from e


def bad_shard(job: "Job", name: str, what: str) -> ArtifactError:
    """The sentence for a shard that is not as its maker wrote it."""
    return ArtifactError(
        f"{what} ({job.node.name}); delete {job.dir / name}.json and run again: only that "
        "shard is made anew."
    )
