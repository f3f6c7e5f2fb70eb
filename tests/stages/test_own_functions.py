"""Functions that a config names: refused with a sentence, given data, hashed by their file."""

import dataclasses
import importlib
import sys

import pytest

from configs import quickstart
from deltapref_jax.callables import CHECKER, code_hash, code_hashes, load_callable
from deltapref_jax.config import Arm, ConfigError, Objective, Prompts
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.pairs.build import Rules
from deltapref_jax.pairs.own import select_by_function
from deltapref_jax.records import Pair, Prompt, Rating, Verdict
from deltapref_jax.stages.pair import PairTable
from deltapref_jax.stages.study import plan
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.validation import validate


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the module `own_functions`, which Python then finds."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code):
        (tmp_path / "own_functions.py").write_text(code)
        sys.modules.pop("own_functions", None)
        importlib.invalidate_caches()
        load_callable.cache_clear()

    yield write
    for name in ("own_functions", "other"):
        sys.modules.pop(name, None)
    load_callable.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_functions:", "no name of a function; write it as module:function"),
        ("own-functions:f", "no name of a function"),
        ("no_such_module:f", r"no_such_module cannot be imported \(ModuleNotFoundError: .*\); fix"),
        ("own_functions:g", "own_functions has no function 'g'; it has f, two"),
        ("own_functions:number", "has no function 'number'"),
        ("own_functions:f", r"called with \(prompt, answer\) and does not take that \(too many"),
    ],
)
def test_a_name_that_is_no_function_is_refused_when_the_config_is_checked(own, name, words):
    own("number = 1\n\n\ndef f(prompt): ...\n\n\ndef two(prompt, answer): ...\n")
    e = quickstart.get_config()
    e.judges, e.arms, e.claims, e.objectives, e.suites = (), (), (), (), ()
    e.prompts = (Prompts("jsonl", "questions.jsonl", checker=name),)
    with pytest.raises(ConfigError, match=rf"^config\.prompts\[0\]\.checker is '{name}'.*{words}"):
        validate(e)
    e.prompts[0].checker = "own_functions:two"
    assert validate(e) is e


def test_a_module_that_fails_is_refused(own):
    own("1 / 0\n")
    with pytest.raises(ConfigError, match=r"cannot be imported \(ZeroDivisionError: division"):
        load_callable("f", "own_functions:f", CHECKER)


def test_the_hash_is_that_of_the_files_content(own, tmp_path):
    own("def f(prompt, answer):\n    return True\n")
    first = code_hash("own_functions:f")
    assert code_hashes(["math", "own_functions:f", ""]) == {"own_functions:f": first}
    own("def f(prompt, answer):\n    return False\n")
    assert code_hash("own_functions:f") != first
    own("def f(prompt, answer):\n    return True\n")
    assert code_hash("own_functions:f") == first
    own("from operator import eq as f\n")  # built in
    assert load_callable("f", "own_functions:f", CHECKER)("a", "a")
    assert code_hash("own_functions:f") != first
    elsewhere = "from functools import partial\nfrom other import f as g\nf = partial(g, 1)\n"
    seen = set()
    for line in ("a", "b"):
        sys.modules.pop("other", None)
        (tmp_path / "other.py").write_text(f"def f(one, prompt, answer):\n    return '{line}'\n")
        own(elsewhere)
        seen.add(code_hash("own_functions:f"))
    assert len(seen) == 2


def checked(bench, node_of=VerdictTable):
    """The verdicts of a prompt's two traces by the function `check`."""
    prompts = [q._replace(checker="own_functions:check") for q in bench.questions]
    return node_of(
        label=("verify", "g"),
        prompts=bench.given(Prompt, prompts),
        traces=bench.traces("g", ["yes", "no", "perhaps"], finish=["eos", "eos", "stop"]),
        checkers=code_hashes(["own_functions:check"]),
    )


def test_a_checker_is_asked_about_every_trace_and_again_once_it_was_edited(own, bench):
    code = "def check(prompt, answer):\n    return {'yes': True, 'no': False}.get(answer)\n"
    own(code)
    first = checked(bench)
    assert [v.correct for v in bench.rows(Verdict, first)] == [True, False, None]
    own(code.replace("True", "prompt.answer == ''"))
    again = checked(bench)
    assert [v.correct for v in bench.rows(Verdict, again)] == [False, False, None]
    assert bench.workspace.path(first) != bench.workspace.path(again)
    # What a comparison of arrays gives is a verdict too.
    own("import numpy as np\n\ndef check(prompt, answer):\n    return np.bool_(answer == 'no')\n")
    assert [v.correct for v in bench.rows(Verdict, checked(bench))] == [False, True, False]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("return 1", r"returned '1' for trace {0} by generator g; a checker returns True, False"),
        (
            "return answer[9]",
            r"failed on trace {0} by generator g \(IndexError: .*, line 2 of own",
        ),
    ],
)
def test_a_checker_that_fails_is_named_with_its_trace(own, bench, code, words):
    own(f"def check(prompt, answer):\n    {code}\n")
    node = checked(bench)
    first = node.traces.rows[0].trace_id
    with pytest.raises(ConfigError, match=f"^own_functions:check {words.format(first)}"):
        bench.make(node)


