"""Entry points share one way to start: an error that a user can mend is one sentence on stderr and exit code 2.

Ctrl-C ends with 130; SIGTERM, by which machines are taken back, with `Preempted.code` once the work at hand is safe.
"""

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from deltapref_jax.files import ArtifactError

from deltapref_jax import config
from deltapref_jax.preemption import (
    Preempted,
    abort_all_on_error,
    exit_all,
    exit_process,
    raise_on_sigterm,
)

flags.disclaim_key_flags()  # what is defined here belongs to the entry point that asks for it, and to its --help
_PROJECT = tuple(
    f"{Path(__file__).resolve().parent.parent / name}{os.sep}"
    for name in ("deltapref_jax", "launch", "evals", "configs")
)


def run_main(main: Callable[[list[str]], None], config: str = "") -> None:
    """Parses flags and runs `main`; the project's own errors end as their sentence, others with their traceback.

    `config` is the file that --config means where it is not given. It is put before the other flags and is not their
    default: a default is read, overrides and all, where no error of it can be caught.
    """
    logging.set_verbosity(
        logging.FATAL
    )  # Orbax logs a failed save's traceback; what matters of it is in the sentence
    if config and not any(re.match(r"--?config(=|$)", a) for a in sys.argv[1:]):
        sys.argv.insert(1, f"--config={config}")
    app.run(_sentences(main), flags_parser=_parse)


def define_profile_steps() -> flags.FlagHolder[str]:
    """The flag `--profile_steps`; `window` reads its value."""
    return flags.DEFINE_string(
        "profile_steps",
        "",
        "First and last training step, from 1, that JAX's profiler traces, "
        "such as 10:12; the trace is put into profile/ of the folder of every arm that is still "
        "to be trained, for XProf or Perfetto.",
    )


def window(steps: str) -> tuple[int, int] | None:
    """`10:12` as numbers; None for the empty text.

    Raises:
      ConfigError: it is not two steps in order.
    """
    if not steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise config.ConfigError(
            f"--profile_steps is {steps!r}; give the first and the last step, from 1, such as "
            "10:12."
        )
    return int(found[1]), int(found[2])


def _fail(sentence: str, code: int = 2) -> int:
    print(sentence, file=sys.stderr)
    return code


def _sentences(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def wrapped(argv: list[str]) -> None:
        raise_on_sigterm()
        if argv[1:]:
            exit_all(
                2,
                f"{argv[1]!r} is no flag; flags begin with -- and have = before their value (--help lists them).",
            )
        try:
            main(argv)
            exit_process()
        except Exception as e:
            raised = traceback.extract_tb(e.__traceback__)[-1].filename
            if (
                isinstance(e, ArtifactError | FileNotFoundError | ValueError | FloatingPointError)
                and not logging.level_debug()
                and raised.startswith(_PROJECT)
            ):
                exit_all(2, str(e))
            abort_all_on_error(e)
            raise  # a library's complaint about us is ours to mend, and needs its traceback
        except KeyboardInterrupt:
            exit_all(130, "Stopped. Run the same command to continue; finished shards are kept.")
        except Preempted as e:
            # Each process has received the signal, and saves and exits by itself.
            exit_all(Preempted.code, str(e), notify_others=False)

    return wrapped


def _parse(argv: list[str]) -> list[str]:
    """absl's parser; what it and the config library raise is turned to one sentence."""
    given = next((a.split("=", 1)[1] for a in argv[1:] if re.match(r"--?config=", a)), "")
    path = given.split(":")[0]
    if path and not (path.endswith(".py") and Path(path).is_file()):
        sys.exit(
            _fail(
                f"There is no config file {path!r}; name a Python file with get_config(), such as "
                "--config=configs/quickstart.py."
            )
        )
    try:
        return flags.FLAGS(argv)
    except Exception as e:  # the config file may raise anything
        sys.exit(_fail(_sentence(e, given, argv)))


def _sentence(e: Exception, given: str, argv: list[str]) -> str:
    text = str(e.args[0] if isinstance(e, KeyError) else e).replace(
        "module 'config_config'", "the file"
    )
    if found := (
        re.search(
            r"Field (?P<name>\w+) not found on dataclass <class '[\w.]+\.(?P<kind>\w+)'>", text
        )
        or re.search(r"<class '[\w.]+\.(?P<kind>\w+)'>\.(?P<name>\w+) does not exist", text)
    ):
        name, kind = found["name"], found["kind"]
        known = ", ".join(f.name for f in dataclasses.fields(getattr(config, kind)))
        at = next((a for a in argv if re.search(rf"\b{name}\b", a.split("=")[0])), name)
        return f"{at}: {kind} has no field {name!r}; it has {known}."
    if isinstance(e, IndexError):
        at = ", ".join(a for a in argv if re.match(r"--?config\.[^=]*\[", a))
        return f"{at}: the config has no item of that number; items count from 0."
    if isinstance(e, flags.Error) and "Traceback" not in text:
        if "must have a value other than None" in text:
            return f"{text.split(':')[0].split('=')[0].replace('flag ', '')} is missing; give it a value (--help)."
        return f"{' '.join(text.split()).removeprefix('flag ').rstrip('.')}; mend the flag (--help lists them)."
    places = [
        f for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(given.split(":")[0])
    ]
    line = getattr(e, "lineno", None) or (places[-1].lineno if places else None)
    said = text.splitlines()[-1] if "Traceback" in text else f"{type(e).__name__}: {text}"
    return (
        f"The config {given}{f', line {line},' if line else ''} cannot be loaded ({said}); mend it."
    )
