"""The runner: makes what is missing of the artifacts wanted, taking whatever is ready.

A node is ready when its inputs are complete. What another runner of the workspace holds is skipped
and asked for again later, so that several runners finish a study together. In a JAX job of several
processes process 0 decides, and the others are told; all of them run every stage.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from deltapref_jax.artifacts.job import Finished, Job
from deltapref_jax.artifacts.node import Node, distinct, in_order
from deltapref_jax.artifacts.shards import Busy
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.display import count
from deltapref_jax.files import is_unwritable, unwritable
from deltapref_jax.processes import agreed, process_count, process_index
from deltapref_jax.progress import LOG_EVERY_SECONDS, log

_WAIT_SECONDS = 0.5  # between looks at what other runners hold
_LONGEST_WAIT_SECONDS = 8.0  # between tries at the shards of an artifact that others hold
_INDEX_SECONDS = 10.0  # between updates of index.json


def run(
    wanted: Sequence[Node],
    workspace: Workspace,
    study: str = "",
    show: bool = True,
    verify: bool = False,
    also_named: Sequence[Node] = (),
) -> list[Node]:
    """Makes what is missing of `wanted` and of their inputs, and returns what was made here.

    What stands is left alone.

    Args:
      wanted: nodes of a study.
      workspace: where artifacts are looked up and put.
      study: its name in the index; "" writes none.
      show: progress bars.
      verify: checksums of everything that stands, not only of what is read.
      also_named: nodes that the index names too if they stand.

    Raises:
      ArtifactError: a finished artifact is damaged, or the workspace cannot be written.
    """
    # The inputs of all come first, so that the artifacts of one batch are ready together.
    nodes = in_order([*(source for node in wanted for source in node.inputs().values()), *wanted])
    pending: list[Node] = list(nodes)
    made: list[Node] = []
    waits: dict[Node, float] = {}
    not_before: dict[Node, float] = {}
    waited, indexed = 0.0, time.monotonic()
    while pending:
        before = len(pending)
        for node in list(pending):
            # A node is passed over while an input is missing, or after its batch was made.
            if node not in pending or not agreed(workspace.key(node) is not None):
                continue
            stands = agreed(workspace.complete(node, verify))
            # Clocks of the processes differ, so they agree on whether to try a sharded artifact
            # again.
            if not stands and agreed(time.monotonic() >= not_before.get(node, 0.0)):
                together = _batch(node, pending, workspace)
                with _making(together, workspace, show) as jobs:
                    if jobs and node.batch() is None:
                        node.make(jobs[0])
                    elif jobs:
                        node.make_batch([(job.node, job) for job in jobs])
                made += [job.node for job in jobs if job.finished]
                stands = agreed(workspace.complete(node))
                # To see whether a shard is free costs reading the inputs.
                for each in together if node.sharded else ():
                    waits[each] = min(2 * waits.get(each, _WAIT_SECONDS / 2), _LONGEST_WAIT_SECONDS)
                    not_before[each] = time.monotonic() + waits[each]
            if stands:
                pending.remove(node)
            if study and process_index() == 0 and time.monotonic() - indexed > _INDEX_SECONDS:
                workspace.write_index(study, [*also_named, *nodes])
                indexed = time.monotonic()
        if len(pending) < before:
            waited = 0.0
        else:  # other runners hold all that is ready
            time.sleep(_WAIT_SECONDS)
            waited += _WAIT_SECONDS
            if show and process_index() == 0 and waited % LOG_EVERY_SECONDS < _WAIT_SECONDS:
                held = [node.name for node in pending if workspace.key(node) is not None]
                log(f"Waiting for other runners, who hold {', '.join(held[:3])} …", always=True)
    if process_index() == 0:
        for node in nodes:
            workspace.remove_leftovers(node)
        if study:
            workspace.write_index(study, [*also_named, *nodes])
    agreed(True)  # nobody reads before process 0 has written
    return made


def say_made(wanted: Sequence[Node], made: Sequence[Node], workspace: Workspace) -> None:
    """Says how many of the artifacts behind `wanted` were made here, once they are complete."""
    if process_index() != 0:
        return
    nodes, here = distinct(wanted), {workspace.path(node) for node in made}
    number = sum(workspace.path(node) in here for node in nodes)
    others = f", {len(nodes) - number} stood or made elsewhere" if number < len(nodes) else ""
    log(f"{count(len(nodes), 'artifact')}: {number} made here{others}")


def _batch(node: Node, pending: Sequence[Node], workspace: Workspace) -> list[Node]:
    """The node with all that are ready and that its stage makes together with it."""
    if node.batch() is None:
        return [node]
    return [
        other
        for other in pending
        if type(other) is type(node)
        and other.batch() == node.batch()
        and agreed(workspace.key(other) is not None)
        and not agreed(workspace.complete(other))
    ]


@contextlib.contextmanager
def _making(nodes: Sequence[Node], workspace: Workspace, show: bool) -> Iterator[list[Job]]:
    """Jobs of the nodes, or of those of a batch that no other runner holds; finishes them behind.

    What another runner holds or has finished ends the making without an error.
    """
    jobs: list[Job] = []
    try:
        for node in nodes:
            job = _start(node, workspace, show)
            try:
                if not node.sharded:
                    job.claim()
                jobs.append(job)
            except (Busy, Finished):
                job.close()
        yield jobs
        for job in jobs:
            job.conclude()
        agreed(True)  # the other processes read only what process 0 has finished
    except (Busy, Finished):
        pass
    except Exception as e:
        # A process that was suspended finds the folder changed by its successor. Whatever it fails
        # at, the sentence is that of the lost lease, or another has finished the work.
        for job in jobs:
            job.check_lease()
        if _finished_elsewhere(jobs, workspace):
            return
        if is_unwritable(e):
            raise unwritable(getattr(e, "filename", None) or workspace.root, e) from e
        raise
    finally:
        for job in jobs:
            job.close()


def _finished_elsewhere(jobs: Sequence[Job], workspace: Workspace) -> bool:
    """Whether another runner has finished one of the artifacts meanwhile."""
    # An error that is met here says less than the one that led here.
    with contextlib.suppress(Exception):
        return process_count() == 1 and any(
            not job.finished and workspace.complete(job.node) for job in jobs
        )
    return False


def _start(node: Node, workspace: Workspace, show: bool) -> Job:
    """A job in a folder that is there."""
    job = Job(node, workspace, show)
    try:
        job.dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise workspace.unwritable(e) from e
    return job
