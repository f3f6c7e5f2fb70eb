"""Continuous batching: a fixed number of slots, which are refilled as traces end.

    requests ──▶ prefill (once per prompt) ──▶ insert into free slots ──▶ advance ──▶ traces
                                                     ▲                       │
                                                     └─────── next chunk ────┘

The host waits for the tokens of a chunk (some decoding steps), refills slots, dispatches the next
chunk, and detokenises the traces that ended while the device works. Prompts are taken longest
first, because these are expected to take longest.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from deltapref_jax.config import MeshShape, Sampling
from deltapref_jax.mesh import make_mesh, place
from deltapref_jax.models.decoder import Cache, empty_cache, unstacked
from deltapref_jax.models.sharding import ROWS, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, abstract
from deltapref_jax.sampling.draw import request_keys
from deltapref_jax.sampling.plan import Plan
from deltapref_jax.sampling.programs import (
    Chunk,
    Slots,
    advance,
    compile_seconds,
    grow,
    insert,
    prefill,
)
from deltapref_jax.sampling.stopping import before_stop, stopped_length


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and its sampling parameters."""

    prompt_id: str  # hexadecimal, 16 digits; the draws depend on it
    tokens: Sequence[int]  # the prompt
    samples: int = 1  # number of traces
    temperature: float = 1.0  # 0 decodes greedily
    top_p: float = 1.0  # 1 turns the filter off
    top_k: int = 0  # 0 turns the filter off


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished trace."""

    tokens: list[int]  # with the end token, if it ended with one
    text: str  # without the end token and the stop string
    finish: str  # the reason that it ended: "eos", "stop" or "length"
    logprob: float  # sum over `tokens` in nats, unfiltered and at temperature 1


@dataclasses.dataclass
class _Trace:
    """An unfinished trace: its identity, its prefilled prompt and its tokens so far."""

    request: int  # index of the request
    sample: int  # index among the traces of the request
    key: np.ndarray
    prompts: Cache | None  # the cache that holds its prompt; None once the trace is in a slot
    row: int  # row of the prompt in `prompts`
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: str = ""


@dataclasses.dataclass
class _SlotTable:
    """The host's copy of the slots' state, and the traces in them."""

    slots: Slots
    traces: dict[int, _Trace]

    @classmethod
    def empty(cls, count: int) -> "_SlotTable":
        """Returns a table of `count` free slots."""
        return cls(
            Slots(
                token=np.zeros(count, np.int32),
                position=np.zeros(count, np.int32),
                generated=np.zeros(count, np.int32),
                alive=np.zeros(count, bool),
                keys=np.zeros((count, 2), np.uint32),
                temperature=np.ones(count, np.float32),
                top_p=np.ones(count, np.float32),
                top_k=np.zeros(count, np.int32),
            ),
            {},
        )

    def assign(self, slot: int, trace: _Trace, request: Request) -> None:
        """Starts a trace in a slot; the first decoding step feeds the last prompt token."""
        values = (
            request.tokens[-1],
            len(request.tokens) - 1,
            0,
            True,
            trace.key,
            request.temperature,
            request.top_p,
            request.top_k,
        )
        # `values` are in the order of the fields of `Slots`.
        for column, value in zip(self.slots, values, strict=True):
            column[slot] = value
        self.traces[slot] = trace


def _batched(items: Iterator[int], size: int) -> Iterator[list[int]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _new_cache(
    spec: ModelSpec, slots: int, length: int, dtype: jnp.dtype, sharding: NamedSharding
) -> Cache:
    mesh: Any = sharding.mesh  # of devices, never an abstract one
    cache = empty_cache(spec, slots, length, dtype, mesh)
    return jax.lax.with_sharding_constraint(cache, sharding)


class Engine:
    """Samples traces of one model.

    The result of a request does not depend on other requests or on their order. Engines of models
    of one shape share their compiled programs.

    Attributes:
      stats: sums over all calls since it was last cleared: `tokens` kept, `truncated` traces,
        decoding `steps`, `slot_steps` (steps times slots, the cost of the tokens),
        `prompt_tokens`, `padded_prompt_tokens`, `seconds`, and `compile_seconds` within these.
    """

    def __init__(
        self,
        model: LoadedModel,
        sampling: Sampling,
        seed: int,
        generator: str,
        mesh: Mesh | None = None,
    ):
        """Places the weights on the mesh.

        Args:
          model: its weights are copied to the devices; drop it to save host memory.
          sampling: shapes and stop strings.
          seed: seed of the draws.
          generator: identity of the generator (hexadecimal); draws of different generators are
            independent.
          mesh: slots lie along data and fsdp, weights as `sharding.RULES` says; None means the
            first local device.

        Raises:
          ValueError: slots do not divide over the mesh, the model has too few positions, or a stop
            string is empty.
        """
        self.text, self.sampling = model.text, sampling
        self.seed, self.generator = seed, generator
        self.mesh = mesh or make_mesh(MeshShape(), jax.local_devices()[:1])
        # The dtype is an attribute of the decoder, which only a merged model shows.
        dtype = nnx.merge(model.graphdef, model.state).dtype
        self.plan = Plan(model.spec, sampling, self.mesh, dtype)
        self.spec = self.plan.spec
        state = place(model.state, shardings(model.state, self.mesh))
        graphdef = model.graphdef if self.spec == model.spec else abstract(self.spec, dtype)[0]
        self.graphdef, self.weights = unstacked(graphdef, state)
        self.cache: Cache | None = None
        self.end_ids = np.asarray(model.text.end_ids, np.int32)
        self.stats: dict[str, float] = defaultdict(float)

    def generate(
        self, requests: Sequence[Request], advance: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        """Returns the traces of every request, in the order of the requests and their samples.

        Args:
          requests: what is asked.
          advance: called with 1 for every trace that ended, such as to move a progress bar.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt`, or a log-probability is not
            finite.
        """
        started, compiled = time.perf_counter(), compile_seconds()
        self.check(requests)
        # Traces end in any order, so each is put at its request and sample.
        results: list[list[Completion | None]] = [[None] * request.samples for request in requests]
        for trace in self._run(requests):
            results[trace.request][trace.sample] = self._complete(trace)
            if advance:
                advance(1)
        self.stats["seconds"] += time.perf_counter() - started
        self.stats["compile_seconds"] += compile_seconds() - compiled
        return [[completion for completion in row if completion is not None] for row in results]

    def check(self, requests: Sequence[Request]) -> None:
        """Checks the lengths of prompts.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt`; the first one is named.
        """
        for request in requests:
            if not 0 < len(request.tokens) <= self.sampling.max_prompt:
                raise ValueError(
                    f"Prompt {request.prompt_id} has {len(request.tokens)} tokens; "
                    f"config.sampling.max_prompt allows 1 to {self.sampling.max_prompt}."
                )

    def _run(self, requests: Sequence[Request]) -> Iterator[_Trace]:
        """Yields traces as they end; the device works on the next chunk in the meantime."""
        # The cache starts at its shortest again: the last call may have grown it.
        self._reserve(0)
        table, prefilled = _SlotTable.empty(self.sampling.slots), self._prefill(requests)
        # One program with filters serves all requests if any of them filters; it is a static
        # argument.
        filtered = any(0 < r.top_k < self.spec.vocab or r.top_p < 1 for r in requests)
        remaining = sum(request.samples for request in requests)
        waiting: deque[_Trace] = deque()
        ended: list[_Trace] = []
        while True:
            remaining -= self._refill(requests, table, waiting, prefilled)
            # All slots are free and nothing waits, so all traces have ended.
            if not table.slots.alive.any():
                break
            chunk = self._advance(table.slots, filtered, more=remaining > 0)
            # The traces of the last chunk: yielding them overlaps with the chunk just dispatched.
            yield from ended
            ended = self._collect(jax.device_get(chunk), table)
        yield from ended

    def _prefill(self, requests: Sequence[Request]) -> Iterator[list[_Trace]]:
        """Prefills prompts, longest first, and yields the traces to sample of one group at a time.

        A group is prefilled only when the caller asks for it.
        """
        rows, lengths = self.plan.prefill_rows, self.plan.prefill_lengths
        pairs = [(r, s) for r, request in enumerate(requests) for s in range(request.samples)]
        # Keys of all traces are made by one call, and looked up by the running number of the trace.
        keys = request_keys(
            self.seed,
            self.generator,
            [requests[r].prompt_id for r, _ in pairs],
            [s for _, s in pairs],
        )
        first_key = np.cumsum([0] + [request.samples for request in requests])

        def padded_length(r: int) -> int:
            return next(length for length in lengths if length >= len(requests[r].tokens))

        # Ids break ties, so that the order of the requests does not matter.
        order = sorted(
            range(len(requests)), key=lambda r: (-len(requests[r].tokens), requests[r].prompt_id)
        )
        # Prompts in this order have falling lengths, so equal padded lengths are neighbours.
        for length, members in itertools.groupby(order, key=padded_length):
            for group in _batched(members, rows):
                # Rows without a prompt are computed too, because a group has one compiled shape.
                tokens = np.zeros((rows, length), np.int32)
                for row, r in enumerate(group):
                    tokens[row, : len(requests[r].tokens)] = requests[r].tokens
                    self.stats["prompt_tokens"] += len(requests[r].tokens)
                self.stats["padded_prompt_tokens"] += tokens.size
                # Every device along data and fsdp has all prompts, because their slots are not
                # known yet.
                prompts = prefill(self.graphdef, self.weights, tokens, self.plan.prompt_sharding)
                yield [
                    _Trace(r, s, keys[first_key[r] + s], prompts, row)
                    for row, r in enumerate(group)
                    for s in range(requests[r].samples)
                ]

    def _refill(
        self,
        requests: Sequence[Request],
        table: "_SlotTable",
        waiting: deque[_Trace],
        prefilled: Iterator[list[_Trace]],
    ) -> int:
        """Assigns waiting traces to free slots; returns their number."""
        free = np.flatnonzero(~table.slots.alive)
        # Groups are prefilled only as long as slots are free for them, since every one holds a
        # cache.
        while len(waiting) < len(free) and (group := next(prefilled, None)) is not None:
            waiting.extend(group)
        assigned = [(int(b), waiting.popleft()) for b in free[: len(waiting)]]
        # One call of `insert` per group of prompts that were prefilled together.
        for _, pairs in itertools.groupby(assigned, key=lambda pair: id(pair[1].prompts)):
            group_pairs = list(pairs)
            # The arrays have the size of all slots, so that another number of traces compiles
            # nothing; entries beyond the count are not read.
            indices = np.zeros((2, self.sampling.slots), np.int32)
            indices[:, : len(group_pairs)] = np.transpose([(b, t.row) for b, t in group_pairs])
            prompts = group_pairs[0][1].prompts
            self.cache = insert(self.cache, prompts, indices[0], indices[1], len(group_pairs))
        for b, trace in assigned:
            table.assign(b, trace, requests[trace.request])
            trace.prompts = None  # frees the group's cache with its last trace
        return len(assigned)

    def _reserve(self, positions: int) -> None:
        """Makes the cache hold `positions` positions, doubling it; 0 resets it to the shortest.

        The cache grows with the longest live sequence, because a step reads all of it where its
        kernel does not read live tiles alone.
        """
        shortest = self.plan.shortest
        if self.cache is None or (positions == 0 and self.cache.length > shortest):
            self.cache = None  # frees the longer cache before the shorter one is allocated
            self.cache = _new_cache(
                self.spec, self.sampling.slots, shortest, self.plan.dtype, self.plan.cache_sharding
            )
        longest = self.plan.positions
        while (length := self.cache.length) < min(positions, longest):
            self.cache = grow(self.cache, min(longest, 2 * length))

    def _advance(self, slots: Slots, filtered: bool, more: bool) -> Chunk:
        """Dispatches one chunk; the device computes the returned arrays asynchronously.

        Args:
          slots: state of the slots.
          filtered: whether any request uses top-p or top-k.
          more: whether traces are waiting for a slot. If so, the chunk ends early once more than
            1/16 of the slots are idle.
        """
        B, steps = self.sampling.slots, self.sampling.chunk
        # Room for every position that the chunk can reach, before it is dispatched.
        self._reserve(int(slots.position[slots.alive].max()) + steps)
        # With a limit of B - 1 the loop ends early only when no slot is alive.
        max_idle_slots = min(B // 16, B - 1) if more else B - 1
        # A copy, because the transfer may be asynchronous and the host goes on writing to `slots`.
        device_slots = jax.device_put(jax.tree.map(np.copy, slots), self.plan.sharding(ROWS))
        self.cache, out = advance(
            self.graphdef,
            self.weights,
            self.cache,
            device_slots,
            self.end_ids,
            max_new_tokens=np.int32(self.sampling.max_tokens),
            max_idle_slots=np.int32(max_idle_slots),
            decode_steps=steps,
            filtered=filtered,
            mesh=self.mesh,
        )
        return out

    def _collect(self, chunk: Chunk, table: "_SlotTable") -> list[_Trace]:
        """Appends a chunk's tokens to their traces; frees the slots of the traces that ended.

        Raises:
          ValueError: a log-probability is not finite.
        """
        steps, slots = int(chunk.steps), table.slots
        self.stats["steps"] += steps
        self.stats["slot_steps"] += steps * self.sampling.slots
        # A slot's position moves by one with each token, so the difference counts its tokens.
        counts = chunk.position - slots.position
        alive = chunk.alive.copy()
        ended = []
        for b in np.flatnonzero(slots.alive):
            trace, n = table.traces[int(b)], counts[b]
            # NaN logits would give a token without an error, so the log-probabilities are checked.
            if not np.isfinite(chunk.logprobs[:n, b]).all():
                raise ValueError(
                    "The model gives a log-probability that is not finite after "
                    f"{len(trace.tokens)} tokens; check its weights, or use float32."
                )
            # Tokens that were searched before hold no stop string and are not searched prefix by
            # prefix.
            checked = len(trace.tokens)
            trace.tokens.extend(chunk.tokens[:n, b].tolist())
            trace.logprobs.extend(chunk.logprobs[:n, b].tolist())
            if not alive[b]:
                trace.finish = "eos" if trace.tokens[-1] in self.text.end_ids else "length"
            if self.sampling.stop:
                length = stopped_length(trace.tokens, checked, self.sampling.stop, self.text.decode)
                if length is not None:
                    # What was sampled after the stop string, until the chunk ended, is cut off.
                    trace.tokens, trace.logprobs = trace.tokens[:length], trace.logprobs[:length]
                    trace.finish = "stop"
                    alive[b] = False
            if not alive[b]:
                ended.append(trace)
        # Arrays fetched from the device are read-only; the host writes to copies.
        table.slots = slots._replace(
            token=chunk.token.copy(),
            position=chunk.position.copy(),
            generated=slots.generated + counts,
            alive=alive,
        )
        return ended

    def _complete(self, trace: _Trace) -> Completion:
        """Detokenises an ended trace and adds it to the statistics."""
        # The end token is a token of the trace and not of its text.
        text = self.text.decode(trace.tokens[:-1] if trace.finish == "eos" else trace.tokens)
        if trace.finish == "stop":
            text = before_stop(text, self.sampling.stop) or ""
        self.stats["tokens"] += len(trace.tokens)
        self.stats["truncated"] += trace.finish == "length"
        # `fsum` is exact before its one rounding, so chunk borders do not change the sum.
        return Completion(trace.tokens, text, trace.finish, math.fsum(trace.logprobs))
