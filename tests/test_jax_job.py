"""A job that is half described or does not come together ends every process with one sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltapref_jax.cluster import unused_variables
from deltapref_jax.config import ConfigError
from deltapref_jax.jax_job import JaxJob, described_job

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "GCE_", "CUDA_")
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "MEGASCALE_NUM_SLICES": "1"}
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@pytest.fixture
def described(monkeypatch):
    """Sets an environment, on a TPU VM if wanted, and returns the job that it describes."""
    for key in os.environ:
        if key.startswith(CLUSTERS) and key != "JAX_PLATFORMS":
            monkeypatch.delenv(key)

    def of(variables, tpu=False):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        for module in ("cloud_tpu_init", "clusters.cloud_tpu_cluster", "clusters.cluster"):
            monkeypatch.setattr(f"jax._src.{module}.running_in_cloud_tpu_vm", tpu)
        return described_job()

    return of


@pytest.mark.parametrize(
    ("variables", "tpu", "job"),
    [
        ({}, False, JaxJob()),
        ({COUNT: "", INDEX: ""}, False, JaxJob()),
        ({COUNT: "1", INDEX: "0"}, False, JaxJob()),
        ({INDEX: "0"}, False, JaxJob()),
        (SLURM | {COUNT: "1"}, False, JaxJob()),
        ({ADDRESS: "[::1]:80", COUNT: "4", INDEX: "3"}, False, JaxJob(4, 3, "[::1]:80")),
        ({ADDRESS: "host:1"} | SLURM, False, JaxJob(2, 1, "host:1")),
        (SLURM, False, JaxJob(2, 1)),
        (OPEN_MPI, False, JaxJob(3, 1)),
        (GKE, True, JaxJob(4)),
    ],
)
def test_a_whole_description_is_read(described, variables, tpu, job):
    assert described(variables, tpu) == job


HALF = (
    "{}, but {} not set and JAX detects no job of several processes here; set all three of them, "
    "or JAX_NUM_PROCESSES=1 alone for one process."
)
NUMBER = "{} is {!r}; set it to a whole number from {} to {}, or unset it."
PLACE = (
    "JAX_COORDINATOR_ADDRESS is {!r}; set it to host:port of process 0, with a port from 1 to "
    "65535, such as 10.0.0.1:8476."
)
BELOW = "JAX_PROCESS_ID is {} in a job of {} ({}); number them from 0, each below their number."
POSITION = (
    "{} is {} where the environment describes {}; number them from 0, or set JAX_NUM_PROCESSES=1 "
    "for this host alone."
)


@pytest.mark.parametrize(
    ("variables", "tpu", "sentence"),
    [
        ({COUNT: "4"}, False, HALF.format(f"{COUNT} is 4", f"{ADDRESS} and {INDEX} are")),
        (
            {COUNT: "4", INDEX: "0"},
            False,
            HALF.format(f"{COUNT} is 4 and {INDEX} is 0", f"{ADDRESS} is"),
        ),
        ({INDEX: "1"}, False, HALF.format(f"{INDEX} is 1", f"{ADDRESS} and {COUNT} are")),
        ({ADDRESS: "h:1"}, False, HALF.format(f"{ADDRESS} is h:1", f"{COUNT} and {INDEX} are")),
        *(({COUNT: n}, False, NUMBER.format(COUNT, n, 1, "1,000,000")) for n in ("two", "0", "-1")),
        *(({INDEX: n}, False, NUMBER.format(INDEX, n, 0, "1,000,000")) for n in ("x", "-1", "1.0")),
        (
            {"JAX_COORDINATOR_PORT": "65536"},
            False,
            NUMBER.format("JAX_COORDINATOR_PORT", "65536", 1, "65,535"),
        ),
        *(
            ({ADDRESS: address, COUNT: "2", INDEX: "0"}, False, PLACE.format(address))
            for address in ("host", "host:", ":1", "host:x", "host:0", "host:65536", "h ost:1")
        ),
        (
            {ADDRESS: "host:1", COUNT: "4", INDEX: "4"},
            False,
            BELOW.format(4, "4 processes", COUNT),
        ),
        ({COUNT: "1", INDEX: "1"}, False, BELOW.format(1, "1 process", COUNT)),
        (SLURM | {INDEX: "2"}, False, BELOW.format(2, "2 processes", "as JAX detects")),
        (GKE | {"TPU_WORKER_ID": "9"}, True, POSITION.format("TPU_WORKER_ID", 9, "4 hosts")),
        (
            GKE | {"TPU_WORKER_ID": ""},
            True,
            POSITION.format("TPU_WORKER_ID", "not set", "4 hosts"),
        ),
        (
            GKE | {"TPU_WORKER_ID": "x"},
            True,
            NUMBER.format("TPU_WORKER_ID", "x", 0, "1,000,000"),
        ),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "two"},
            True,
            NUMBER.format("MEGASCALE_NUM_SLICES", "two", 1, "1,000,000"),
        ),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2"},
            True,
            POSITION.format("MEGASCALE_SLICE_ID", 2, "2 slices"),
        ),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "x"},
            False,
            "A job of Open MPI is detected and cannot be read (ValueError: invalid literal for "
            "int() with base 10: 'x') from OMPI_COMM_WORLD_LOCAL_RANK=1, OMPI_COMM_WORLD_RANK=1, "
            "OMPI_COMM_WORLD_SIZE=3, OMPI_MCA_orte_hnp_uri=x; correct it, or set "
            "JAX_NUM_PROCESSES=1 for this process alone.",
        ),
        (
            SLURM | {"SLURM_NTASKS": "many"},
            False,
            "A job of SLURM is detected and cannot be read (ValueError: invalid literal for int() "
            "with base 10: 'many') from SLURM_JOB_ID=4097, SLURM_LOCALID=0, SLURM_NTASKS=many, "
            "SLURM_PROCID=1, SLURM_STEP_NODELIST=node[007-008]; correct it, or set "
            "JAX_NUM_PROCESSES=1 for this process alone.",
        ),
    ],
)
def test_half_a_description_is_refused(described, variables, tpu, sentence):
    with pytest.raises(ConfigError) as e:
        described(variables, tpu)
    assert str(e.value) == sentence


def test_variables_of_a_tpu_pod_without_chips_are_named(described):
    described(GKE)
    assert unused_variables() == (
        "Not used: TPU_WORKER_HOSTNAMES=a,b,c,d, TPU_WORKER_ID=2, MEGASCALE_NUM_SLICES=1, because "
        "JAX finds no TPU chips, or no libtpu, on this machine. --devices=HOSTSxDEVICES states the "
        "devices of a dry run."
    )
    described(GKE, tpu=True)
    assert unused_variables() == ""


def environment(variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
    return clean | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "120"} | variables


@pytest.fixture
def ablate(command, tmp_path):
    """Runs launch.ablate in an environment."""

    def run(variables, *flags):
        where = ("--config=configs/quickstart.py", f"--config.workspace={tmp_path}/w")
        return command("launch.ablate", *where, *flags, environment=environment(variables))

    return run


@pytest.mark.parametrize("flags", [[], ["--dry_run"], ["--dry_run", "--devices=4x4"]])
def test_a_run_and_a_dry_run_refuse_half_a_job(ablate, tmp_path, flags):
    ended = ablate({COUNT: "4"}, *flags)
    sentence = HALF.format(f"{COUNT} is 4", f"{ADDRESS} and {INDEX} are")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{sentence}\n")
    assert not (tmp_path / "w").exists()


def test_a_dry_run_says_which_variables_it_does_not_use(ablate):
    ended = ablate({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"}, "--dry_run")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("Assumed: 1 cpu device on 1 host;")
    assert lines[1].startswith("Not used: TPU_WORKER_HOSTNAMES=a,b, TPU_WORKER_ID=x, because JAX")


WAITING = """
import sys
from deltapref_jax.processes import start_processes
from launch.flags import define_initialization_timeout, run_main

