"""Workspace, data and model in a bucket of Google Cloud Storage, emulated by a local server."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltapref_jax import files
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.files import ArtifactError, check_bucket, local_copy, remote, staged_dir
from deltapref_jax.mesh import make_mesh, place
from deltapref_jax.models import content
from deltapref_jax.models import export as exporting
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.safetensors_file import read_header
from deltapref_jax.models.sharding import shardings
from deltapref_jax.models.weights import inspect_model, open_model
from deltapref_jax.preemption import Preempted
from tests.models.test_weight_processes import run as run_processes

# Otherwise gcsfs asks Google, not the emulator, for the type of the bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
ROOT = pathlib.Path(__file__).resolve().parent.parent
PAIRS = [
    {
        "prompt": f"How many shells are {i} and {i + 2}?",
        "chosen": f" Answer: {2 * i + 2}.",
        "rejected": f" Answer: {i}!",
    }
    for i in range(16)
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The environment variables with which gs://bucket exists, in an emulator."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra gcs)")
    pytest.importorskip(
        "gcp_storage_emulator", reason="gcp-storage-emulator is not installed (extra test)"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    server = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name("bucket.py")), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while True:
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            time.sleep(0.05)
    yield os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    server.terminate()
    server.wait()


def object_names(env, prefix=""):
    with urllib.request.urlopen(
        f"{env['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?prefix={prefix}"
    ) as response:
        return [item["name"] for item in json.load(response)["items"] or []]


def read(env, name):
    with urllib.request.urlopen(f"{env['STORAGE_EMULATOR_HOST']}/bucket/{name}") as response:
        return response.read()


def write(env, name, data):
    url = (
        f"{env['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    )
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers, method="POST")).close()


def train(env, workspace, data, student):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.train",
            f"--config.workspace={workspace}",
            f"--config.data.path={data}",
            f"--config.student.path={student}",
            "--config.objective.kind=dpo",
            "--config.objective.learning_rate=1e-3",
            "--config.training.pairs_per_step=4",
            "--config.training.budget=steps",
            "--config.training.steps=16",
            "--config.training.rows=8",
            "--config.training.row_length=128",
            "--config.training.checkpoint_every=2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )


@pytest.fixture
def in_process_bucket(bucket, monkeypatch):
    """`bucket`, for this process too."""
    for name in ("STORAGE_EMULATOR_HOST", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, bucket[name])
    return bucket


def test_a_missing_package_is_one_sentence_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    files._gcs.cache_clear()
    for use in (Workspace, local_copy):
        with pytest.raises(
            ConfigError,
            match=r"^A path begins with gs:// and the package gcsfs is not installed; "
            r"pip install 'deltapref-jax\[gcs\]'\.$",
        ):
            use("gs://bucket/place")
    files._gcs.cache_clear()


@pytest.mark.parametrize("use", ["check_bucket", "local_copy"])
def test_a_store_that_does_not_answer_is_one_sentence_within_seconds(use):
    """gcsfs alone would repeat the request for more than a minute."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra gcs)")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        closed = free.getsockname()[1]
    program = (
        "import time; from deltapref_jax import files; files._ANSWER_SECONDS = 1.0\n"
        "began = time.monotonic()\n"
        f"try: files.{use}('gs://bucket/place')\n"
        "except files.ArtifactError as e: print(time.monotonic() - began < 10, e)"
    )
    env = os.environ | {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{closed}",
        "GOOGLE_APPLICATION_CREDENTIALS": "",
        "NO_GCE_CHECK": "true",
        "PYTHONPATH": str(ROOT),
    }
    out = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert out == (
        "True gs://bucket cannot be read (no answer within 1 seconds); check the name, this "
        "machine's credentials for Google Cloud Storage and its connection, and run the same "
        "command.\n"
    )


def test_other_stores_and_missing_buckets_are_refused(in_process_bucket):
    with pytest.raises(
        ConfigError, match=r"^The workspace s3://bucket/w is in no bucket of Google Cloud Storage; "
    ):
        check_bucket("s3://bucket/w")
    with pytest.raises(
        ConfigError, match=r"^There is no bucket gs://elsewhere, or this machine's credentials "
    ):
        check_bucket("gs://elsewhere/w")
    with pytest.raises(
        FileNotFoundError, match=r"^There is nothing at gs://bucket/no/model; check the path\.$"
    ):
        local_copy("gs://bucket/no/model")
    check_bucket("gs://bucket/w")
    check_bucket("folder")
    assert (remote("gs://bucket/w"), remote("folder")) == (True, False)


