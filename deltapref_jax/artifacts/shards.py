"""Tables in shards: every process makes the next shard that nobody holds, under a lease of its own.

A shard is a Parquet file and a sidecar with its checksum, rows, counts and seconds. The sidecar is
written last, so the shard is done when it stands. Several artifacts can be made from one pool of
shards (`make_shards`), so that processes that share them wait for each other only once.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

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


class Shards:
    """The shards of one artifact, and which of them are missing.

    Attributes:
      job: the making of the artifact.
      total: rows in all; None if that is not known.
    """

    def __init__(
        self,
        job: "Job",
        count: int,
        make: Callable[[int], tuple[pa.Table, Stats]],
        total: int | None = None,
        together: bool = False,
    ):
        """The arguments are those of `Job.shards`."""
        count = max(count, 1)
        self.job, self.total = job, total
        self._make, self._together = make, together
        # Where the processes make a shard together, all of them must take the same branch.
        self._decide: Callable[[bool], bool] = agreed if together else bool
        self._names = [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]
        self._sidecars: dict[int, dict[str, Any]] = {}  # of the shards that are seen to stand
        self._advanced = 0  # rows of the shard at hand that the bar counts already

    def look(self) -> int:
        """Notes which shards stand already, and returns their rows."""
        for i, name in enumerate(self._names):
            if self._decide(self._sidecar(name).exists()):
                self._sidecars[i] = read_sidecar(self.job, name)
        return sum(side["rows"] for side in self._sidecars.values())

    def make_free(self, counter: Counter) -> bool:
        """Makes all missing shards that nobody holds; returns whether more stand than before."""
        before = len(self._sidecars)
        for i, name in enumerate(self._names):
            if i in self._sidecars:
                continue
            self._advanced = 0
            self.job.advance = functools.partial(self._advance, counter)
            if self._stands(i, name):
                self._sidecars[i] = read_sidecar(self.job, name)
                # Rows that the bar counted while the shard was made are not counted again.
                counter.advance(self._sidecars[i]["rows"] - self._advanced)
        return len(self._sidecars) > before

    def _advance(self, counter: Counter, rows: int) -> None:
        counter.advance(rows)
        self._advanced += rows

    def all_stand(self) -> bool:
        """Whether no shard is missing."""
        return len(self._sidecars) == len(self._names)

    def add_up(self) -> None:
        """Gives the job its files, counts and seconds, when all shards stand."""
        for i, name in enumerate(self._names):
            side = self._sidecars[i]
            self.job.files.append(f"{name}.parquet")
            self.job.shard_seconds += side["seconds"]
            for key, value in (side["stats"] | {"rows": side["rows"]}).items():
                self.job.stats[key] = self.job.stats.get(key, 0) + value

    def _sidecar(self, name: str) -> Any:
        return self.job.dir / f"{name}.json"

    def _stands(self, index: int, name: str) -> bool:
        """Whether the shard stands; makes it if nobody else is at it."""
        done = self._sidecar(name)
        if self._decide(done.exists()):
            return True
        lease = Lease(self.job.dir / "claims" / name)
        writes = process_index() == 0 or not self._together
        if not self._decide(writes and lease.take()):
            return False
        self.job.log_start(
            f" ({len(self._sidecars)} of {len(self._names)} shards stand)" * bool(self._sidecars)
        )
        try:
            # Another runner may have finished the shard between the look and the lease.
            if self._decide(done.exists()):
                return True
            began = time.time()
            table, stats = self._make(index)
            if writes:
                self._write(name, table, stats, began)
            return self._decide(True)
        finally:
            lease.release()

    def _write(self, name: str, table: pa.Table, stats: Stats, began: float) -> None:
        # The file is made in memory, so that the checksum is that of what was meant to be written.
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", version="2.6", data_page_version="1.0")
        data = sink.getvalue().to_pybytes()
        write_atomic(self.job.dir / f"{name}.parquet", data)
        side = {
            "rows": table.num_rows,
            "stats": stats,
            "sha256": sha256(data),
            "seconds": time.time() - began,
        }
        write_atomic(self._sidecar(name), json.dumps(side).encode())


def make_shards(work: Sequence[Shards], unit: str = "traces") -> None:
    """Makes the missing shards of several artifacts, each of which is finished as soon as it can.

    Args:
      work: the shards of every artifact.
      unit: of the rows, for the progress bar.

    Raises:
      Busy: other runners hold all shards that are left; artifacts that are complete are finished.
    """
    for job in standing(work, unit):
        job.conclude()


def standing(work: Sequence[Shards], unit: str) -> "Iterator[Job]":
    """Makes missing shards, and yields every job when all of its shards stand.

    Raises:
      Busy: other runners hold all shards that are left.
    """
    job = work[0].job
    label = os.path.commonprefix([list(part.job.node.label) for part in work])
    totals = [part.total for part in work if part.total is not None]
    total = sum(totals) if len(totals) == len(work) else None
    stood = sum(part.look() for part in work)
    left = list(work)
    with Counter("/".join(label), total, unit, job.show, stood) as counter:
        while left:
            more = False
            for part in list(left):
                more = part.make_free(counter) or more
                if part.all_stand():
                    part.add_up()
                    left.remove(part)
                    yield part.job
                    more = True
            if not more:
                if process_count() == 1:
                    raise Busy
                # The processes of a job take the same steps, so this one waits for the others.
                time.sleep(_WAIT_SECONDS)


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
