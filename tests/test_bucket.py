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

import pytest

from deltapref_jax import files
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError
from deltapref_jax.files import ArtifactError, check_bucket, local_copy, remote, staged_dir
from deltapref_jax.preemption import Preempted

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
