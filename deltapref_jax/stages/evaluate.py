"""evaluate: a model's answers to the questions of one suite, checked, sample by sample."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import jax
import pyarrow as pa

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.shards import Shards, Stats, make_shards
from deltapref_jax.config import MeshShape, Model, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load
from deltapref_jax.records import Prompt, Result, digest, to_table
from deltapref_jax.sampling.engine import Completion, Engine, Request
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import asked
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.verify import verdict

# Of the draws: every policy meets the same uniforms, so that differences between policies pair.
_IDENTITY = digest("evaluation")


class ResultTable(Node, stage="evaluate", version=6, sharded=True):
    """RESULT: one model on one suite. The missing suites of one model share one engine.

    An answer is a function of seed, model, question and sample index; which shard it is in, and who
    makes that, change it by rounding at most.

    Attributes:
      policy: what is evaluated, where it was trained here; None: the model at `model.path`.
      weights: hash of that model's weights; "" of a trained policy.
      temperature: of the suite, or of the generator whose capability is measured; so are `top_p`,
        `top_k`, `system` and `prefix` (a policy is asked plainly).
      model: of a trained policy only its dtype counts.
    """

    questions: PromptTable
    policy: Policy | None
    weights: str
    suite: str
    domain: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    system: str
    prefix: str
    sampling: Sampling
    seed: int
    model: Model
    mesh: MeshShape = runtime()

    def batch(self) -> object:
        """All suites of one model: its weights are loaded once, and processes share its shards."""
        return self.policy or (self.weights, self.model.path, self.model.dtype, self.sampling)

    @classmethod
    def make_batch(cls, work: Sequence[tuple[Self, Job]]) -> None:
        """Answers and checks one shard of `sampling.shard` questions at a time, of all suites.

        Raises:
          ValueError: a question is longer than config.sampling.max_prompt, or has no checker;
            nothing has been sampled.
        """
        questions: dict[ResultTable, list[Prompt]] = {
            node: job.rows(Prompt, node.questions) for node, job in work
        }
        # Questions are checked before a model is loaded.
        for node, prompts in questions.items():
            node._check_checkers(prompts)
        # The model is loaded with the first shard that has to be made, and serves all of them.
        sampler = functools.cache(lambda: _sampler(*work[0], questions))
        make_shards([node._shards(job, questions[node], sampler) for node, job in work])

    def _shards(
        self,
        job: Job,
        prompts: Sequence[Prompt],
        sampler: Callable[[], tuple[Engine, dict["ResultTable", list[Request]]]],
    ) -> Shards:
        size = self.sampling.shard

        def make(shard: int) -> tuple[pa.Table, Stats]:
            engine, requests = sampler()
            # Counts are those of one shard; they are added up when all shards stand.
            engine.stats.clear()
            part = slice(shard * size, (shard + 1) * size)
            answers = engine.generate(requests[self][part], job.advance)
            results = self._results(zip(prompts[part], answers, strict=True))
            return to_table(Result, results), dict(engine.stats)

        return Shards(job, -(-len(prompts) // size), make, len(prompts) * self.samples)

    def _check_checkers(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not prompt.checker:
                raise ValueError(
                    f"Question {prompt.prompt_id} of suite {self.suite!r} has no checker; set the "
                    "checker of the suite's prompts."
                )

    def _request(self, prompt: Prompt, tokens: Sequence[int]) -> Request:
        return Request(
            prompt.prompt_id, tokens, self.samples, self.temperature, self.top_p, self.top_k
        )

    def _results(self, answered: Iterable[tuple[Prompt, Sequence[Completion]]]) -> list[Result]:
        checked = [
            (prompt, sample, completion, verdict(prompt, "", completion.text, completion.finish))
            for prompt, completions in answered
            for sample, completion in enumerate(completions)
        ]
        return [
            Result(
                suite=self.suite,
                domain=self.domain,
                task=prompt.task,
                prompt_id=prompt.prompt_id,
                sample=sample,
                text=completion.text,
                answer=said.answer,
                correct=bool(said.correct),
                finish=completion.finish,
                logprob=completion.logprob,
                tokens=len(completion.tokens),
            )
            for prompt, sample, completion, said in checked
        ]


def _sampler(
    node: ResultTable, job: Job, questions: Mapping[ResultTable, Sequence[Prompt]]
) -> tuple[Engine, dict[ResultTable, list[Request]]]:
    """The engine of a node's model, and the requests of every suite, whose lengths are checked."""
    path = job.local_input(node.policy, "policy") if node.policy else node.model.path
    model = load(str(path), dtype=node.model.dtype, params=node.model.dtype)
    # Every process answers shards of its own, on its own devices.
    mesh = make_mesh(node.mesh, jax.local_devices())
    engine = Engine(model, node.sampling, node.seed, _IDENTITY, mesh)
    requests = {
        suite: [
            suite._request(prompt, model.text.prompt_ids(asked(prompt, suite.system, suite.prefix)))
            for prompt in prompts
        ]
        for suite, prompts in questions.items()
    }
    for of_suite in requests.values():
        engine.check(of_suite)
    return engine, requests
