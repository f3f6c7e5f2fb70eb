"""Writes cases.jsonl: traces with their reference answers, labelled. Run it by hand.

    python tests/answers/make_cases.py

A case is what a model says (`KINDS`: with golds that it equals and golds that it does not) in a
sentence (`FRAMES`). A label follows from the construction and not from any checker.
"""

import json
import random
import re
from pathlib import Path

PER_KIND = 500

FRAMES = r"""
Answer: {a}
**Answer:** {a}
**Answer: {a}**
**Answer**: {a}
- **Answer:** {a}
> Answer: {a}
ANSWER: {a}
the answer = {a}
The answer is {a}.
The answer is **{a}**.
The answer is: {a}
The answer is {a}!
So the answer is {a}
The final answer is {a}.
Final Answer: {a}
Final Answer: {a}.
### Final Answer\n\n{a}
### Final Answer\n\n**{a}**
**Final Answer**\n\n{a}
The answer is therefore {a}.
Therefore, the answer is {a}, because the rest cancels.
The answer is {a}, since 99999 is too many.
The answer is {a}. Check: 3 + 99996 is not 99998.
The answer is {a}. I am sure of it.
The answer is {a} (see step 2).
The answer is {a}, not 99999.
The answer is {a}; anything else would break rule 99999.
The answer to the question is {a}.
The answer would be {a}.
The correct answer is {a}.
My answer is {a}.
We tried 99999 first, which fails. The correct answer is {a}.
The answer is 99999. Wait, that is wrong. The answer is {a}.
The answer is: {a}\nThe answer is not 99999.
Answer: {a}\n\nLet me know if you need 99999 more examples!
Step 1: look.\nStep 2: think.\nAnswer: {a}\n
<think>Perhaps the answer is 99999?</think>\nThe answer is {a}.
<think>So \boxed{99999}?</think>\n\nAnswer: {a}
Perhaps the answer is 99999? No.</think>The answer is {a}.
<think>Answer: 99999</think>\n\n\boxed{LATEX}
Thus \boxed{LATEX}.
Thus $\boxed{LATEX}$.
\[\boxed{LATEX}\]
$$\boxed{ LATEX }$$
The answer is $\boxed{LATEX}$.
The answer is \boxed{LATEX
\boxed{\boxed{LATEX}}
My first try was \boxed{99999}. In the end it is \boxed{LATEX}.
\boxed{LATEX} is the answer, as 99999 shows.
**Final Answer**\n\[ \boxed{LATEX} \]
Answer: $LATEX$
Answer: \(LATEX\)
Answer: \[LATEX\]
Answer:\n\[\nLATEX\n\]
Answer: $$LATEX$$
The answer is $LATEX$.
The answer is \(LATEX\), because 99999 is odd.
The answer is $LATEX$. So we stop at step 99999.
Final Answer: The final answer is $LATEX$. I hope it is correct.
<answer>{a}</answer>
<answer>\n{a}\n</answer>
<answer>The answer is {a}.</answer>
<answer>$LATEX$</answer>
<answer>\boxed{LATEX}</answer>
The answer goes into <answer> tags. <answer>{a}</answer>
<think>I must write <answer>99999</answer>.</think><answer>{a}</answer>
<answer>99999</answer> No, again: <answer>{a}</answer>
<final_answer>{a}</final_answer>
<scratchpad>The answer is 99999.</scratchpad>The answer is {a}.
[THINK]The answer is 99999.[/THINK]Answer: {a}
<|begin_of_thought|>\boxed{99999}<|end_of_thought|>\n\nAnswer: {a}<|end_of_solution|>
<solution>The answer is {a}.</solution> It took 99999 tries.
\boxed{LATEX}, not \boxed{99999}
\boxed{99999}\nWait, that is wrong. The answer is {a}.
The answer is:\n```\n{a}\n```
Answer:\n```text\n{a}\n```\nI tried 99999 too.
The answer comes to {a}.
Ans: {a}
答案是{a}。
答案：{a}
最终答案为：\boxed{LATEX}
Ответ: {a}.
Die Antwort ist {a}.
La respuesta es {a}.
Réponse : {a}
答えは {a}
The answer is {a}.<|im_end|>
""".strip().splitlines()

