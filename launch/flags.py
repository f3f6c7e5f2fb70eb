"""The way that all entry points start and exit, and the flags that they share.

An error that the user can fix is one sentence on stderr, with exit code 2. Ctrl-C exits with 130,
and SIGTERM (preemption) with --preempted_exit_code once the current work is saved.
"""

import dataclasses
import functools
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from deltapref_jax import config
from deltapref_jax.display import printable
from deltapref_jax.files import ArtifactError, is_unwritable, unwritable
from deltapref_jax.preemption import (
    Preempted,
    abort_all_on_error,
    exit_all,
    exit_process,
    raise_on_signals,
    stop_raising,
    unheard_signal,
)
from launch.fields import config_help

# A flag defined here is listed in the --help of the entry point that calls the function.
flags.disclaim_key_flags()
_PROJECT = tuple(
    f"{Path(__file__).resolve().parent.parent / name}{os.sep}"
    for name in ("deltapref_jax", "launch", "evals", "configs")
)
_PATH = re.compile(r"(--?config)((?:\.\w+|\[[^\]]*\])+)(=.*)?", re.DOTALL)
"""A flag for a field: the config, the path within it, and the value."""
_PART = re.compile(r"\.(\w+)|\[([^\]]*)\]")
"""One step of a path: a field's name, or an item's name or number."""
_OTHER_CODES = (1, 2, 130)
"""Exit codes that cannot mean a preemption as well: a traceback, an error to fix, Ctrl-C."""


class _NoSuchPath(ValueError):
    """A flag names nothing in the config; the message is one sentence."""


def run_main(
    main: Callable[[list[str]], None], default_config: str = "", listed: type | None = None
) -> None:
    """Parses flags and runs `main`.

    The project's own errors exit with their sentence, and others with their traceback.

    Args:
      main: the entry point's function, called with the arguments that are no flags.
      default_config: the config file to use without --config.
      listed: class of the config whose fields --help lists.
    """
    if listed and any(re.match("--?help", argument) for argument in sys.argv[1:]):
        program = sys.modules["__main__"]
        program.__doc__ = f"{program.__doc__ or ''}\n{config_help(listed)}"
    # Orbax logs the traceback of a failed save; the sentence has what matters of it.
    logging.set_verbosity(logging.FATAL)
    if not sys.stderr.isatty():
        # In a log, the bars of libraries would be lines without end; these are read on import.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It is inserted as an argument, and is not the flag's default, because absl would load the
    # default and its overrides before `_parse` can catch an error.
    if default_config and not any(re.match(r"--?config(=|$)", a) for a in sys.argv[1:]):
        sys.argv.insert(1, f"--config={default_config}")
    _define_preempted_exit_code()
    app.run(_with_exit_codes(main), flags_parser=_parse)


def _define_preempted_exit_code() -> None:
    if "preempted_exit_code" not in flags.FLAGS:
        flags.DEFINE_integer(
            "preempted_exit_code",
            Preempted.code,
            "Exit code after SIGTERM, or where another process took over: run the same command "
            "again. Schedulers restart on some codes only (docs/running.md).",
            lower_bound=1,
            upper_bound=255,
        )
        flags.register_validator(
            "preempted_exit_code",
            lambda code: code not in _OTHER_CODES,
            "1, 2 and 130 mean an exception, an error to fix and Ctrl-C; choose another code",
        )


def define_dry_run() -> tuple[flags.FlagHolder[bool], flags.FlagHolder[str]]:
    """Defines the flags `--dry_run` and `--devices`, which `check_dry_run` checks."""
    dry_run = flags.DEFINE_bool("dry_run", False, "Print the plan and its cost, and make nothing.")
    devices = flags.DEFINE_string(
        "devices",
        "",
        "Devices that a dry run assumes, instead of those that the environment describes: "
        "HOSTSxDEVICES, such as 4x4, or SLICESxHOSTSxDEVICES; gpu:2x8 are two hosts of GPUs.",
    )
    return dry_run, devices


