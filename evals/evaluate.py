"""A policy and suites of questions to results, question by question."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import pyarrow as pa

from deltapref_jax.config import Generator, MeshShape, Model, Sampling, Suite
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load, weights_hash
from deltapref_jax.records import RESULT, digest, table
from deltapref_jax.sampling.engine import Engine, Request
from deltapref_jax.stages.sample import messages
from deltapref_jax.stages.verify import verdict
from deltapref_jax.workspace import Job, Stats

VERSION = 4
_IDENTITY = digest(
    "evaluation"
)  # for the draws: every policy meets the same uniforms, so that differences pair
_PLAIN = {"system": "", "prefix": ""}


def describe(
    suites: Sequence[Suite],
    sampling: Sampling,
    seed: int,
    mesh: MeshShape,
    model: Model,
    trained: bool,
    generator: Generator | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an `evaluate` node hashes, and what it only carries (`Node.config` and `Node.local`).

    Args:
      suites: each needs an input `suite/<name>`, the node of its prompts.
      sampling: shapes of the decoding loop.
      seed: shared by all policies that are compared.
      mesh: of the local devices.
      model: what is evaluated; of a trained policy only the dtype counts.
      trained: the policy is `policy` in the directory of the input `policy`; otherwise it is at `model.path`.
      generator: whose capability is measured, so that the questions are asked and answered in its manner (system
        message, prefix, temperature, top-p, top-k); None: a policy, asked plainly at the suites' temperatures.
    """
    asked: list[dict[str, Any]] = [
        {
            "name": s.name,
            "domain": s.domain,
            "samples": s.samples,
            "temperature": s.temperature,
            "top_p": 1.0,
            "top_k": 0,
        }
        | _PLAIN
        for s in suites
    ]
    if generator:
        manner = {
            name: getattr(generator, name)
            for name in ("temperature", "top_p", "top_k", "system", "prefix")
        }
        asked = [suite | manner for suite in asked]
    config = {
        "suites": asked,
        "sampling": dataclasses.asdict(sampling),
        "seed": seed,
        "dtype": model.dtype,
        "version": VERSION,
    }
    if not trained:
        config["weights"] = weights_hash(model.path)
    return config, {
        "model": {"path": "" if trained else model.path},
        "mesh": dataclasses.asdict(mesh),
    }


def evaluate(job: Job) -> None:
    """Answers the questions of all suites in one pass and checks them.

    Raises:
      ValueError: a question is longer than config.sampling.max_prompt, or has no checker.
    """
    config, questions = job.config, job.tables("suite")
    asked = [
        (suite, prompt)
        for suite in config["suites"]
        for prompt in questions[suite["name"]].to_pylist()
    ]
    for suite, prompt in asked:
        if not prompt["checker"]:
            raise ValueError(
                f"Question {prompt['prompt_id']} of suite {suite['name']!r} has no checker; "
                "set the checker of the suite's prompts."
            )

    def make(_: int) -> tuple[pa.Table, Stats]:
        path = job.local["model"]["path"] or str(job.here("policy", "policy"))
        model = load(path, dtype=config["dtype"], params=config["dtype"])
        mesh = make_mesh(MeshShape(**job.local["mesh"]), jax.local_devices())
        engine = Engine(model, Sampling(**config["sampling"]), config["seed"], _IDENTITY, mesh)
        requests = [
            Request(
                prompt["prompt_id"],
                model.text.prompt_ids(messages(prompt, suite)),
                suite["samples"],
                suite["temperature"],
                suite["top_p"],
                suite["top_k"],
            )
            for suite, prompt in asked
        ]
        rows = []
        for (suite, prompt), traces in zip(asked, engine.generate(requests), strict=True):
            for s, trace in enumerate(traces):
                found = verdict(
                    prompt, {"trace_id": "", "text": trace.text, "finish": trace.finish}
                )
                rows.append(
                    {
                        "suite": suite["name"],
                        "domain": suite["domain"],
                        "task": prompt["task"],
                        "prompt_id": prompt["prompt_id"],
                        "sample": s,
                        "correct": bool(found["correct"]),
                        "finish": trace.finish,
                        "tokens": len(trace.tokens),
                    }
                )
        return table(RESULT, rows), dict(engine.stats)

    job.shards(1, make, total=sum(suite["samples"] for suite, _ in asked))
