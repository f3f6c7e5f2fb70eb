"""Continuous batching: a fixed number of slots, refilled as traces end.

    requests ──▶ prefill (once per prompt) ──▶ insert into free slots ──▶ advance by a chunk ──▶ ended? ──▶ traces
                                                     ▲                          │
                                                     └──────────────────────────┘

The host waits for a chunk's tokens, refills, dispatches the next chunk, and turns ended traces into text while the
device works. Prompts are taken longest first, which is also what is expected to take longest.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import MeshShape, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Cache, empty_cache, unstacked
from deltapref_jax.models.sharding import ROWS, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel
from deltapref_jax.sampling.draw import request_keys
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
    """A prompt and how it is to be answered."""

    prompt_id: str  # hexadecimal, 16 digits; the draws depend on it
    tokens: Sequence[int]
    samples: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off


@dataclasses.dataclass(frozen=True)
class Completion:
    """One trace."""

    tokens: list[int]  # the end token included where there is one
    text: str  # without end token and stop string
    finish: str  # "eos", "stop" or "length"
    logprob: float  # nats; sum over `tokens`, temperature 1, unfiltered


@dataclasses.dataclass
class _Trace:
    """A sample on its way: which one it is, where its prompt was prefilled, and what it has so far."""

    request: int
    sample: int
    key: np.ndarray
    prompts: Cache | None  # None once it is in a slot
    row: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: str = ""


@dataclasses.dataclass
class _Table:
    """The host's view of the slots."""

    slots: Slots
    occupants: dict[int, _Trace]

    @classmethod
    def empty(cls, count: int) -> "_Table":
        return cls(
            Slots(
                token=np.zeros(count, np.int32),
                position=np.zeros(count, np.int32),
                produced=np.zeros(count, np.int32),
                alive=np.zeros(count, bool),
                keys=np.zeros((count, 2), np.uint32),
                temperature=np.ones(count, np.float32),
                top_p=np.ones(count, np.float32),
                top_k=np.zeros(count, np.int32),
            ),
            {},
        )

    def place(self, slot: int, trace: _Trace, request: Request) -> None:
        """Starts a trace: the last prompt token is fed first."""
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
        for column, value in zip(self.slots, values, strict=True):
            column[slot] = value
        self.occupants[slot] = trace