def test_a_copy_is_made_once_for_the_same_content_and_what_is_written_is_uploaded(
    in_process_bucket, monkeypatch
):
    from etils import epath

    with staged_dir(epath.Path("gs://bucket/made")) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("one")
        (folder / "b.txt").write_text("two")
        assert object_names(in_process_bucket, "made/") == []
    assert sorted(object_names(in_process_bucket, "made/")) == ["made/b.txt", "made/deep/a.txt"]
    copy = pathlib.Path(local_copy("gs://bucket/made"))
    assert (copy.name, (copy / "deep" / "a.txt").read_text(), (copy / "b.txt").read_text()) == (
        "made",
        "one",
        "two",
    )
    assert pathlib.Path(local_copy("gs://bucket/made/b.txt")).name == "b.txt"
    with monkeypatch.context() as m:
        m.setattr(files, "download", lambda _: pytest.fail("downloaded again"))
        assert local_copy("gs://bucket/made/") == str(copy)
    write(in_process_bucket, "made/b.txt", b"2")
    assert (pathlib.Path(local_copy("gs://bucket/made")) / "b.txt").read_text() == "2"
    with (
        pytest.raises(RuntimeError, match="stop"),
        staged_dir(epath.Path("gs://bucket/half")) as folder,
    ):
        (folder / "a").write_text("x")
        raise RuntimeError("stop")
    assert object_names(in_process_bucket, "half") == []
    with pytest.raises(ArtifactError, match=r"^gs://nowhere/x cannot be written \("):
        files.write_atomic(epath.Path("gs://nowhere/x"), b"x")