def check_dry_run(dry_run: bool, devices: str) -> None:
    """Refuses devices that nothing would assume.

    Raises:
      ConfigError: there are some and no dry run.
    """
    if devices and not dry_run:
        raise config.ConfigError(
            f"--devices is {devices!r} and only a dry run assumes devices; leave it out, or add "
            "--dry_run."
        )


def define_profile_steps() -> flags.FlagHolder[str]:
    """Defines the flag `--profile_steps`, whose value `window` parses."""
    return flags.DEFINE_string(
        "profile_steps",
        "",
        "First and last training step, from 1, that JAX's profiler traces, "
        "such as 10:12; the trace is written to profile/ in the folder of every arm that is still "
        "to be trained, for XProf or Perfetto.",
    )


def define_initialization_timeout() -> flags.FlagHolder[int]:
    """Defines the flag `--initialization_timeout`, in seconds."""
    return define_count(
        "initialization_timeout",
        300,
        "Seconds to wait for the other processes of a JAX job when it starts, as in "
        "jax.distributed.initialize.",
    )


def define_student() -> flags.FlagHolder[str]:
    """Defines the flag `--student`, for an entry point that looks at one of several."""
    return flags.DEFINE_string("student", "", "Name of one of the config's several students.")


def define_count(name: str, default: int, meaning: str, most: int = 2**20) -> flags.FlagHolder[int]:
    """Defines a flag for a whole number from 1 to `most`."""
    return flags.DEFINE_integer(name, default, meaning, lower_bound=1, upper_bound=most)


def define_output(name: str = "output") -> flags.FlagHolder[str]:
    """Defines the flag `--output`, or of another name: a JSON file in a folder that exists."""
    output = flags.DEFINE_string(name, "", "JSON file to write.")
    flags.register_validator(
        name,
        lambda path: (
            "\0" not in path
            and not os.path.isdir(path)
            and os.path.isdir(os.path.dirname(path) or ".")
            if path
            else True
        ),
        "its folder must exist, and it must be no folder itself",
    )
    return output


def window(steps: str) -> tuple[int, int] | None:
    """Parses first and last step, such as "10:12"; returns None for an empty string.

    Raises:
      ConfigError: the value is not two steps in order.
    """
    if not steps:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise config.ConfigError(
            f"--profile_steps is {steps!r}; give the first and the last step, from 1, such as "
            "10:12."
        )
    return int(match[1]), int(match[2])


def _fail(sentence: str, code: int = 2) -> int:
    print(printable(sentence), file=sys.stderr)
    return code


