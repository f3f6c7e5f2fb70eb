"""Functions of the user's own that a config names as `module:function`.

The module is trusted code, like the config that names it: it runs in this process. What it is given
is data: the answer of a trace was written by a model, and must not be run.
"""

import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltapref_jax.config import ConfigError

CHECKER = ("prompt", "answer")
SOURCE = ("prompts",)
SELECTION = ("candidates", "k", "seed")
"""What functions are called with, in this order; their own names of the arguments are free."""


def is_callable_name(text: str) -> bool:
    """Whether a field's value names a function."""
    return ":" in text


@functools.cache
def load_callable(field: str, name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """The function that a field names.

    Args:
      field: of the config, for messages.
      name: `module:function`; the module is found as Python finds it, in the current folder too.
      arguments: it is called with so many.

    Raises:
      ConfigError: the name has another form, the module can't be imported, it has no such function,
        or that takes other arguments.
    """
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", name)
    if not match:
        raise ConfigError(
            f"{field} is {name!r}, which is no name of a function; write it as module:function."
        )
    try:
        module = importlib.import_module(match[1])
    except Exception as e:  # the user's module may raise any type
        raise ConfigError(
            f"{field} is {name!r}, and the module {match[1]} cannot be imported "
            f"({type(e).__name__}: {e}); fix it, or put it where Python finds it, such as the "
            "current folder."
        ) from e
    function = getattr(module, match[2], None)
    if not callable(function):
        defined = [k for k, v in vars(module).items() if inspect.isfunction(v)]
        raise ConfigError(
            f"{field} is {name!r}, and the module {match[1]} has no function {match[2]!r}; it has "
            f"{', '.join(defined) or 'none'}."
        )
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{field} is {name!r}, which is called with ({', '.join(arguments)}) and does not take "
            f"that ({e}); give the function these arguments."
        ) from e
    return function


def code_hash(name: str) -> str:
    """16 hex digits of the file of a function's module, and of the file that defines it.

    What these files import is not hashed.

    Args:
      name: `module:function`, which `load_callable` has loaded.
    """
    module, _, function = name.partition(":")
    loaded = importlib.import_module(module)
    files = dict.fromkeys((loaded.__file__, _definition(getattr(loaded, function))))
    contents = b"\0".join(Path(file).read_bytes() for file in files if file)
    return hashlib.sha256(contents).hexdigest()[:16]


def _definition(code: Any) -> str | None:
    """The file that defines a function, or the class of another callable; None: it is built in."""
    while isinstance(code, functools.partial):
        code = code.func
    code = inspect.unwrap(code)
    is_source = inspect.isfunction(code) or inspect.isclass(code)
    try:
        return inspect.getsourcefile(code if is_source else type(code))
    except TypeError:
        return None


def code_hashes(names: Sequence[str]) -> dict[str, str]:
    """Name to hash of those that are functions; they may stand in several fields."""
    return {name: code_hash(name) for name in dict.fromkeys(names) if is_callable_name(name)}


def failure(name: str, where: str, e: Exception) -> ConfigError:
    """The sentence for an exception that a function raised.

    Args:
      name: of the function.
      where: what it was called for.
      e: its exception.
    """
    frame = e.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    line = ""
    if frame:
        line = f", line {frame.tb_lineno} of {Path(frame.tb_frame.f_code.co_filename).name}"
    return ConfigError(f"{name} failed on {where} ({type(e).__name__}: {e}{line}); fix it.")
