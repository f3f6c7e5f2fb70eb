"""The graders that parse what a model wrote. They run in the sandbox only: see `worker`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Grader = Callable[[str], float | bool]  # the answer's text -> right, or a score of at most 1


# math-verify's parser (ANTLR) learns its grammar from what it reads. A child forgets what it has
# learned and the worker keeps it, so the worker reads one of each notation: 170 ms become 10 ms.
_NOTATIONS = r"""
-1.5; 1,000; 12\%; \$5; 1:2; 5!; x=3; a_1; |x-1|; f(x)=x; 3+4i; x>3; 2^{10}; \ln(2); e^{2x}
\frac{1}{2}; \frac12; 3\frac{1}{2}; \dfrac{a+b}{c}; 2\sqrt{3}; \sqrt[3]{2}; 0.\overline{3}
x^2+2x-1; (x+1)(x-1); \pi r^2; \log_2 8; \sin^2 x; 3 \times 10^5; 5 \cdot 6; 10 \div 2; 90^\circ
(1,2); [0,1); \{1,2\}; (-\infty,2]\cup(3,\infty); 1\le x<2; x \in [0,1]; \binom{5}{2}
\text{blue}; 12\text{ cm}; \begin{pmatrix}1&2\\3&4\end{pmatrix}
"""
_warm = False


def math(request: Mapping[str, Any]) -> Grader:
    """Equality with `request["gold"]` by math-verify, LaTeX or plain."""
    global _warm
    from math_verify import parse, verify

    if not _warm:
        for text in re.split(r"[;\n]", _NOTATIONS):
            parse(f"${text.strip()}$", parsing_timeout=None)
        _warm = True

    def right(answer: str) -> bool:
        gold = parse(f"${request['gold']}$", parsing_timeout=None)
        said = parse(f"${answer}$", parsing_timeout=None)
        if verify(gold, said, timeout_seconds=None):
            return not _is_rounded(gold, said)
        # math-verify takes an interval for an inequality, and not the other way round.
        interval = re.fullmatch(r"\s*[(\[].*,.*[)\]]\s*", request["gold"])
        if interval and re.search(r"[<>]|\\[lg]e", answer):
            return bool(verify(said, gold, timeout_seconds=None))
        return False

    return right


def _is_rounded(gold: list[Any], said: list[Any]) -> bool:
    """Whether the answer is a decimal that is the reference in six digits, and not exactly.

    math-verify rounds both before it compares them.
    """
    import sympy

    one, other = (parsed[0] if parsed else None for parsed in (gold, said))
    one, other = (x.rhs if isinstance(x, sympy.Eq) else x for x in (one, other))
    if not isinstance(one, sympy.Expr) or not isinstance(other, sympy.Float | sympy.Rational):
        return False
    apart = sympy.nsimplify(one, rational=True) - sympy.Rational(str(other))
    return bool(apart.is_number and abs(sympy.N(apart, 50)) > 1e-30)


# Their scorers compare boards as tuples of tuples, which the prompt's JSON has turned into lists.
_BOARDS = ("arc_agi", "rearc")
_scorers: dict[str, Callable[..., Any]] = {}


def reasoning_gym(request: Mapping[str, Any]) -> Grader:
    """The score of reasoning-gym's own scorer of `request["task"]` for `request["entry"]`."""
    from reasoning_gym import get_score_answer_fn

    task, entry = request["task"], request["entry"]
    if task == "game_of_life_halting":  # its scorer (0.1.25) compares truth values of texts
        return lambda answer: answer.strip().lower() == str(entry["answer"]).lower()
    if task not in _scorers:  # some read a file of words first
        _scorers[task] = get_score_answer_fn(task)
    score = _scorers[task]
    if task in _BOARDS:
        metadata = entry["metadata"]
        board = tuple(tuple(row) for row in metadata["output"])
        entry = entry | {"metadata": metadata | {"output": board}}
    return lambda answer: score(answer=answer, entry=entry)


GRADERS: dict[str, Callable[[Mapping[str, Any]], Grader]] = {
    "math": math,
    "reasoning_gym": reasoning_gym,
}
