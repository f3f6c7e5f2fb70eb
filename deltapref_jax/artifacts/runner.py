"""The runner: makes what is missing of the artifacts wanted, taking whatever is ready.

A node is ready when its inputs are complete. What another runner of the workspace holds is skipped and asked for again
later, so that several runners finish a study together. In a JAX job of several processes process 0 decides, and the
others are told; all of them run every stage.
"""

import time
from collections.abc import Sequence

from deltapref_jax.artifacts.job import Busy, Finished, Job
from deltapref_jax.artifacts.node import Node, in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.files import UNWRITABLE_ERRNOS, ArtifactError, unwritable
from deltapref_jax.processes import agreed, process_index

_WAIT_SECONDS = 0.5  # between looks at what other runners hold
_INDEX_SECONDS = 10.0  # between updates of index.json


def run(
    wanted: Sequence[Node],
    workspace: Workspace,
    study: str = "",
    show: bool = True,
    verify: bool = False,
) -> None:
    """Makes what is missing of `wanted` and of their inputs; what stands is left alone.

    Args:
      wanted: nodes of a study.
      workspace: where artifacts are looked up and put.
      study: its name in the index; "" writes none.
      show: progress bars.
      verify: checksums of everything that stands, not only of what is read.

    Raises:
      ArtifactError: a finished artifact is damaged, or the workspace cannot be written.
    """
    nodes = in_order(wanted)
    pending = list(nodes)
    indexed = time.monotonic()

    def index() -> None:
        if study and process_index() == 0:
            workspace.write_index(study, nodes)

    while pending:
        advanced = False
        for node in list(pending):
            # an artifact that was made in a batch, or whose inputs are not there yet
            if node not in pending or not agreed(workspace.key(node) is not None):
                continue
            if agreed(workspace.complete(node, verify)):
                pending.remove(node)
                advanced = True
                continue
            advanced |= _make(_batch(node, pending, workspace), workspace, show)
            if time.monotonic() - indexed > _INDEX_SECONDS:
                index()
                indexed = time.monotonic()
        if pending and not advanced:
            time.sleep(_WAIT_SECONDS)
    index()
    agreed(True)  # nobody reads before process 0 has written


def _batch(node: Node, pending: Sequence[Node], workspace: Workspace) -> list[Node]:
    """The node with all that are ready and that its stage would make together with it."""
    if node.batch() is None:
        return [node]
    return [
        other
        for other in pending
        if type(other) is type(node)
        and agreed(workspace.key(other) is not None)
        and other.batch() == node.batch()
        and not agreed(workspace.complete(other))
    ]


def _make(nodes: Sequence[Node], workspace: Workspace, show: bool) -> bool:
    """Makes the nodes that no other runner holds; returns whether anything was made."""
    jobs = [Job(node, workspace, show) for node in nodes]
    held = []
    try:
        for node, job in zip(nodes, jobs, strict=True):
            _make_folder(job, workspace)
            try:
                if node.batch() is not None:
                    job.claim()
                held.append((node, job))
            except (Busy, Finished):
                job.close()
        if not held:
            return False
        type(nodes[0]).make_batch(held)
        if process_index() == 0:
            for _, job in held:
                job.finish()
        return agreed(True)  # the other processes read only what process 0 has finished
    except Busy:
        return False
    except Finished:
        return True
    except OSError as e:
        if e.errno in UNWRITABLE_ERRNOS:
            raise unwritable(e.filename or jobs[0].dir, e) from e
        raise
    finally:
        for job in jobs:
            job.close()


def _make_folder(job: Job, workspace: Workspace) -> None:
    try:
        job.dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ArtifactError(
            f"The workspace {workspace.root} cannot be written ({e.strerror or e}); "
            "choose another with --config.workspace=…"
        ) from e