timeout = define_initialization_timeout()
run_main(lambda _: start_processes(timeout.value))
"""


def waiting(index, address, *flags):
    """Starts a process of a job of two; the other one never comes."""
    return subprocess.Popen(
        [sys.executable, "-c", WAITING, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({ADDRESS: address, COUNT: "2", INDEX: str(index)}),
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (
            signal.SIGTERM,
            75,
            "Stopped by SIGTERM. Run the same command to continue; finished work is kept.",
        ),
        (
            signal.SIGINT,
            130,
            "Stopped. Run the same command to continue; finished shards are kept.",
        ),
    ],
)
def test_a_signal_ends_a_process_that_waits_for_others(index, number, code, sentence):
    address = free_address()
    process = waiting(index, address)
    try:
        said = process.stdout.readline()
        assert said == f"Waits for 2 processes at {address}, as process {index}.\n"
        time.sleep(1)  # until JAX waits in C++
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (code, "", f"{sentence}\n")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_job_that_does_not_come_together_ends_with_one_sentence(index):
    address = free_address()
    process = waiting(index, address, "--initialization_timeout=5")
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    assert out == f"Waits for 2 processes at {address}, as process {index}.\n"
    assert err == (
        f"The job of 2 processes at {address} was not complete after 5 s; start all of them with "
        "the same address, which each must be able to reach, or wait longer with "
        "--initialization_timeout.\n"
    )


@pytest.mark.slow
def test_a_port_that_is_taken_ends_process_0_with_one_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = waiting(0, f"localhost:{port}")
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (2, "")
    assert err == (
        f"Process 0 cannot listen at port {port} of localhost:{port} (Address already in use); "
        "choose another in JAX_COORDINATOR_ADDRESS, or in JAX_COORDINATOR_PORT where JAX detects "
        "the job.\n"
    )
