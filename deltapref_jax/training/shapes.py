"""The programs of a training step with abstract arguments, for tests and `launch.preflight`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from deltapref_jax.config import OBJECTIVE_KINDS
from deltapref_jax.models.lora import adapters, partition
from deltapref_jax.models.memory import FROZEN
from deltapref_jax.models.program import Program, array, packed_rows, placed, placed_weights
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import PackedBatch, max_segments
from deltapref_jax.scoring.projection import projection_trips
from deltapref_jax.training.loop import Run
from deltapref_jax.training.objectives import Hyper
from deltapref_jax.training.state import TrainState
from deltapref_jax.training.step import Examples, programs


def step_programs(
    spec: ModelSpec,
    run: Run,
    mesh: Mesh,
    dtype: str = "float32",
    branched: bool = False,
    frozen: str = FROZEN,
) -> dict[str, Program]:
    """The programs that `loop.train_step` runs, by their names in `step.Programs`.

    Args:
      spec: of the model.
      run: objective, shapes, optimizer, adapters.
      mesh: rows are spread over data and fsdp.
      dtype: of the computation.
      branched: whether rows have branches (`dispatch.shares_prompts`).
      frozen: dtype of the base of adapters.
    """
    everywhere = PartitionSpec()
    segments, kind = max_segments(run.rows, run.row_length), run.objective.kind
    lora = adapters(run.lora, spec)
    compiled = programs(spec, dtype, kind, run.optimizer, segments, mesh, run.remat, lora)
    trained, base = partition(abstract(spec, adapters=lora)[1], lora)
    params, base = placed(trained, mesh), placed_weights(base, spec, mesh, frozen)
    moments = jax.eval_shape(run.optimizer.transform().init, params)
    state = TrainState(params, placed(moments, mesh))
    # What lies on the devices of the moments while gradients are computed.
    held = () if run.optimizer.offload_moments else state.moments

    ids = packed_rows(mesh, run.rows, run.row_length)
    batch = PackedBatch(ids, ids, ids, ids, ids if branched else None)
    index, number = (array(mesh, everywhere, t, segments) for t in (jnp.int32, jnp.float32))
    examples = Examples(index, index, number, number, number, number)
    scalar = array(mesh, everywhere, jnp.float32)
    hyper = Hyper(*[scalar] * len(Hyper._fields))
    trips = projection_trips(spec, run.rows, run.row_length, mesh)
    # Gradients have the shapes and shardings of what is trained. Those of the micro-batches before
    # are an argument, or lie beside where they are added afterwards.
    so_far, beside = (params, ()) if compiled.in_place else (nnx.State({}), params)
    found = {
        "gradient": Program(
            compiled.gradient,
            (params, base, batch, examples, hyper, so_far),
            beside=(held, beside),
            trips=trips,
        ),
        "apply": Program(
            compiled.apply, (state, params, scalar, array(mesh, everywhere, jnp.uint32)), base
        ),
    }
    if compiled.in_place:
        found["zeros"] = Program(compiled.zeros, (), beside=(params, held, base))
    else:
        found["add"] = Program(compiled.add, (params, params), beside=(params, held, base))
    if OBJECTIVE_KINDS[kind].baseline:
        whole = nnx.merge_state(params, base) if lora.rank else params
        found["logprobs"] = Program(compiled.logprobs, (whole, batch), beside=held, trips=trips)
    return found