def _batched(items: Iterator[int], size: int) -> Iterator[list[int]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _new_cache(
    spec: ModelSpec, slots: int, length: int, dtype: jnp.dtype, sharding: NamedSharding
) -> Cache:
    return jax.lax.with_sharding_constraint(empty_cache(spec, slots, length, dtype), sharding)


class Engine:
    """Samples traces of one model. The result of a request depends on no other request, and not on their order.

    Engines of models of one shape share their compiled programs.

    Attributes:
      stats: sums over all calls since it was last cleared: `tokens` kept, `truncated` traces, decoding `steps`,
        `slot_steps` (steps × slots: what the tokens cost), `prompt_tokens`, `padded_prompt_tokens`, `seconds` and, of
        these, `compile_seconds`.
    """

    def __init__(
        self, model: LoadedModel, sampling: Sampling, seed: int, generator: str, mesh: Mesh | None = None
    ):
        """Places the weights on the mesh.

        Args:
          model: its weights are copied; drop it to save memory.
          sampling: shapes and stop strings.
          seed: of the draws.
          generator: identity of the generator (hexadecimal); draws of different generators are independent.
          mesh: slots lie along data and fsdp, weights as the sharding table says. None: the first device.

        Raises:
          ValueError: slots do not divide over the mesh, the model has too few positions, or a stop string is empty.
        """
        self.spec, self.text, self.sampling = model.spec, model.text, sampling
        self.seed, self.generator = seed, generator
        self.length = sampling.max_prompt + sampling.max_tokens
        if self.length > model.spec.max_positions:
            raise ValueError(
                f"config.sampling.max_prompt + max_tokens is {self.length} and the model has "
                f"{model.spec.max_positions} positions; lower one of the two."
            )
        if "" in sampling.stop:
            raise ValueError(
                "config.sampling.stop holds an empty string, which every text contains; remove it."
            )
        self.mesh = mesh or make_mesh(MeshShape(), jax.local_devices()[:1])
        across = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if sampling.slots % across:
            raise ValueError(
                f"config.sampling.slots is {sampling.slots}; it must be a multiple of the {across} "
                "devices along data and fsdp."
            )
        self.group = across * max(
            1, min(16, sampling.slots // 8) // across
        )  # prompts of one prefill
        state = jax.device_put(model.state, shardings(model.state, self.mesh))
        self.graphdef, self.weights = unstacked(model.graphdef, state)
        self.dtype = nnx.merge(model.graphdef, model.state).dtype
        self.cache: Cache | None = None
        self.end_ids = np.asarray(model.text.end_ids, np.int32)
        self.stats: dict[str, float] = defaultdict(float)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The traces of every request, in the order of the requests and their samples.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt`; a log-probability is not finite.
        """
        started, compiled = time.perf_counter(), compile_seconds()
        self.check(requests)
        done: list[list[Completion | None]] = [[None] * request.samples for request in requests]
        for trace in self._run(requests):
            done[trace.request][trace.sample] = self._complete(trace)
        self.stats["seconds"] += time.perf_counter() - started
        self.stats["compile_seconds"] += compile_seconds() - compiled
        return [[completion for completion in row if completion is not None] for row in done]

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `ValueError`, naming the first prompt that is empty or longer than `max_prompt`."""
        for request in requests:
            if not 0 < len(request.tokens) <= self.sampling.max_prompt:
                raise ValueError(
                    f"Prompt {request.prompt_id} has {len(request.tokens)} tokens; "
                    f"config.sampling.max_prompt allows 1 to {self.sampling.max_prompt}."
                )

    def _run(self, requests: Sequence[Request]) -> Iterator[_Trace]:
        """Traces as they end; while the caller handles one, the device works on the next chunk."""
        self._reserve(0)
        table, groups = _Table.empty(self.sampling.slots), self._groups(requests)
        filtered = any(0 < r.top_k < self.spec.vocab or r.top_p < 1 for r in requests)
        remaining = sum(request.samples for request in requests)
        ready: deque[_Trace] = deque()
        ended: list[_Trace] = []
        while True:
            remaining -= self._refill(requests, table, ready, groups)
            if not table.slots.alive.any():
                break
            chunk = self._advance(table.slots, filtered, more=remaining > 0)
            yield from ended
            ended = self._collect(jax.device_get(chunk), table)
        yield from ended

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[_Trace]]:
        """Prefills prompts, a group at a time and only when asked for, longest first; yields the traces to sample."""
        lengths = sorted({-(-self.sampling.max_prompt // (8 * part)) * 8 for part in (1, 2, 4)})
        pairs = [(r, s) for r, request in enumerate(requests) for s in range(request.samples)]
        keys = request_keys(
            self.seed,
            self.generator,
            [requests[r].prompt_id for r, _ in pairs],
            [s for _, s in pairs],
        )
        first = np.cumsum([0] + [request.samples for request in requests])

        def padded(r: int) -> int:
            return next(length for length in lengths if length >= len(requests[r].tokens))

        order = sorted(
            range(len(requests)), key=lambda r: (-len(requests[r].tokens), requests[r].prompt_id)
        )
        for length, members in itertools.groupby(order, key=padded):
            for group in _batched(members, self.group):
                tokens = np.zeros((self.group, length), np.int32)
                for row, r in enumerate(group):
                    tokens[row, : len(requests[r].tokens)] = requests[r].tokens
                    self.stats["prompt_tokens"] += len(requests[r].tokens)
                self.stats["padded_prompt_tokens"] += tokens.size
                prompts = prefill(
                    self.graphdef, self.weights, tokens, self._sharding(PartitionSpec())
                )
                yield [
                    _Trace(r, s, keys[first[r] + s], prompts, row)
                    for row, r in enumerate(group)
                    for s in range(requests[r].samples)
                ]

    def _refill(
        self,
        requests: Sequence[Request],
        table: "_Table",
        ready: deque[_Trace],
        groups: Iterator[list[_Trace]],
    ) -> int:
        """Puts waiting traces into free slots; returns how many."""
        free = np.flatnonzero(~table.slots.alive)
        while len(ready) < len(free) and (group := next(groups, None)) is not None:
            ready.extend(group)
        taken = [(int(b), ready.popleft()) for b in free[: len(ready)]]
        for _, same in itertools.groupby(taken, key=lambda pair: id(pair[1].prompts)):
            placed = list(same)
            where = np.zeros((2, self.sampling.slots), np.int32)
            where[:, : len(placed)] = np.transpose([(b, trace.row) for b, trace in placed])
            self.cache = insert(self.cache, placed[0][1].prompts, where[0], where[1], len(placed))
        for b, trace in taken:
            table.place(b, trace, requests[trace.request])
            trace.prompts = None
        return len(taken)

    def _reserve(self, reach: int) -> None:
        """Makes room for `reach` positions, doubling the length; 0 starts again with the shortest cache.

        Every step reads the whole cache, so it is as long as what has been reached, not as what may be.
        """
        shortest = min(self.length, max(256, 1 << (self.sampling.max_prompt - 1).bit_length()))
        if self.cache is None or (reach == 0 and self.cache.v[0].shape[2] > shortest):
            self.cache = None  # frees the longer one first
            heads = "tensor" if self.spec.kv_heads % self.mesh.shape["tensor"] == 0 else None
            self.cache = _new_cache(
                self.spec,
                self.sampling.slots,
                shortest,
                self.dtype,
                self._sharding(PartitionSpec(*ROWS, heads)),
            )
        while (length := self.cache.v[0].shape[2]) < min(reach, self.length):
            self.cache = grow(self.cache, min(self.length, 2 * length))

    def _advance(self, slots: Slots, filtered: bool, more: bool) -> Chunk:
        """Dispatches one chunk; the returned arrays are not there yet."""
        B, chunk = self.sampling.slots, self.sampling.chunk
        self._reserve(int(slots.position[slots.alive].max()) + chunk)
        patience = min(B // 16, B - 1) if more else B - 1
        sent = jax.device_put(
            jax.tree.map(np.copy, slots), self._sharding(ROWS)
        )  # a copy: the host goes on writing
        self.cache, out = advance(
            self.graphdef,
            self.weights,
            self.cache,
            sent,
            self.end_ids,
            np.int32(self.sampling.max_tokens),
            np.int32(patience),
            chunk=chunk,
            filtered=filtered,
        )
        return out

    def _collect(self, chunk: Chunk, table: "_Table") -> list[_Trace]:
        """Books a chunk's tokens and frees the slots of the traces that ended with it."""
        steps, slots = int(chunk.steps), table.slots
        self.stats["steps"] += steps
        self.stats["slot_steps"] += steps * self.sampling.slots
        counts = chunk.position - slots.position
        alive = chunk.alive.copy()
        ended = []
        for b in np.flatnonzero(slots.alive):
            trace, n = table.occupants[int(b)], counts[b]
            if not np.isfinite(chunk.logprobs[:n, b]).all():
                raise ValueError(
                    f"The model gives a log-probability that is not finite after {len(trace.tokens)} "
                    "tokens; check its weights, or use float32."
                )
            checked = len(trace.tokens)
            trace.tokens.extend(chunk.tokens[:n, b].tolist())
            trace.logprobs.extend(chunk.logprobs[:n, b].tolist())
            if not alive[b]:
                trace.finish = "eos" if trace.tokens[-1] in self.text.end_ids else "length"
            if self.sampling.stop:
                length = stopped_length(trace.tokens, checked, self.sampling.stop, self.text.decode)
                if length is not None:
                    trace.tokens, trace.logprobs, trace.finish = (
                        trace.tokens[:length],
                        trace.logprobs[:length],
                        "stop",
                    )
                    alive[b] = False
            if not alive[b]:
                ended.append(trace)
        table.slots = slots._replace(
            token=chunk.token.copy(),
            position=chunk.position.copy(),
            produced=slots.produced + counts,
            alive=alive,
        )
        return ended

    def _complete(self, trace: _Trace) -> Completion:
        text = self.text.decode(trace.tokens[:-1] if trace.finish == "eos" else trace.tokens)
        if trace.finish == "stop":
            text = before_stop(text, self.sampling.stop) or ""
        self.stats["tokens"] += len(trace.tokens)
        self.stats["truncated"] += trace.finish == "length"
        return Completion(trace.tokens, text, trace.finish, math.fsum(trace.logprobs))

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)