# What is said | golds that it equals | golds that it does not. "~" before a line: for "math" alone,
# because it takes algebra. "tex " before it: LaTeX, so it may stand between dollars or in a box.
NUMBER = r"""
tex 12 | 12; 12.0; 12.00; $12$; \$12; 12 apples; 12. | 13; 1; 2; 120; -12; 1.2
tex 0 | 0; 0.0 | 1; 10; 00.1
tex 7 | 7; +7; 7/1; 14/2 | 6; 77; -7; 0.7
tex -3 | -3; −3; -3.0; -6/2 | 3; 0; -30; -33
−3 | -3 | 3; 33
tex +7 | 7 | -7
tex 1,200 | 1200; 1,200; 1{,}200; $1,200; 1200.00 | 1; 200; 12; 120; 1.2
1200 | 1,200 | 1,201; 120
tex 1{,}200 | 1200; 1,200 | 1; 200
tex 1\,200 | 1200 | 1; 200
tex 1{,}200{,}000 | 1200000 | 1200; 1
tex 12,345,678 | 12345678 | 12345; 678; 12
tex 1200.00 | 1200; 1,200 | 120000; 12
1 200 | 1200 | 1; 200
tex 3.50 | 3.5; 7/2; \frac{7}{2}; 3 1/2 | 35; 350; 3; 50; 3.05
tex 0.75 | 3/4; .75; 75\%; \frac34 | 75; 0.7; 0.075; 4/3
.5 | 0.5; 1/2 | 5; .05
tex 3/4 | 0.75; 3/4; \frac{3}{4}; 6/8; 75% | 3; 4; 34; 4/3; 0.34
tex \frac{3}{4} | 0.75; 3/4; \dfrac{3}{4} | 3; 4; 34; 4/3
tex \frac34 | 3/4; 0.75 | 34; 3; 4
tex \dfrac{3}{4} | 3/4 | 4/3
tex -\frac{1}{2} | -0.5; -1/2; \frac{-1}{2} | 0.5; 1/2; -2
tex \frac{-1}{2} | -1/2 | 1/2
tex -1/2 | -0.5 | 0.5; -2; 2
3 1/2 | 3.5; 7/2; 3\frac{1}{2} | 3; 31/2; 1.5; 0.5; 15.5
tex 3\frac{1}{2} | 3.5; 7/2 | 3; 31/2; 1.5
½ | 0.5; 1/2 | 1; 2; 12
3½ | 3.5; 7/2 | 3; 31/2; 15.5
50% | 50; 50%; 0.5; 1/2 | 5; 500; 0.05
tex 50\% | 50; 50%; 0.5 | 5; 500; 0.05
50 percent | 50; 50% | 5
tex 12.5\% | 12.5; 1/8 | 125; 12
$5 | 5; \$5; $5.00; 5 dollars | 50; 0.5; 6
tex \$5 | 5; $5 | 50; 6
$1,200.50 | 1200.5; 1200.50 | 1200; 1; 50; 120050
€5 | 5 | 6; 50
£5.20 | 5.2 | 5; 52
5 euros | 5 | 6
5 dollars | 5; $5 | 6; 50
5 pens | 5 | 6; 50
5 cm | 5 | 6; 50
5cm | 5 | 6
tex 5\text{ cm} | 5; 5\text{ cm} | 6; 50
tex 5\ \text{cm}^2 | 5 | 52; 2; 25
tex 5 \mathrm{~km} | 5 | 6
5 km/h | 5 | 6
5 square meters | 5 | 25
5 m² | 5 | 25; 52; 2
tex 90^\circ | 90 | 9; 900
90° | 90 | 9; 900
90 degrees | 90 | 9
1.2e3 | 1200; 1.2e3 | 1.2; 3; 12
1.5E-3 | 0.0015 | 1.5; -3; 1500
tex 1.2 \times 10^3 | 1200; 1,200 | 1.2; 10; 3; 12
tex 1.2 \times 10^{3} | 1200 | 1.2; 103; 3
tex 1.2 \cdot 10^{-3} | 0.0012 | 1200; 1.2
1.2 × 10^3 | 1200 | 1.2; 10; 3
1.2 × 10³ | 1200 | 1.2; 103
1.2 x 10^3 | 1200 | 1.2; 103
tex 10^6 | 1000000; 1,000,000 | 10; 6; 60; 106
tex x = 3 | 3; x=3 | 4; 33
tex x=3 | 3 | -3
tex n = 1,200 | 1200 | 1; 200
3 * 4 = 12 | 12 | 3; 4; 7; 34
3 × 4 = 12 | 12 | 3; 4
tex 3 \cdot 4 = 12 | 12 | 3; 4
tex \frac{24}{2} = 12 | 12 | 24; 2
100 - 25 = 75 | 75 | 100; 25; 10025
approximately 3.14 | 3.14 | 3; 14; 314
about 12 | 12 | 1; 2
exactly 12 | 12 | 1
tex \approx 3.14 | 3.14 | 3; 314
1.2 million | 1200000 | 1.2; 12; 1000000
2 billion | 2000000000 | 2
12 (one dozen) | 12 | 1
12 apples | 12 | 1; 13
12 of them | 12 | 13
1'200'000 | 1200000 | 1; 1200; 12
1_200 | 1200 | 1; 200
1.200.000 | 1200000 | 1.2; 1; 1200
12,34,567 | 1234567 | 12; 34; 1234; 567
tex (-3) | -3 | 3
25 | 025; 25 | 250; 0.25
033 | 33; 33.0 | 330; 3; 303
twelve | 12; 12.0 | 10; 2; 20
twenty-five | 25 | 20; 5; 205
minus three | -3 | 3; 0
negative three | -3 | 3
one hundred and five | 105 | 100; 5; 1005
two thousand three hundred | 2300 | 2000; 300; 2; 3
one million | 1000000; 1,000,000 | 1; 1000
a dozen | 12 | 1; 10
two thirds | 2/3; \frac{2}{3} | 2; 3; 23
three quarters | 3/4; 0.75 | 3; 4
one half | 1/2; 0.5 | 1; 2
half | 0.5 | 1; 2
one and a half | 3/2; 1.5 | 1; 0.5; 2
two and a half | 2.5 | 2; 0.5
three or four | | 3; 4; 34; 7
two hundredths | | 2; 200; 100
twenty-fifth | | 20; 25; 5
(B) 42 | 42 | 4; 2
B. 42 | 42 | 4; 2
option (C), 42 | 42 | 4
7 or 9 | | 7; 9; 79; 8
either 7 or 9 | | 7; 9
7 and 9 | | 7; 9; 16
tex 7 \text{ or } 9 | | 7; 9
5-7 | | 5; 7; 57; -7; 6
5–7 | | 5; 7; 57; -7
5 to 7 | | 5; 7; 57
between 5 and 7 | | 5; 7; 6
from 5 to 7 | | 5; 7
5, 7 | | 5; 7; 57; 5.7
tex 1,2 | | 12; 1; 2
5, 7 and 9 | | 5; 7; 9
tex \{5, 7\} | | 5; 7
tex (5, 7) | | 5; 7
3 5 8 | | 3; 5; 8; 358
12:30 | | 12; 30; 1230
2:3 | | 2; 3; 23
tex x > 3 | | 3; 4
tex x \geq 3 | | 3; 4
tex 5x | | 5; 6
tex 2\pi | | 2; 3.14
tex \sqrt{5} | | 5; 2
tex 3 + 4i | | 3; 4; 7; 34
tex \pm 3 | | 3; -3
unknown | | 0; 1
none of them | | 0; 1
~tex 2^{10} | 1024 | 2; 10; 210
~tex 2^5 | 32 | 25; 2; 5
~tex \sqrt{16} | 4 | 16; 1
~tex 3 \cdot 4 | 12 | 3; 4; 34
~tex \frac{2+4}{3} | 2 | 243; 3
"""
EXPRESSION = r"""
tex x^2+2x+1 | x^2+2x+1; x^2 + 2x + 1; $x^2+2x+1$ | x^2+2x-1; x^2; 2x+1
~tex x^2+2x+1 | (x+1)^2; 1+2x+x^2; x^{2}+2x+1; (1+x)(x+1) | (x-1)^2; x^2+2x; (x+1)^3
~tex (x+1)(x-1) | x^2-1 | x^2+1; x-1
tex 2\sqrt{3} | 2\sqrt{3}; $2\sqrt{3}$; 2\sqrt3; 2 \sqrt{3} | \sqrt{3}; 3\sqrt{2}; 2\sqrt{5}; 2
~tex 2\sqrt{3} | \sqrt{12} | \sqrt{13}; 6
~tex \sqrt{12} | 2\sqrt{3} | 3\sqrt{2}; 12
~tex \frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2} | \sqrt{2}; \frac{1}{2}
tex \frac{\pi}{2} | \frac{\pi}{2}; \dfrac{\pi}{2}; \frac{\pi}2 | \pi; \frac{\pi}{3}; 2
~tex \frac{\pi}{2} | \pi/2; 0.5\pi; \frac12\pi | 2\pi; \frac{2}{\pi}; 1.57
tex \dfrac{a+b}{c} | \frac{a+b}{c} | \frac{a-b}{c}; \frac{a}{c}; a+b
~tex \frac{a+b}{c} | \frac{b+a}{c}; (a+b)/c | a+\frac{b}{c}
tex \pi | \pi; $\pi$ | 2\pi; 3; \pi^2
tex 2\pi r | 2\pi r; 2 \pi r | \pi r^2; 2\pi
~tex \pi r^2 | r^2\pi | 2\pi r
tex e^{2x} | e^{2x} | e^x; e^{x^2}; 2e^x
tex \ln 2 | \ln 2; \ln(2); \ln{2} | \ln 3; 2; \log_{10} 2
~tex \log_2 8 | 3 | 8; 2
~tex \sin^2 x + \cos^2 x | 1 | 0; 2
tex \left(1, 2\right) | (1,2); (1, 2); \left(1,2\right) | (2,1); (1,3); 1; [1,2]
tex (1,2) | (1, 2); $(1,2)$ | (2,1); (12); 1.2; 12
tex (1, -2, 3) | (1,-2,3) | (1,2,3); (1,-2); (3,-2,1)
tex [0, 1) | [0,1) | (0,1); [0,1]; [0,2)
tex \left[0, 1\right) | [0,1) | (0,1)
tex (-\infty, 3] | (-\infty,3] | (-\infty,3); (3,\infty)
tex (-\infty, 2) \cup (3, \infty) | (-\infty,2)\cup(3,\infty) | (2,3); (-\infty,2)
tex \{1, 2, 3\} | \{1,2,3\} | \{1,2\}; \{1,2,4\}; 6
~tex \{1, 2, 3\} | \{3,2,1\} | \{3,2\}
~tex 1, 2 | 2, 1; \{1,2\} | 1; 2; 12; 1, 3
~tex x = 3 \text{ or } x = 5 | 3, 5; 5, 3 | 3; 5; 3, 6
~tex 3 \text{ and } 5 | 3,5 | 3; 5; 8
tex x + 1 | x+1 | x-1; x; 1; x+2
tex 3 + 4i | 3+4i | 3-4i; 3; 4i; 7
~tex 3 + 4i | 4i+3 | 4+3i
tex x > 3 | x>3 | x<3; 3; x>4
~tex x > 3 | (3,\infty); 3 < x | (-\infty,3); [3,\infty)
~tex 1 < x < 2 | (1,2) | [1,2]
tex ROW{ 1 & 2 } | ROW{1&2}; ROW{ 1 & 2 } | ROW{ 1 & 3 }; ROW{2&1}
tex ROW{ 1 \\ 2 } | ROW{1 \\ 2} | ROW{ 2 \\ 1 }; 12
~tex y = 2x + 1 | 2x+1; y=2x+1; y = 1 + 2x | y=2x-1; 2x; 2x+2
tex y = 2x + 1 | y=2x+1 | y=2x-1; 1
~tex f(x) = x^2 | x^2 | x^3; 2x
tex \frac{x+1}{x-1} | \frac{x+1}{x-1}; \dfrac{x+1}{x-1} | \frac{x-1}{x+1}; 1
~tex \frac{x^2-1}{x-1} | x+1 | x-1; x^2-1
tex \frac{5!}{n!} | \frac{5!}{n!} | 5; \frac{5}{n}
~tex \binom{5}{2} | 10 | 5; 2; 52
tex \sqrt[3]{2} | \sqrt[3]{2} | \sqrt{2}; 3\sqrt{2}
~tex 2^{10} | 1024; 2^{10} | 210; 20; 2^{11}
tex a_1 | a_1; a_{1} | a_2; a; 1
~tex -x | -x; 0-x | x; 1-x
tex 6\sqrt{2} \text{ cm} | 6\sqrt{2} | 6; 2\sqrt{6}
tex x^2y | x^2y; x^2 y | xy^2; x^2
~tex xy | yx; xy | x+y; x
tex 10x | 10x | 10; x; 10y
tex 4 - \sqrt{3} | 4-\sqrt{3} | 4+\sqrt{3}; 4; \sqrt{3}
2*sqrt(3) | 2*sqrt(3) | 2*sqrt(5)
x^2 + 1 | x^2+1 | x^2-1; x^2; 1
pi/2 | pi/2 | pi/3; 2
sqrt(2) | sqrt(2) | 2; sqrt(3)
"""
LETTER = r"""
tex B | B; (B); b; B. | A; C; D
tex (B) | B; (B) | A; C; D; E
tex \text{B} | B; (B); \text{B} | A; D
tex \textbf{(B)} | B; (B) | A; C
tex \textbf{(B) } 42 | B | A; C; D
tex \mathrm{(B)} | B | A; C
tex \textbf{B} | B | A
b | B | A; C
(b) | B | A; D
B. | B | A
B) | B; B) | A; C
[B] | B | A
"B" | B | A; D
'B' | B | D
Option B | B; option B | A; C
option (B) | B; (B) | A
choice B | B | A
(B) 42 | B | A; C
B) 42 | B | A; C; D
B. 42 | B | A; C
B: 42 | B | A
B - the second one | B | A; C
B, the second one | B | A; C
B (the second one) | B | A
B. A would need one more step | B | A; C
B. Always | B | A
(B) A cat | B | A
B) A triangle | B | A; C
(C) Both A and B | C | A; B
D. None of the above | D | A; B
D: all of A, B and C | D | A; B; C
(A) | A; (A) | B; C
A | A | B; C; D
tex A | A | B; E
A. 7 | A | B
E | E; (E) | A; D
A or B | | A; B
A and C | | A; C
A, B | | A; B
both A and B | | A; B; C
either A or D | | A; D
neither A nor B | | A; B
A cat | | A; C
A bag of beans | | A; B
Because of D | | B; D
42 | | A; B
none of the options | | A; D
all of them | | A; D
not given | | A; B
I | | A; B
Apple | | A; E
Dog | | D; A
"""
TEXT = r"""
Monday | Monday; monday; \text{Monday}; Monday. | Tuesday; Sunday; Mon
monday | Monday | Tuesday; day
**Monday** | Monday | Sunday
"Monday" | Monday; "Monday" | Sunday
tex \text{Monday} | Monday; \text{Monday} | Sunday; Mo
tex \textbf{Monday} | Monday | Sunday
tex \mathrm{Monday} | Monday | Friday
yes | Yes; yes | no; maybe
Yes | yes | No
no | No | Yes; not
No | no | yes; none
True | true; True | False
false | False | True
even | even | odd; seven
odd | odd | even
tex \text{even} | even; \text{even} | odd
Paris | Paris; paris | London; Rome; Par
Paris, France | Paris, France | France; London
New York | New York; new york; New  York | York; New; Newark
the Eiffel Tower | the Eiffel Tower; Eiffel Tower | Tower; Big Ben
a triangle | triangle; a triangle | square; angle
Triangle | triangle | rectangle
isosceles triangle | isosceles triangle | triangle; isosceles
no solution | no solution; No solution | solution; no
tex \text{no solution} | no solution | solution; one
undefined | undefined | defined; 0
infinitely many | infinitely many | many; finitely many
listen | listen | silent; list
silent | silent | listen
dog | dog | god; do
Ann | Ann | Nan; Anna; Bob
Ann and Bob | Ann and Bob | Ann; Bob
red, green, blue | red, green, blue; red,green,blue | red; blue; red, green
3:45 PM | 3:45 PM; 3:45 pm | 3:45 AM; 3; 3:54 PM
July 4, 1776 | July 4, 1776 | July 4; 1776; July 5, 1776
2:3 | 2:3; 2 : 3 | 3:2; 2
hydrogen | hydrogen | hydrogen peroxide; oxygen
H2O | H2O; h2o | CO2; H2
Mr. Smith | Mr. Smith | Smith; Mr. Jones
U.S. | U.S. | U.K.
J. R. R. Tolkien | J. R. R. Tolkien | Tolkien; J. K. Rowling
left-handed | left-handed | right-handed; left
it depends | it depends | depends; it
first | first | second; last
x-axis | x-axis | y-axis
café | café; café | coffee
naïve | naïve | native
Zürich | Zürich | Basel
東京 | 東京 | 京都
да | да | нет
not enough information | not enough information | enough information
knight | knight | knave; night
Zoey is a knight | Zoey is a knight | Zoey is a knave; knight
"""
KINDS = {"number": NUMBER, "expression": EXPRESSION, "letter": LETTER, "text": TEXT}