def test_what_is_not_own_leaves_keys_as_they_were(bench):
    plain = VerdictTable(label=("v",), prompts=bench.prompts, traces=bench.traces("g", ["x"]))
    assert "checkers" not in plain.config()
    e = quickstart.get_config()
    report = plan(validate(e))
    assert all("selection" not in t[0].config() for t in report.pairs.values())
    assert all("checkers" not in n.config() for n in report.student.values())


def test_a_study_has_the_hashes_of_its_functions(own, tmp_path):
    own(
        "def rows(prompts):\n    yield {'prompt': 'What is 1 + 1?'}\n\n\n"
        "def check(prompt, answer):\n    return '2' in answer\n\n\n"
        "def pick(candidates, k, seed):\n    return range(k)\n"
    )
    e = quickstart.get_config()
    e.judges, e.claims = e.judges[1:], ()
    e.objectives = (Objective("dpo"),)
    e.suites = tuple(suite for suite in e.suites if suite.readout != "tuning")
    e.prompts = (Prompts("own_functions:rows", checker="own_functions:check"),)
    e.suites[0].prompts = dataclasses.replace(e.prompts[0])
    e.arms = (Arm("own", "strong", "weak", keep="own_functions:pick", fraction=0.5),)
    report = plan(validate(e))
    code = code_hash("own_functions:check")
    assert report.verdicts["weak"].checkers == {"own_functions:check": code}
    results = [*report.student.values(), *report.capability["weak"].values()]
    with_own = [n.suite for n in results if n.checkers == {"own_functions:check": code}]
    assert with_own == [e.suites[0].name] * 2
    assert [bool(n.checkers) for n in results].count(True) == 2
    pairs = report.pairs["own"][0]
    assert pairs.selection == {"own_functions:pick": code}
    assert pairs.ratings.keys() == {"strong", "weak"}
    before = report.prompts.contents
    own("# edited\n" + (tmp_path / "own_functions.py").read_text())
    assert plan(validate(e)).prompts.contents != before
    # It may do without ratings, and what judges direct or rank can't.
    e.judges = ()
    assert plan(validate(e)).pairs["own"][0].ratings == {}
    e.arms[0].rejected_sample = "worst"
    with pytest.raises(ConfigError, match="Arm 'own' uses ratings, and config.judges is empty"):
        validate(e)


DIMENSIONS = ("factuality", "signal_to_noise")
RULES = Rules("strong", "weak", {"strong": 1, "weak": 1}, ("eos",), "generator", "any")


def selected(bench, fraction=1.0, kept=0):
    """The pairs of six prompts that the function `pick` keeps."""

    def rated(generator, values):
        traces = bench.traces(generator, ["x"] * 6).rows
        return bench.given(
            Rating,
            [
                Rating(trace.trace_id, "j", d, value + i, 0.0, 1.0, [0.2] * 5)
                for trace, value in zip(traces, values, strict=True)
                for i, d in enumerate(DIMENSIONS)
            ],
        )

    traces = {
        side: bench.traces(side, [side[: i + 1] * 2 for i in range(6)]) for side in RULES.min_traces
    }
    return PairTable(
        label=("pair", "own"),
        prompts=bench.prompts,
        traces=traces,
        verdicts={side: bench.given(Verdict, []) for side in traces},
        ratings={"strong": rated("strong", [3, 1, 4, 1, 2, 3]), "weak": rated("weak", [1] * 6)},
        rules=RULES,
        dimensions=DIMENSIONS,
        keep="own_functions:pick",
        rank_by="sum",
        fraction=fraction,
        kept=kept,
        seed=5,
        draw=7,
        selection=code_hashes(["own_functions:pick"]),
    )


