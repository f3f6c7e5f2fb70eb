import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("program.py")


@pytest.fixture(scope="session")
def program():
    """The tiny run of `program.py`, as a module."""
    spec = importlib.util.spec_from_file_location("program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def spawn():
    """Starts `program.py` in a process with `devices` devices and further variables."""

    def start(*arguments, devices=1, **more):
        flags = more | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(PROGRAM.parents[2]),
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | flags,
        )

    return start
