import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.answers.check import check
from deltapref_jax.answers.extract import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Plan: x.\n1. 14 + 5 = 19\nAnswer: 19", "19"),
        ("The answer is 42.", "42"),
        ("So the final answer is: $x = 3$.", "$x = 3$"),
        ("**Answer:** 7", "7"),
        ("**Answer: 7.**", "7"),
        ("ANSWER = Wed", "Wed"),
        ("The answer is\n12", "12"),
        ("Answer: 1\nno, Answer: 2", "2"),
        ("Answer: 3 5 8", "3 5 8"),
        ("so it is 5, then 6", "6"),
        ("it costs 1,250.50 in all", "1,250.50"),
        ("half is 1/2", "1/2"),
        ("minus -3", "-3"),
        (r"thus \boxed{\frac{1}{2}} holds. Answer: 9", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{ {2} }", r"\boxed{1} and \boxed{ {2} }"),
        (r"\boxed{1} was wrong, it is \boxed{ {2} }", "{2}"),
        (r"\boxed{3}, \boxed{5}", r"\boxed{3}, \boxed{5}"),
        (r"\boxed{\boxed{7} cm}", r"\boxed{7} cm"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{ 2", "2"),
        (r"\boxed{1} then \boxed{", "1"),
        ("<think>Answer: 1</think> Answer: 2", "2"),
        ("Answer: 1</think> 2", "2"),
        ("<think>Answer: 1", ""),
        ("in <answer> tags: <answer>3</answer>", "3"),
        ("<answer>3", "3"),
        ("4 + 4\n#### 8", "8"),
        ("#### Step 1\nadd 4 and 4", "4"),
        ("Answer: 7\nThe answer is not 6.", "7"),
        ("### Final Answer\n\n12", "12"),
        ("from 5-7", "5-7"),
        (r"\boxed{1", "1"),
        ("<answer> a\nb </answer> \\boxed{3}", "a\nb"),
        ("<answer>1</answer> <ANSWER>2</ANSWER>", "2"),
        ("<answer></answer>", ""),
        ("Let me answer the question step by step. 6 * 7 = 42", "42"),
        ("I answered 5 of them, 8 are left", "8"),
        ("The answers differ: 3", "3"),
        ("nothing here", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "answer",
                    "Answer: ",
                    "\\boxed{",
                    "{",
                    "}",
                    "<answer>",
                    "</answer>",
                    "**",
                    ".",
                    " is ",
                    "\n",
                    "7",
                ]
            ),
            st.text(max_size=3),
        ),
        max_size=12,
    ).map("".join)
)
def test_any_text_has_an_answer_or_none(text):
    found = final_answer(text)
    assert found == found.strip()
    assert found in text


@pytest.mark.parametrize(
    "piece",
    [
        "<answer>", "</answer>", "<think>", "answer", "answer:", "answer is ", "answer is\n", "$",
        "Answer: not 6 ", r"\boxed{", r"\boxed{}", r"\boxed{1},", "{", "}", "\\", "$$", r"\[",
        r"\(", "(", "*", " ", "\n", "#", "\n####", "#### 1\n", "1", "1,", "1/", "-", "1-", "a ",
        "≈", ", or about ", "answer to ", "<solution>", "</solution>", "one ", "and ", "```",
        "one hundred ", "答案是", "wait, ", r"not \boxed{1}", "[THINK]", "<|x|>", "1'000", "1_",
        "so A", r"\boxed{\boxed{",
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", ["", "The answer is ", r"\boxed{", "Answer:"])
def test_no_text_takes_more_than_linear_time(piece, head):
    """50 kB, which take minutes where a pattern backtracks; a second is plenty."""
    text = head + piece * (50_000 // len(piece))
    began = time.process_time()
    final_answer(text)
    check({"checker": "exact", "answer": "x^2", "meta": "{}"}, text)
    check({"checker": "exact", "answer": "12", "meta": "{}"}, text)
    check({"checker": "exact", "answer": "no", "meta": "{}"}, text)
    assert time.process_time() - began < 1