def _with_exit_codes(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def wrapped(argv: list[str]) -> None:
        raise_on_signals()
        Preempted.code = flags.FLAGS.preempted_exit_code
        if argv[1:]:
            exit_all(
                2,
                f"{argv[1]!r} is no flag; flags begin with -- and have = before their value "
                "(--help lists them).",
            )
        try:
            main(argv)
            exit_process()
        except Exception as e:
            if signalled := unheard_signal():
                _exit_for_signal(signalled)
            raised_in = traceback.extract_tb(e.__traceback__)[-1].filename
            if (
                isinstance(e, ArtifactError | FileNotFoundError | ValueError | FloatingPointError)
                and not logging.level_debug()
                and raised_in.startswith(_PROJECT)
            ):
                code = getattr(e, "code", 2)
                exit_all(Preempted.code if code == os.EX_TEMPFAIL else code, str(e))
            if is_unwritable(e):
                exit_all(2, str(unwritable(getattr(e, "filename", None) or "The output", e)))
            abort_all_on_error(e)
            raise  # An exception of a library is a bug of this project, and needs its traceback.
        except (KeyboardInterrupt, Preempted) as e:
            _exit_for_signal(e)

    return wrapped


def _exit_for_signal(e: BaseException) -> NoReturn:
    stop_raising()
    if isinstance(e, KeyboardInterrupt):
        exit_all(130, "Stopped. Run the same command to continue; finished shards are kept.")
    # Each process has received the signal, and saves and exits by itself.
    exit_all(Preempted.code, str(e), notify_others=False)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; an exception of absl or the config library exits with one sentence."""
    config_flag = _config_flag(argv)
    path = config_flag.split(":")[0]
    if path and not (path.endswith(".py") and os.path.isfile(path)):
        sys.exit(
            _fail(
                f"There is no config file {path!r}; name a Python file with get_config(), such as "
                "--config=configs/quickstart.py."
            )
        )
    given = list(argv)
    try:
        # The library that defines a flag for each overridden field reads them from sys.argv.
        sys.argv[:] = argv = _with_numbers(given, config_flag)
        return flags.FLAGS(argv)
    except KeyboardInterrupt:
        sys.exit(_fail("Stopped before anything was done.", 130))
    except BaseException as e:  # The config file may raise any type.
        if not isinstance(e, Exception) and _line_in(path, e) is None:  # as --help does
            raise
        sentence = _explain(e, config_flag, given)
        for number, name in zip(argv, given, strict=True):
            sentence = sentence.replace(number, name)
        sys.exit(_fail(sentence))


def _config_flag(argv: list[str]) -> str:
    """The value of --config, which may be an argument of its own; "" without one."""
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        if match := re.match(r"--?config(=|$)", argument):
            return argument[match.end() :] if match[1] else following
    return ""


def _with_numbers(argv: list[str], config_flag: str) -> list[str]:
    """`argv` with the number of an item for its name: generators[weak] becomes generators[0].

    Raises:
      _NoSuchPath: a list has no item of that name, or the flag is no path.
    """
    paths = [argument for argument in argv if re.match(r"--?config\.", argument)]
    if not paths or not config_flag or "config" not in flags.FLAGS:
        return argv
    parser = flags.FLAGS["config"].parser
    # The flag is parsed later, and the file must not be executed again then.
    parser.parse = functools.cache(parser.parse)  # type: ignore[method-assign]
    loaded = parser.parse(config_flag)
    return [argv[0], *(_with_number(argument, loaded) for argument in argv[1:])]


def _with_number(argument: str, value: Any) -> str:
    """One argument; `value` is the config. A field that it has not is left to the library."""
    if not re.match(r"--?config\.", argument):
        return argument
    match = _PATH.fullmatch(argument)
    if not match:
        raise _NoSuchPath(
            f"{argument} is no path to a field; write it as --config.training.steps=60 or "
            "--config.generators[weak].temperature=0.7."
        )
    path, given = match[1], "config"
    for part in _PART.finditer(match[2]):
        if value is None:
            return argument
        if not part[1]:
            number = _number(argument, given, value, part[2])
            path = f"{path}[{number}]"
            value = value[number] if number < len(value) else None
        elif isinstance(value, tuple | list):
            raise _NoSuchPath(f"{argument}: {given} is a list; {_known(value)}.")
        else:
            path, value = f"{path}.{part[1]}", getattr(value, part[1], None)
        given += part[0]
    if dataclasses.is_dataclass(value) and match[3] not in ("=build", "=none"):
        fields = ", ".join(field.name for field in dataclasses.fields(value))
        raise _NoSuchPath(f"{argument}: {given} is no single value; set one of its {fields}.")
    return path + (match[3] or "")


def _number(argument: str, path: str, items: Any, item: str) -> int:
    """The number of an item that is given by its number or its name, which may be quoted."""
    if not isinstance(items, tuple | list):
        raise _NoSuchPath(f"{argument}: {path} is no list, so that it has no [{item}].")
    if re.fullmatch(r"\d{1,9}", item):
        return int(item)
    if re.fullmatch(r"-\d+", item):
        raise _NoSuchPath(f"{argument}: {path} has no item [{item}]; items count from 0.")
    name = item[1:-1] if re.fullmatch(r"'.*'|\".*\"", item) else item
    names = _names(items)
    if name in names:
        return names.index(name)
    raise _NoSuchPath(f"{argument}: there is no {name!r} in {path}; {_known(items)}.")


def _names(items: tuple[Any, ...] | list[Any]) -> list[str | None]:
    """What items are called, by their first field; a hub data set's name is its subset's."""

    def called(item: Any) -> str | None:
        named = dataclasses.is_dataclass(item) and dataclasses.fields(item)[0].name == "name"
        return getattr(item, "name", None) if named else None

    return [called(item) for item in items]


def _known(items: tuple[Any, ...] | list[Any]) -> str:
    """What the items of a list are called."""
    names = _names(items)
    if items and None in names:
        return "its items have no names, and are numbered from [0]"
    return f"it has {', '.join(f'[{name}]' for name in names) or 'no items'}"


def _line_in(path: str, e: BaseException) -> int | None:
    """The line of a config file in which `e` was raised; None where it was raised elsewhere."""
    frames = traceback.extract_tb(e.__traceback__)
    lines = [frame.lineno for frame in frames if path and frame.filename.endswith(path)]
    return lines[-1] if lines else None


def _explain(e: BaseException, config_flag: str, argv: list[str]) -> str:
    """Returns one sentence for an exception from parsing flags or loading the config file."""
    text = str(e.args[0] if isinstance(e, KeyError) else e).replace(
        "module 'config_config'", "the file"
    )
    if match := (
        re.search(
            r"Field (?P<name>\w+) not found on dataclass <class '[\w.]+\.(?P<kind>\w+)'>", text
        )
        or re.search(r"<class '[\w.]+\.(?P<kind>\w+)'>\.(?P<name>\w+) does not exist", text)
    ):
        name, kind = match["name"], match["kind"]
        known = [field.name for field in dataclasses.fields(getattr(config, kind))]
        argument = next((a for a in argv if re.search(rf"\b{name}\b", a.split("=")[0])), name)
        return f"{argument}: {config.no_such_field(kind, name, known)}"
    if isinstance(e, _NoSuchPath):
        return text
    if isinstance(e, flags.DuplicateFlagError):
        return "--config is given twice; give it once."
    if isinstance(e, IndexError):
        arguments = ", ".join(a for a in argv if re.match(r"--?config\.[^=]*\[", a))
        return f"{arguments}: the config has no item of that number; items count from 0."
    if isinstance(e, flags.Error) and "Traceback" not in text:
        if "must have a value other than None" in text:
            flag = text.split(":")[0].split("=")[0].replace("flag ", "")
            return f"{flag} is missing; give it a value (--help)."
        problem = " ".join(text.split()).removeprefix("flag ").rstrip(".")
        # Python's own words for a text that is no number do not say what is wanted.
        problem = re.sub(r"invalid literal for int\(\) .*", "it must be a whole number", problem)
        problem = re.sub(r"could not convert string to float.*", "it must be a number", problem)
        return f"{problem}; fix the flag (--help lists them)."
    path = config_flag.split(":")[0]
    # Without overrides the library raises an error whose text holds the traceback.
    lines = re.findall(rf'File "[^"]*{re.escape(path)}", line (\d+)', text)
    line = getattr(e, "lineno", None) or _line_in(path, e) or (lines[-1] if lines else None)
    where = f", line {line}," if line else ""
    reason = text.splitlines()[-1] if "Traceback" in text else f"{type(e).__name__}: {text}"
    if own := re.fullmatch(r"(?:[\w.]+\.)?ConfigError: (.*)", reason):
        return f"The config {config_flag}{where} cannot be loaded: {own[1]}"
    return f"The config {config_flag}{where} cannot be loaded ({reason}); fix it."
