"""Reading weights: seconds beside safetensors' own read, bytes and memory of processes that share.

    python -m launch.bench_weights --run=make --folder=/tmp/model
    python -m launch.bench_weights --run=read --folder=/tmp/model      # beside `load`, in pairs
    python -m launch.bench_weights --run=load --folder=/tmp/model      # safetensors' own read
    python -m launch.bench_weights --run=parts --folder=/tmp/model --mesh=fsdp=8 --processes=2

`make` writes a folder with the layout of Llama-3.1-8B (32 layers, 32 heads and 8 for keys and
values, bfloat16, shards and an index), by default an eighth as wide: 0.94 GB. `parts` starts
processes of four CPU devices each, and prints what every one of them read (by its own count and by
the kernel's) and the growth of its resident memory beyond its devices' buffers. The folder of
`parts` and `read` may be in a bucket.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", "/tmp/model", "The model's folder.")
_MESH = flags.DEFINE_string("mesh", "fsdp=8", "Axes and their devices, such as fsdp=2:tensor=4.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes, of four devices each.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Width of the model that `make` writes.")
_LAYERS = flags.DEFINE_integer("layers", 32, "Its layers.")
_DTYPE = flags.DEFINE_string("dtype", "", "Parameters' dtype; that of the files by default.")


def make() -> None:
    """Writes the folder; its numbers are random and its tokenizer is none."""
    import numpy as np

    from deltapref_jax.models.config_json import spec_to_hf
    from deltapref_jax.models.parameters import parameters
    from deltapref_jax.models.safetensors_file import header_bytes
    from deltapref_jax.models.spec import ModelSpec
    from deltapref_jax.models.stored import places, stored_shape

    width = _WIDTH.value
    spec = ModelSpec(
        width * 128256 // 8192,
        width,
        _LAYERS.value,
        32,
        8,
        width // 32,
        width * 7 // 2,
        tied=False,
    )
    root = Path(_FOLDER.value)
    root.mkdir(parents=True, exist_ok=True)
    fields = spec_to_hf(spec) | {"torch_dtype": "bfloat16"}
    (root / "config.json").write_text(json.dumps(fields))
    import ml_dtypes

    shapes = {
        place.tensors[0]: (ml_dtypes.bfloat16, stored_shape(p, spec))
        for name, p in parameters(spec).items()
        for place in places(spec, gguf=False)[name]
    }
    by_layer = sorted(shapes)
    random = np.random.default_rng(0)
    index: dict[str, str] = {}
    for i in range(4):  # the released model has four files too
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        names = by_layer[i * len(by_layer) // 4 : (i + 1) * len(by_layer) // 4]
        with open(root / file, "wb") as out:
            out.write(header_bytes({name: shapes[name] for name in names})[0])
            for name in sorted(names):
                numbers = random.standard_normal(shapes[name][1], np.float32) * 0.02
                out.write(numbers.astype(ml_dtypes.bfloat16).tobytes())
        index |= dict.fromkeys(names, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def load() -> None:
    """Reads all tensors with the library, as NumPy arrays."""
    import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
    from safetensors.numpy import load_file

    began, cpu = time.monotonic(), time.process_time()
    tensors = [load_file(file) for file in sorted(Path(_FOLDER.value).glob("*.safetensors"))]
    size = sum(array.nbytes for file in tensors for array in file.values())
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bytes": size}))


def read() -> None:
    """Reads the model onto the devices of this process, as a mesh of them holds it."""
    print(json.dumps(_place()))


def _place() -> dict[str, float]:
    import jax

    from deltapref_jax.config import MeshShape
    from deltapref_jax.files import ByteReader
    from deltapref_jax.mesh import make_mesh, place
    from deltapref_jax.models.sharding import shardings
    from deltapref_jax.models.stored import open_folder
    from deltapref_jax.models.weights import assemble

    counted, one = [0], ByteReader.read_pieces

    def counting(self: ByteReader, offsets: "object", length: int, out: "object") -> None:
        counted[0] += len(offsets) * length  # type: ignore[arg-type]
        one(self, offsets, length, out)  # type: ignore[arg-type]

    ByteReader.read_pieces = counting  # type: ignore[method-assign, assignment]
    axes = {axis: int(n) for axis, n in (pair.split("=") for pair in _MESH.value.split(":"))}
    mesh = make_mesh(MeshShape(**axes)) if jax.device_count() > 1 else make_mesh(MeshShape())
    open_folder(_FOLDER.value)  # imports what reads a config
    jax.device_put(0.0).block_until_ready()
    counted[0], resident, kernel = 0, _reset_peak(), _kernel_bytes()
    began, cpu = time.monotonic(), time.process_time()
    stored = open_folder(_FOLDER.value)
    _, state = assemble(stored, _FOLDER.value, params=_DTYPE.value or None)
    placed = jax.block_until_ready(place(state, shardings(state, mesh)))
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    peak = _status("VmHWM")
    leaves = jax.tree.leaves(placed)
    # Replicated parts of several CPU devices may be one array in memory.
    pointers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for leaf in leaves
        for shard in leaf.addressable_shards
    }
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "read": counted[0],
        "read_by_kernel": _kernel_bytes() - kernel,
        "of_devices": held,
        "share": held / jax.local_device_count(),
        "beyond_buffers": peak - resident - sum(pointers.values()),
    }


def _status(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _reset_peak() -> int:
    """Makes the peak of resident memory what is resident now, and returns it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _kernel_bytes() -> int:
    """Bytes that this process has asked the kernel for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def parts() -> None:
    """Starts the processes and prints what each of them says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags_ = [f"--folder={_FOLDER.value}", f"--mesh={_MESH.value}", f"--dtype={_DTYPE.value}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.bench_weights", "--run=part", *flags_],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(_PROCESSES.value),
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(_PROCESSES.value)
    ]
    for process in processes:
        print(process.communicate()[0].splitlines()[-1])
    if any(process.returncode for process in processes):
        raise SystemExit("A process failed.")


def part() -> None:
    """One of the processes of `parts`."""
    from deltapref_jax.preemption import exit_process
    from deltapref_jax.processes import start_processes

    start_processes()
    print(json.dumps(_place()), flush=True)
    exit_process()


PROGRAMS = {f.__name__: f for f in (make, load, read, parts, part)}
_RUN = flags.DEFINE_enum("run", None, list(PROGRAMS), "What to do; `part` is a process of `parts`.")


def main(_: list[str]) -> None:
    """Run one of the programs."""
    PROGRAMS[str(_RUN.value)]()


if __name__ == "__main__":
    flags.mark_flag_as_required("run")
    app.run(main)
