"""What holds in the process that grades one answer, whatever the answer is.

Some scorers hand the model's text to `eval`, directly or through sympy's parser. Four barriers
stand behind each other:

1. `eval` computes with numbers, literals and the mathematical functions of `NAMES` only.
2. An audit hook (PEP 578) refuses every event that grading does not need.
3. The kernel grants no further file, process, byte on disk, CPU second or memory.
4. Root's rights are given up, because some of these limits do not bind root.

The process grades one answer and ends, so nothing that an answer changed reaches the next one.
"""

import builtins
import contextlib
import os
import posix
import resource
import sys
from collections.abc import Callable, Collection, Mapping
from types import CodeType
from typing import Any

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30  # beyond what the process holds when it starts

# The first two lines are what sympy's parser writes around an answer's numbers and symbols.
_MATHEMATICS = """
Symbol Integer Float Rational Function Add Mul Pow Mod Eq Ne Lt Le Gt Ge Equality Unequality
StrictLessThan LessThan StrictGreaterThan GreaterThan factorial factorial2 subfactorial
E I pi oo zoo nan GoldenRatio EulerGamma Catalan true false
exp log ln sqrt cbrt root real_root Abs abs sign floor ceiling Min Max min max re im arg conjugate
sin cos tan cot sec csc sinc asin acos atan acot asec acsc atan2
sinh cosh tanh coth sech csch asinh acosh atanh acoth asech acsch
gamma loggamma beta binomial zeta polylog polygamma uppergamma lowergamma LambertW hyper
erf erfc erfi Ei Si Ci Shi Chi li Li expint fresnels fresnelc Heaviside DiracDelta Piecewise
besselj bessely besseli besselk
"""
NAMES = frozenset(_MATHEMATICS.split())

# Events of Python's audit table that grading raises itself: running code that `guarded_eval` has
# let through, and looking up attributes.
_NEEDED_EVENTS = """
compile exec builtins.id object.__getattr__ object.__setattr__ object.__delattr__
sys._getframe sys._getframemodulename array.__new__ code.__new__
"""
_HARMLESS = frozenset(_NEEDED_EVENTS.split())


class Refused(Exception):
    """The answer asks for more than arithmetic."""


def _refusal(code: CodeType, known: Collection[str]) -> str:
    """What `code` holds beyond arithmetic, as a name; "" if nothing."""
    for name in code.co_names:  # variables, functions and attributes alike
        if name not in NAMES and name not in known:
            return name
    # A lambda, a comprehension or a generator is code of its own among the constants.
    return next((c.co_name for c in code.co_consts if isinstance(c, CodeType)), "")


def _guarded_eval(note: Callable[[str], None]) -> Callable[..., Any]:
    real_eval = builtins.eval

    def guarded(
        source: str | bytes | CodeType,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        /,
    ) -> Any:
        code = (
            source if isinstance(source, CodeType) else compile(source.strip(), "<answer>", "eval")
        )
        # The scorer's own symbols are in `locals`; an answer cannot put anything there.
        if strange := _refusal(code, locals or ()):
            note(strange)
            raise Refused(strange)
        return real_eval(code, {} if globals is None else dict(globals), locals)

    return guarded


def _refuse_events(note: Callable[[str], None], import_first: Callable[[str], None]) -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _HARMLESS:
            return
        if event == "import":
            import_first(args[0])
            return
        note(event)
        raise Refused(event)

    sys.addaudithook(hook)


def _address_space() -> int:
    """Bytes of address space that the process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def _limit(cpu_seconds: int, memory: int) -> None:
    """Kernel limits; they cannot be raised again."""
    if held := _address_space():
        resource.setrlimit(resource.RLIMIT_AS, (held + memory,) * 2)
    if os.geteuid() == 0:  # RLIMIT_NPROC does not bind root; a user namespace may lack nobody
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # what is open stays, nothing can be opened


def confine(
    note: Callable[[str], None],
    import_first: Callable[[str], None],
    cpu_seconds: int = CPU_SECONDS,
    memory: int = MEMORY_BYTES,
) -> None:
    """Confines this process until its end. There is no way back.

    Args:
      note: receives what is refused (a name or an audit event) before `Refused` is raised.
      import_first: receives the name of a module that is about to be imported; where it returns,
        the import goes on.
      cpu_seconds: CPU time after which the kernel ends the process with SIGXCPU.
      memory: bytes that the process may take beyond what it holds now.
    """
    _limit(cpu_seconds, memory)
    for module in (os, posix):
        for unaudited in ("mkfifo", "mknod"):
            delattr(module, unaudited)
    builtins.eval = _guarded_eval(note)

    real_exec = builtins.exec

    def guarded_exec(source: Any, *scopes: Any, **named: Any) -> None:
        # sympy writes the functions of its polynomials itself; nothing else makes code here.
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("sympy."):
            note("exec")
            raise Refused("exec")
        real_exec(source, *scopes, **named)

    builtins.exec = guarded_exec
    _refuse_events(note, import_first)