def fill(frame: str, said: str, latex: bool) -> str:
    """The trace; "" where what is said cannot stand in this frame."""
    frame = frame.replace(r"\n", "\n")
    if "LATEX" in frame:
        return frame.replace("LATEX", said) if latex else ""
    if "**{a}**" in frame and said.startswith("**"):
        return ""
    if latex and "\\" in said:  # outside of dollars only where people write it so
        return frame.replace("{a}", f"${said}$")
    return frame.replace("{a}", said)


def cases(kind: str) -> list[dict]:
    """All combinations in a drawn order, each line of what is said in turn, and every gold."""
    lines = []
    for line in KINDS[kind].strip().splitlines():
        line = re.sub(r"ROW\{(.*?)\}", r"\\begin{pmatrix}\1\\end{pmatrix}", line)
        said, right, wrong = (part.strip() for part in line.replace("| |", "| ; |").split("|"))
        algebra = said.startswith("~")
        said = said.removeprefix("~")
        latex = said.startswith("tex ")
        golds = [(g.strip(), True) for g in right.split(";") if g.strip()]
        golds += [(g.strip(), False) for g in wrong.split(";") if g.strip()]
        lines.append((said.removeprefix("tex "), latex, algebra, golds))
    rng, found, seen = random.Random(kind), [], set()
    turn = 0
    while len(found) < PER_KIND:
        for said, latex, algebra, golds in lines:
            gold, right = golds[turn % len(golds)]
            frame = rng.choice(FRAMES)
            trace = fill(frame, said, latex)
            if not trace or (trace, gold) in seen:
                continue
            seen.add((trace, gold))
            checkers = ["math"] if algebra else ["math", "exact"]
            row = {"kind": kind, "gold": gold, "trace": trace, "right": right, "checkers": checkers}
            found.append(row)
        turn += 1
    return found[:PER_KIND]


if __name__ == "__main__":
    with Path(__file__).with_name("cases.jsonl").open("w", encoding="utf-8") as file:
        for kind in KINDS:
            for row in cases(kind):
                print(json.dumps(row, ensure_ascii=False), file=file)
