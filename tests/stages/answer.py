"""Evaluates a model as a program, for tests that need processes: `python answer.py MODEL ROOT [N]`.

With N the process kills itself when it has sampled N shards and before it writes the last of them.
"""

import os
import signal
import sys

from deltapref_jax.artifacts.lease import release_all
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Experiment, Model, Prompts, Sampling, Suite
from deltapref_jax.preemption import exit_process, install_group_shutdown
from deltapref_jax.processes import start_processes
from deltapref_jax.sampling.engine import Engine
from deltapref_jax.stages.evaluate import ResultTable
from deltapref_jax.stages.study import prompt_table, result_tables

QUESTIONS, SHARD = 8, 3
SHARDS = -(-QUESTIONS // SHARD)


def tables(model: str) -> list[ResultTable]:
    """Results of a model on three suites, in three shards each."""
    suites = tuple(
        Suite(
            name=name,
            samples=samples,
            prompts=Prompts(tasks=(name,), count=QUESTIONS, difficulty=1, seed=5),
        )
        for name, samples in (("chain", 3), ("logic", 1), ("euclid", 2))
    )
    sampling = Sampling(max_prompt=300, max_tokens=40, slots=8, chunk=4, shard=SHARD)
    asked = {
        suite.name: prompt_table(("suite", suite.name), (suite.prompts,), {}) for suite in suites
    }
    e = Experiment(suites=suites, sampling=sampling)
    return list(result_tables(e, ("evaluate",), asked, Model(model), None).values())


def main(model: str, root: str, deadly: str = "0") -> None:
    """Runs alone, or as a process of the JAX job that the environment describes."""
    start_processes()
    install_group_shutdown(release_all)
    real, sampled = Engine.generate, []

    def generate(self, requests, advance=None):
        completions = real(self, requests, advance)
        sampled.append(len(requests))
        if len(sampled) == int(deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        return completions

    Engine.generate = generate
    run(tables(model), Workspace(root), "answers")
    print(len(sampled), flush=True)
    exit_process()


if __name__ == "__main__":
    main(*sys.argv[1:])
