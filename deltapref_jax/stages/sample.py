"""Prompts and a generator to traces."""

import dataclasses
import functools
import json
from typing import Any

import jax
import pyarrow as pa

from deltapref_jax.config import Generator, MeshShape, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load, weights_hash
from deltapref_jax.records import TRACE, digest, table
from deltapref_jax.sampling.engine import Engine, Request
from deltapref_jax.workspace import Job, Stats

VERSION = 2


def describe(
    generator: Generator, sampling: Sampling, seed: int, mesh: MeshShape
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a `sample` node of `generator` hashes, and what it only carries (`Node.config` and `Node.local`).

    Raises:
      FileNotFoundError: there is no model at `generator.model.path`.
    """
    asked = dataclasses.asdict(generator)
    model = asked.pop("model")
    asked.pop("about")  # words for the page change no trace
    config = {
        "generator": asked,
        "weights": weights_hash(model["path"]),
        "dtype": model["dtype"],
        "sampling": dataclasses.asdict(sampling),
        "seed": seed,
    }
    return config, {"model": {"path": model["path"]}, "mesh": dataclasses.asdict(mesh)}


def sample(job: Job) -> None:
    """Samples every prompt of the input `prompts`; one shard is `sampling.shard` prompts.

    A trace is a function of seed, generator, weights, prompt and sample index; slots, chunk and shard change it by
    rounding at most.

    Raises:
      ValueError: a prompt is longer than config.sampling.max_prompt; nothing has been sampled.
    """
    config = dict(job.config)
    sampling, generator = Sampling(**config["sampling"]), config["generator"]
    prompts = job.table("prompts").to_pylist()
    limits = (sampling.max_prompt, sampling.max_tokens, list(sampling.stop))
    manner = {name: value for name, value in generator.items() if name != "samples"}
    identity = digest(manner, config["weights"], config["dtype"])

    @functools.cache
    def engine() -> tuple[Engine, list[Request]]:
        model = load(job.local["model"]["path"], dtype=config["dtype"], params=config["dtype"])
        mesh = make_mesh(MeshShape(**job.local["mesh"]), jax.local_devices())
        engine = Engine(model, sampling, config["seed"], identity, mesh)
        requests = [
            Request(
                prompt["prompt_id"],
                model.text.prompt_ids(messages(prompt, generator)),
                generator["samples"],
                generator["temperature"],
                generator["top_p"],
                generator["top_k"],
            )
            for prompt in prompts
        ]
        engine.check(requests)
        return engine, requests

    def make(shard: int) -> tuple[pa.Table, Stats]:
        sampler, requests = engine()
        sampler.stats.clear()
        mine = requests[shard * sampling.shard : (shard + 1) * sampling.shard]
        rows = [
            {
                "trace_id": digest(request.prompt_id, identity, config["seed"], limits, s),
                "prompt_id": request.prompt_id,
                "generator": generator["name"],
                "weights": config["weights"],
                "sample": s,
                "text": trace.text,
                "token_ids": trace.tokens,
                "finish": trace.finish,
                "logprob": trace.logprob,
                "tokens": len(trace.tokens),
            }
            for request, traces in zip(mine, sampler.generate(mine), strict=True)
            for s, trace in enumerate(traces)
        ]
        return table(TRACE, rows), dict(sampler.stats)

    job.shards(-(-len(prompts) // sampling.shard), make, total=len(prompts) * generator["samples"])
    job.stats["utilisation"] = job.stats["tokens"] / max(job.stats["slot_steps"], 1)
    job.stats["tokens_per_second"] = job.stats["tokens"] / max(job.stats["seconds"], 1e-9)


def messages(prompt: dict[str, Any], generator: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation as this generator is asked: its system message first, its prefix before the question."""
    asked = [dict(message) for message in json.loads(prompt["messages"])]
    asked[-1]["content"] = generator["prefix"] + asked[-1]["content"]
    if generator["system"]:
        others = [message for message in asked if message["role"] != "system"]
        return [{"role": "system", "content": generator["system"]}, *others]
    return asked