def test_a_selection_keeps_what_it_returns_in_the_order_of_the_pool(own, bench):
    own(
        "def pick(candidates, k, seed):\n"
        "    assert seed == (5, 7) and k == 3\n"
        "    c = candidates[4]\n"
        "    assert c.gaps == {'factuality': 1.0, 'signal_to_noise': 1.0}\n"
        "    assert (c.chosen, c.rejected) == ('stron' * 2, 'weak' * 2)\n"
        "    assert c.chosen_tokens == 10 and c.question and c.task\n"
        "    gap = [c.gaps['factuality'] for c in candidates]\n"
        "    return sorted(range(len(gap)), key=gap.__getitem__)[::-1][:k]\n"
    )
    table = selected(bench, fraction=0.5)
    kept = [pair.prompt_id for pair in bench.rows(Pair, table)]
    assert kept == [bench.questions[i].prompt_id for i in (0, 2, 5)]
    assert bench.stats(table)["pool"] == 6
    assert bench.stats(table)["kept"] == 3


@pytest.mark.parametrize(
    ("returned", "wanted", "words"),
    [
        ("[0, 6]", None, "returned the index 6 for a pool of 6 pairs; .* from 0 to 5"),
        ("[-1]", None, "returned the index -1"),
        ("[2, 2]", None, "returned an index twice"),
        ("[True, False]", None, r"returned \[True, False\] …; a selection returns the indices"),
        ("['0']", None, r"returned \['0'\] …; a selection returns the indices"),
        ("[]", None, "keeps 0 of 6 pairs, and at least one must be kept"),
        ("[0]", 3, "keeps 1 of 6 pairs, and 3, by the arm's fraction or pairs, must be kept"),
        ("None", None, r"failed on a pool of 6 pairs \(TypeError: .*\); fix it"),
        ("1 / 0", None, r"failed on a pool of 6 pairs \(ZeroDivisionError: .*line 2 of own_fun"),
    ],
)
def test_a_selection_that_returns_something_else_is_refused(own, returned, wanted, words):
    own(f"def pick(candidates, k, seed):\n    return {returned}\n")
    with pytest.raises(ConfigError, match=f"^own_functions:pick {words}"):
        select_by_function("own_functions:pick", range(6), range(6), 3, wanted, (0, 0))


def test_a_selection_in_a_study_without_judges_gets_no_ratings(own, bench):
    own(
        "def pick(candidates, k, seed):\n"
        "    assert all(c.gaps == c.chosen_rating == {} for c in candidates)\n"
        "    length = [c.chosen_tokens for c in candidates]\n"
        "    return sorted(range(len(length)), key=length.__getitem__)[:2]\n"
    )
    table = dataclasses.replace(selected(bench), ratings={}, dimensions=())
    kept = [pair.prompt_id for pair in bench.rows(Pair, table)]
    assert kept == [bench.questions[i].prompt_id for i in (0, 1)]


def test_a_selection_without_a_fraction_keeps_as_many_as_it_likes(own, bench):
    own("def pick(candidates, k, seed):\n    return [5, 1]\n")
    kept = [pair.prompt_id for pair in bench.rows(Pair, selected(bench))]
    assert kept == [bench.questions[i].prompt_id for i in (1, 5)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("yield 'x'", r"Row 0 of own_functions:rows is str; yield a dict with 'prompt'"),
        ("yield {'question': 'x'}", r"Row 0 of own_functions:rows has no column 'prompt'"),
        ("raise OSError('gone')", r"own_functions:rows failed on its prompts \(OSError: gone, li"),
        ("return None", r"own_functions:rows failed on its prompts \(TypeError"),
        ("return []", r"The source .* holds no question"),
    ],
)
def test_a_source_that_yields_something_else_is_refused(own, code, words):
    own(f"def rows(prompts):\n    {code}\n")
    with pytest.raises(ConfigError, match=f"^{words}"):
        read_prompts(Prompts(kind="own_functions:rows"))


def test_a_source_is_read_as_a_file_is(own):
    own(
        "def rows(prompts):\n"
        "    for n in range(prompts.difficulty):\n"
        "        yield {'q': f'What is {n} + {n}?', 'a': 2 * n, 'n': n}\n"
        "    yield {'q': '', 'a': 0}\n"
    )
    source = Prompts("own_functions:rows", difficulty=5, prompt_field="q", answer_field="a")
    prompts, counts = read_prompts(dataclasses.replace(source, checker="exact", count=2))
    assert counts == {"read": 6, "empty": 1, "duplicate": 0}
    assert len(prompts) == 2
    assert {(p.task, p.checker) for p in prompts} == {("rows", "exact")}
    with_meta, _ = read_prompts(dataclasses.replace(source, checker="own_functions:check"))
    assert with_meta[3].meta == '{"a": 6, "n": 3}'
    assert with_meta[3].answer == "6"
