"""A signal is raised until the entry point hears it, and never in the middle of the cleanup."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import gc, os, pathlib, signal, sys, time, weakref
from launch.flags import run_main

NUMBER, FOLDER = {number}, pathlib.Path({folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's "&" has it ignore

def send(*_):
    if not (FOLDER / "sent").exists():
        (FOLDER / "sent").touch()
        os.kill(os.getpid(), NUMBER)
        for _ in range(1000): pass

class Deleted:
    def __del__(self): send()

def in_gc(): gc.callbacks.append(send); gc.collect()
def in_del(): Deleted()
def in_weakref():
    deleted = type("Deleted", (), {{}})()
    reference = weakref.ref(deleted, send)
    del deleted
    return reference
def in_bare_except():
    try: send()
    except: pass
def turned_into_another():
    try: send()
    except BaseException as e: raise ValueError("Could not import a module.") from e
def heard(): send()

def main(_):
    began = time.monotonic()
    try:
        {where}()
        (FOLDER / "lost").touch()
        while time.monotonic() - began < 30: time.sleep(0.01)
    finally:
        try: raise OSError
        except OSError: time.sleep(2.5)
        (FOLDER / "cleaned").touch()

run_main(main)
"""
ENDS = {
    signal.SIGTERM: (
        75,
        "Stopped by SIGTERM. Run the same command to continue; finished work is kept.\n",
    ),
    signal.SIGINT: (
        130,
        "Stopped. Run the same command to continue; finished shards are kept.\n",
    ),
}


def test_only_what_the_user_need_not_know_is_left_out_of_stderr(tmp_path):
    """Libraries close their event loops while their threads still use them."""
    program = """
from launch.flags import run_main

class Closed:
    def __init__(self, e): self.e = e
    def __del__(self): raise self.e

def main(_):
    Closed(RuntimeError("Event loop is closed"))
    Closed(RuntimeError("broken"))

run_main(main)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    assert ended.stderr.splitlines()[-1] == "RuntimeError: broken"
    assert "Event loop" not in ended.stderr


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("heard", signal.SIGTERM),
        ("in_gc", signal.SIGTERM),
        ("in_gc", signal.SIGINT),
        ("in_del", signal.SIGTERM),
        ("in_weakref", signal.SIGINT),
        ("in_bare_except", signal.SIGTERM),
        ("turned_into_another", signal.SIGTERM),
        ("turned_into_another", signal.SIGINT),
    ],
)
def test_a_lost_signal_is_raised_again_and_cleanup_is_not_disturbed(tmp_path, where, number):
    """The cleanup takes longer than the second after which a lost signal is sent again."""
    program = PROGRAM.format(where=where, number=int(number), folder=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == ENDS[number]
    assert (tmp_path / "lost").exists() == (where not in ("heard", "turned_into_another"))
    assert (tmp_path / "cleaned").exists()


PREEMPTED = """
import os, pathlib, signal, sys, time
from deltapref_jax.artifacts.lease import LostLease
from launch import flags
from launch.flags import run_main

def main(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

def lost(_):
    raise LostLease("Another process took over.")

flags._PROJECT = ("<string>",)  # An error of this program counts as one of the project's.
run_main({main})
"""


@pytest.mark.parametrize(
    ("main", "flags", "code"),
    [
        ("main", [], 75),
        ("main", ["--preempted_exit_code=137"], 137),
        ("lost", [], 75),
        ("lost", ["--preempted_exit_code=137"], 137),
        ("main", ["--preempted_exit_code=0"], 2),
        ("main", ["--preempted_exit_code=256"], 2),
        ("main", ["--preempted_exit_code=1"], 2),
        ("main", ["--preempted_exit_code=2"], 2),
        ("main", ["--preempted_exit_code=130"], 2),
    ],
)
def test_a_flag_chooses_the_exit_code_after_a_preemption(main, flags, code):
    ended = subprocess.run(
        [sys.executable, "-c", PREEMPTED.format(main=main), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
