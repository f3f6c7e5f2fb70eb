"""sample: prompts and a generator to traces."""

import functools

import jax
import numpy as np
import pyarrow as pa

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import Generator, MeshShape, Model, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import open_model
from deltapref_jax.records import Prompt, Trace, digest, to_table
from deltapref_jax.sampling.engine import Completion, Engine, Request
from deltapref_jax.stages.prompts import PromptTable


class TraceTable(Node, stage="sample", version=3, sharded=True):
    """TRACE: `generator.samples` traces of every prompt.

    A trace is a function of seed, generator, weights, prompt and sample index; slots, chunk and
    shard change it by rounding at most.

    Attributes:
      weights: hash of the generator's weights.
    """

    prompts: PromptTable
    generator: Generator
    weights: str
    sampling: Sampling
    seed: int
    mesh: MeshShape = runtime()

    @property
    def identity(self) -> str:
        """16 hex digits of what makes the generator: draws and trace ids depend on it."""
        g = self.generator
        manner = {
            "name": g.name,
            "temperature": g.temperature,
            "top_p": g.top_p,
            "top_k": g.top_k,
            "system": g.system,
            "prefix": g.prefix,
        }
        numbers = [g.model.dtype, *filter(None, [g.model.quantization])]
        return digest(manner, self.weights, *numbers)

    def make(self, job: Job) -> None:
        """Samples one shard of `sampling.shard` prompts at a time.

        Raises:
          ValueError: a prompt is longer than config.sampling.max_prompt; nothing has been sampled.
        """
        prompts = job.rows(Prompt, self.prompts)
        g, size = self.generator, self.sampling.shard

        # The model is loaded with the first shard that has to be made.
        @functools.cache
        def engine() -> tuple[Engine, list[Request]]:
            dtype, quantization = g.model.dtype, g.model.quantization
            model = open_model(g.model.place, dtype, dtype, quantization)
            # Every process samples shards of its own, on its own devices.
            mesh = make_mesh(self.mesh, jax.local_devices())
            engine = Engine(model, self.sampling, self.seed, self.identity, mesh)
            requests = [
                Request(
                    prompt.prompt_id,
                    model.text.prompt_ids(asked(prompt, g.system, g.prefix)),
                    g.samples,
                    g.temperature,
                    g.top_p,
                    g.top_k,
                )
                for prompt in prompts
            ]
            engine.check(requests)
            return engine, requests

        def make(shard: int) -> tuple[pa.Table, Stats]:
            sampler, requests = engine()
            # Counts are those of one shard; `Job.shards` adds them up.
            sampler.stats.clear()
            part = requests[shard * size : (shard + 1) * size]
            traces = [
                self._trace(request.prompt_id, sample, completion)
                for request, completions in zip(
                    part, sampler.generate(part, job.advance), strict=True
                )
                for sample, completion in enumerate(completions)
            ]
            return marked(to_table(Trace, traces), g.model), dict(sampler.stats)

        job.shards(-(-len(prompts) // size), make, total=len(prompts) * g.samples)
        stats = job.stats
        stats["utilisation"] = stats["tokens"] / max(stats["slot_steps"], 1)
        stats["tokens_per_second"] = stats["tokens"] / max(stats["seconds"], 1e-9)

    def _trace(self, prompt_id: str, sample: int, completion: Completion) -> Trace:
        limits = (
            self.sampling.max_prompt,
            self.sampling.max_tokens,
            list(self.sampling.stop),
        )
        return Trace(
            trace_id=digest(prompt_id, self.identity, self.seed, limits, sample),
            prompt_id=prompt_id,
            generator=self.generator.name,
            weights=self.weights,
            sample=sample,
            text=completion.text,
            token_ids=np.asarray(completion.tokens, np.int32),
            finish=completion.finish,
            logprob=completion.logprob,
            tokens=len(completion.tokens),
        )


def marked(table: pa.Table, model: Model) -> pa.Table:
    """The table of what a model made; its metadata say so if the model was quantised."""
    if not model.quantization:
        return table
    return table.replace_schema_metadata({"quantization": model.quantization})


def asked(prompt: Prompt, system: str, prefix: str) -> list[dict[str, str]]:
    """The conversation as a generator is asked: with its system message and question prefix."""
    messages = prompt.chat()
    messages[-1]["content"] = prefix + messages[-1]["content"]
    if system:
        others = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": system}, *others]
    return messages