def upload(env, folder, place):
    for file in folder.iterdir():
        write(env, f"{place}/{file.name}", file.read_bytes())
    return f"gs://bucket/{place}"


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    """The tiny model in several files."""
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
    exporting.export(tiny.state, tiny.spec, tiny.text, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ranges(monkeypatch):
    """Object, first byte and end of everything that is read by ranges."""
    asked, gcs = [], files._gcs()
    read_ranges = gcs.cat_ranges

    def cat_ranges(paths, starts, ends):
        asked.extend(zip(paths, starts, ends, strict=True))
        return read_ranges(paths, starts, ends)

    monkeypatch.setattr(gcs, "cat_ranges", cat_ranges)
    return asked


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_weights_are_read_in_the_bucket_once_and_are_the_local_ones(
    in_process_bucket, sharded, ranges, axes, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = upload(in_process_bucket, sharded, f"sharded-{'-'.join(axes)}")
    mesh = make_mesh(MeshShape(**({"data": 1} | axes)))
    model, local = open_model(path), open_model(str(sharded))
    assert (model.spec, model.text.identity) == (local.spec, local.text.identity)
    ranges.clear()
    ours, theirs = (place(m.state, shardings(m.state, mesh)) for m in (model, local))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    sizes = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    # All but the headers, and no byte twice.
    assert sum(end - first for _, first, end in ranges) == 4 * model.spec.parameters
    assert 4 * model.spec.parameters < sizes
    copied = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert "config.json" in copied
    assert not any(name.endswith(".safetensors") for name in copied)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2:tensor=4", "data=2:fsdp=4"])
def test_two_processes_read_every_byte_once_together(bucket, mesh, tmp_path):
    """Also where a mesh cuts columns, or repeats all of the model."""
    folder = tmp_path / "model"
    size = ["--width=256", "--layers=8"]
    run_processes(1, ["-m", "launch.bench_weights", "--run=make", f"--folder={folder}", *size])
    path = upload(bucket, folder, f"processes/{mesh}")
    arguments = ["-m", "launch.bench_weights", "--run=part", f"--folder={path}", f"--mesh={mesh}"]
    found = [json.loads(out.splitlines()[-1]) for out in run_processes(2, arguments, bucket)]
    total = sum(entry.end - entry.first for entry in entries(folder))
    headers_and_norms = 40_000
    for process in found:
        assert process["read"] <= process["of_devices"] + headers_and_norms
    assert total <= sum(process["read"] for process in found) <= total + 2 * headers_and_norms


def entries(folder):
    """All tensors of a folder."""
    readers = [files.ByteReader(str(file)) for file in folder.glob("*.safetensors")]
    return [entry for reader in readers for entry in read_header(reader).values()]


def test_the_hash_of_weights_in_a_bucket_is_that_of_the_folder(
    in_process_bucket, sharded, ranges, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = upload(in_process_bucket, sharded, "hashed")
    assert weights_hash(path) == weights_hash(str(sharded))
    assert sum(first == 0 and end > 8 for _, first, end in ranges) == len(
        list(sharded.glob("*.safetensors"))
    )
    ranges.clear()
    content.bucket_content.cache_clear()  # as in a new program
    assert weights_hash(path) == weights_hash(str(sharded))
    assert not ranges
    shard = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].reshape(-1)[-1] = np.nan
    save_file(tensors, shard)
    write(in_process_bucket, f"hashed/{shard.name}", shard.read_bytes())
    for place_ in (path, str(sharded)):
        with pytest.raises(ValueError) as error:
            weights_hash(place_)
        assert str(error.value) == (
            f"Tensor {name} in {shard.name} of {place_} holds NaN or infinity; fetch it again, or "
            "choose another model."
        )


def test_a_cut_or_missing_shard_in_a_bucket_is_one_sentence(in_process_bucket, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    path = upload(in_process_bucket, sharded, "cut")
    for size in (len(data) - 1, 20, 5):
        write(in_process_bucket, f"cut/{shard.name}", data[:size])
        with pytest.raises(ValueError) as error:
            inspect_model(path)
        sentence = str(error.value)
        assert sentence.startswith(f"The model in {path} cannot be read ({shard.name}: ")
        assert sentence.endswith("; fetch it again.")
        assert "\n" not in sentence
    shard.unlink()
    path = upload(in_process_bucket, sharded, "missing")
    with pytest.raises(FileNotFoundError) as error:
        inspect_model(path)
    assert str(error.value) == (
        f"The folder {path} has no {shard.name}, which model.safetensors.index.json names; give a "
        "complete Hugging Face folder."
    )


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_preempted_continued_and_the_local_one_bit_for_bit(
    bucket, tiny_folder, tmp_path
):
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(lines)
    write(bucket, "in/pairs.jsonl", lines.encode())
    for file in tiny_folder.iterdir():
        write(bucket, f"in/student/{file.name}", file.read_bytes())

    def remote():
        return train(
            bucket, "gs://bucket/w", "gs://bucket/in/pairs.jsonl", "gs://bucket/in/student"
        )

    for kill, after in ((signal.SIGKILL, "step_4"), (signal.SIGTERM, "step_10")):
        process = remote()
        while not any(
            f"/{after}/commit_success.txt" in name for name in object_names(bucket, "w/train/")
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(kill)
        _, err = process.communicate(timeout=300)
        assert not any(name.endswith("manifest.json") for name in object_names(bucket, "w/train/"))
        assert process.returncode == (-kill if kill == signal.SIGKILL else Preempted.code), err
    assert "which is saved in gs://bucket/w/train/" in err
    # The lease was released.
    assert not [name for name in object_names(bucket, "w/train/") if "/claims/" in name]
    for process in (remote(), train(bucket, tmp_path / "w", tmp_path / "pairs.jsonl", tiny_folder)):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    policy = next((tmp_path / "w" / "train").iterdir())
    for name in (
        "metrics.jsonl",
        "policy/model.safetensors",
        "policy/config.json",
        "policy/tokenizer.json",
    ):
        assert read(bucket, f"w/train/{policy.name}/{name}") == (policy / name).read_bytes(), name
    reference = next((tmp_path / "w").glob("score/*/*.parquet")).relative_to(tmp_path)
    assert read(bucket, reference.as_posix()) == (tmp_path / reference).read_bytes()
    made = object_names(bucket, "w/")
    out, err = remote().communicate(timeout=300)  # Every artifact is complete.
    assert object_names(bucket, "w/") == made, err
