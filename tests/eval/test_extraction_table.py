r"""What a person reads as the final answer, string by string; and patterns that take no longer than their text is long."""

import time

import pytest

from eval import contamination, extraction
from eval.numerals import MAX_DIGITS
from eval.tasks import parsing


NONE = extraction.NOT_FOUND
NUMBERS = [
    ("18", "18"), ("18.", "18"), ("18.00", "18"), ("-18", "-18"), ("\u221218", "-18"), ("\u201318", "-18"),
    ("+18", "18"), ("1,234", "1234"), ("1,234,567", "1234567"), ("12,34,567", "1234567"), ("1,234.50", "1234.5"),
    ("1 234", "1234"), ("12 345 678", "12345678"), ("1\u00a0234", "1234"), ("1\u202f234", "1234"), ("1'234", "1234"),
    ("1\u2019234.5", "1234.5"), (r"1\,234", "1234"), (r"1,\!234", "1234"), (r"1{,}234", "1234"), ("1.234,56", "1234.56"),
    ("1.234.567", "1234567"), ("$18", "18"), (r"\$18", "18"), ("$ 18", "18"), ("-$18", "-18"), ("$-18$", "-18"),
    ("\u20ac18", "18"), ("18 \u20ac", "18"), ("\u00a318.50", "18.5"), ("\u00a51,000", "1000"), ("EUR 18", "18"),
    ("US$18", "18"), ("USD 18", "18"), ("18 USD", "18"), (".75", "0.75"), ("0.75", "0.75"), ("-.5", "-0.5"),
    ("3/4", "0.75"), ("1/3", "1/3"), ("-3/4", "-0.75"), ("6/3", "2"), ("3\u20444", "0.75"), ("\u00be", "0.75"),
    ("2 1/2", "2.5"), ("2\u00bd", "2.5"), (r"\frac{3}{4}", "0.75"), (r"\dfrac{3}{4}", "0.75"), (r"\tfrac34", "0.75"),
    (r"-\frac{3}{4}", "-0.75"), (r"2\frac{1}{2}", "2.5"), (r"\frac{1,000}{4}", "250"), ("1.8e1", "18"),
    ("1.8E+1", "18"), ("18e-1", "1.8"), (r"1.8 \times 10^1", "18"), (r"5 \cdot 10^{3}", "5000"), ("2 x 10^3", "2000"),
    ("50%", "50"), (r"50\%", "50"), ("12.5 %", "12.5"), ("2 million", "2000000"), ("1.5 thousand dollars", "1500"),
    ("18 eggs", "18"), ("18 dollars per day", "18"), ("18kg", "18"), ("18 cm^2", "18"), ("5 miles/hour", "5"),
    ("18, not 7", "18"), ("1st", "1"), ("007", "7"), ("\uff11\uff18", "18"), ("1\u200b8", "18"),
    # no single number
    ("10/12/2024", NONE), ("2024-10-12", NONE), ("12:30", NONE), ("5-6", NONE), ("5\u20136", NONE), ("5 to 6", NONE),
    ("5 or 6", NONE), ("5 and 6", NONE), ("5, 6", NONE), ("3/0", NONE), (r"\frac{3}{0}", NONE), ("12,5", NONE),
    ("1.2.3", NONE), ("192.168.0.1", NONE), ("2^3", NONE), ("18 + 2", NONE), ("18 * 2", NONE), (r"2\pi", NONE),
    (r"3\sqrt{2}", NONE), ("1e999", NONE), ("1e-999", NONE), ("9" * 101, NONE), ("9" * 5000, NONE),
    ("1/" + "1" * 400, NONE), ("1/" + "1" * 5000, NONE), ("0." + "1" * 5000, NONE), ("inf", NONE), ("nan", NONE),
    ("-inf", NONE), ("eighteen", NONE), ("", NONE), ("-", NONE), ("...", NONE), (",", NONE), ("\u0661\u0668", NONE),
]  # fmt: skip
FRAMES = ["#### {}", "The answer is {}", "So the answer is: {}\n\nThat is all.", "**Answer:** {}", "####{}\n"]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("written", "meant"), NUMBERS, ids=lambda text: text[:20])
def test_a_number_in_a_sentence(frame, written, meant):
    assert extraction.training_format(frame.format(written)) == meant


def test_the_table_is_long_enough():
    assert len({*NUMBERS, *BOXES, *SOLUTIONS}) == len(NUMBERS) + len(BOXES) + len(SOLUTIONS) >= 100
    assert len("9" * MAX_DIGITS) == len(extraction.training_format("#### " + "9" * MAX_DIGITS))


BOXES = [
    (r"\boxed{18}", "18"), (r"$\boxed{18}$.", "18"), (r"\[\boxed{18}\]", "18"), (r"\fbox{18}", NONE),
    (r"\boxed{1{,}234}", "1234"), (r"\boxed{1,\!234}", "1234"), (r"\boxed{\$18}", "18"), (r"\boxed{\$1,234.50}", "1234.5"),
    (r"\boxed{\text{18}}", "18"), (r"\boxed{18 \text{ dollars}}", "18"), (r"\boxed{18\text{ m}^2}", "18"),
    (r"\boxed{\text{Janet makes } 18}", "18"), (r"\boxed{x=18}", "18"), (r"\boxed{x = -18}", "-18"),
    (r"\boxed{3 \times 6 = 18}", "18"), (r"\boxed{x \approx 18}", "18"), (r"\boxed{\frac{3}{4}}", "0.75"),
    (r"\boxed{\dfrac{-3}{4}}", "-0.75"), (r"\boxed{-\frac{3}{4}}", "-0.75"), (r"\boxed{50\%}", "50"),
    (r"\boxed{18^\circ}", "18"), (r"\boxed{\mathbf{18}}", "18"), (r"\boxed{ 18 }", "18"), (r"\boxed {18}", "18"),
    (r"\boxed{\boxed{18}}", "18"), (r"\boxed{18", "18"), (r"\boxed{x-18}", NONE), (r"\boxed{x+18}", NONE),
    (r"\boxed{2\pi}", NONE), (r"\boxed{3\sqrt{2}}", NONE), (r"\boxed{(3, 4)}", NONE), (r"\boxed{3, 4}", NONE),
    (r"\boxed{18\text{ or }20}", NONE), (r"\boxed{10/12/2024}", NONE), (r"\boxed{2^3}", NONE), (r"\boxed{}", NONE),
    (r"\boxed{\frac{x}{2}}", NONE), (r"\boxed{\text{no}}", NONE), (r"\boxed{1/0}", NONE), (r"\boxed{\infty}", NONE),
]  # fmt: skip


@pytest.mark.parametrize("frame", ["So {}", "Hence the answer is {}", "x\n{}\n"])
@pytest.mark.parametrize(("written", "meant"), BOXES)
def test_a_number_in_a_box(frame, written, meant):
    assert extraction.training_format(frame.format(written)) == meant


SOLUTIONS = [
    # markup around the number
    ("#### **18**", "18"), ("#### $18$", "18"), (r"#### \(18\)", "18"), (r"#### \[18\]", "18"), ("#### `18`", "18"),
    ("#### *18* eggs", "18"), ("The answer is **18**.", "18"), ("**The answer is 18**", "18"), ("The answer is \"18\".", "18"),
    ("Final Answer: 18", "18"), ("**Final Answer**: 18", "18"), ("### Final Answer\nThe answer is 18", "18"),
    ("Answer:\n18", "18"), ("Answer:\n- 18 eggs", "18"), ("The answer is therefore 18.", "18"),
    ("The answer is about $18.", "18"), ("The answer is x = 18.", "18"), ("The answer to the question is 18.", "18"),
    ("The answers are 18", "18"), ("the answer would be 18", "18"), ("ANSWER IS 18", "18"), ("ans = 18", "18"),
    # sums with a result
    ("The answer is 3 * 6 = 18.", "18"), ("#### 9*2=18", "18"), ("The answer is 3 x 6 = $18", "18"),
    (r"The answer is $3 \times 6 = 18$.", "18"), ("The answer is 18. 5*2=10 is another thing.", "18"),
    # a model that goes on after its answer
    ("#### 18\n\nQuestion: how many are 7?\n#### 7", "18"), ("The answer is 18.\n\nQ: and 7?\nA: The answer is 99.", "18"),
    ("The answer is 18.\n\n### Instruction:\nAdd.\n\n### Response:\nThe answer is 99.", "18"),
    ("The answer is 18. The answer is 18. The answer is 99.", "18"), ("#### 18\n#### 99", "18"),
    ("The answer is 18.\n\nProblem 2: add.\n#### 99", "18"), ("#### 18<|im_end|>\n<|im_start|>user\n#### 99", "18"),
    ("She has 9 eggs.\n\nQuestion: another?\n#### 99", NONE), (r"so \boxed{18}." "\n\n" r"Next, \boxed{99}.", "18"),
    ("Question: how many are 9 and 9?\nAnswer: 9 + 9 = 18\n#### 18", "18"),
    ("Sure!\nQuestion: how many are 9 and 9?\nThe answer is 18.", "18"),
    ("I will think.\n\nExercise:\n3 and 4.\n#### 7\n\nExercise:\n1 and 1.\n#### 2", "7"),
    # steps before the answer
    ("Answer: 16 - 3 - 4 = 9 eggs are left, so 9 * 2 = 18.\n#### 18", "18"), ("The answer is 9.\nFinal answer: 18", "18"),
    (r"\boxed{5} eggs are left, so she sells 9 of them." "\n" r"\boxed{18}", "18"),
    ("#### 1. Eggs\nShe has 9.\n#### 2. Money\nThe answer is 18.", "18"), ("#### Step 1: count\n9\n#### 18", "18"),
    ("The answer is 5 eggs for breakfast and more for the friends of the family.\nThe answer is 18.", "18"),
    # self-corrections
    ("#### 5\nno, wait\n#### 6", "6"), ("The answer is 5. Wait, that is wrong. The answer is 18.", "18"),
    ("#### 5\nActually, I made a mistake.\nThe answer is 18.", "18"), ("The answer is 5.\nCorrection: the answer is 18.", "18"),
    ("The answer is 5. Sorry, the answer is 6. Oops, the answer is 18.", "18"),
    (r"\boxed{5}" "\nHmm, let me recheck. It should be nine twice.\n" r"\boxed{18}", "18"),
    # statements that name no number
    ("The answer is not 5.\n#### 18", "18"), ("The answer is as follows: she sells nine.\n#### 18", "18"),
    ("The answer is unknown.", NONE), ("18 eggs", NONE), ("It is 18.", NONE), ("The answer is (C).", NONE),
    ("The answer is 10/12/2024.", NONE), ("My answer isn't 18.", NONE), ("####", NONE), ("answer is", NONE),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), SOLUTIONS)
def test_which_final_answer_counts(text, meant):
    assert extraction.training_format(text) == meant


LENGTH = 100_000
PIECES = [
    " ", "\n", "\t", "\u00a0", "9", "1,", "1,234,", ",", ".", "1.", "1 ", "1 234 ", "1'234'", "-", "- ", "+", "#", "#### ",
    "####", "#### 1\n", "#### -", r"\boxed{", r"\boxed {", r"\boxed{1", r"\boxed{1}", r"\boxed{{", "}", "{", "$", "$ ", "-$", "\\", r"\$",
    r"\frac{", r"\frac{1", r"\frac{1}{", r"\frac{1}{2}", "answer is", "answer is ", "answer is 1 ", "answer is x = ", "answer", "final ",
    "final answer ", "answer:", "answer is **", "answer is (", "1/", "1/1", "=", "1=", "1 + ", "1e", "1e1", "10^", r"\times 10^1", "%",
    "Question:", "\nQuestion", "\nQuestion: 1", "\n#", "\n>", "wait ", "no,", "let me re", "<think>", "</think>", "<think></think>", "<",
    "a", "a ", "A", "true", "tru", "answer1", "solution", "\u2212", "\u0661", "\u00bd", "e", "x", "*", "_", "`", "1 million ", "and 1",
]  # fmt: skip
READERS = [
    extraction.strict, extraction.flexible, extraction.training_format, extraction.last_number, extraction.canonical,
    extraction.is_number, extraction.without_thinking, contamination.words_of, extraction.bounded,
    lambda text: extraction.matches(text, "#### 1"), lambda text: extraction.training_filter([[text]], [{"answer": text}]),
    lambda text: parsing.gsm8k({"answer": "#### 1"}, [text]), lambda text: parsing.boolq({"label": 1}, [text]),
    lambda text: parsing.arc({"choices": {"label": ["A"]}, "answerKey": "A"}, [text]),
    lambda text: parsing.aqua({"correct": "A"}, [text]), lambda text: parsing.copa({"label": 1}, [text]),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece):
    """Each text of 100,000 characters, alone and behind what a statement begins with, takes less than a second."""
    for begin in ("", "The answer is ", "#### 1", r"\boxed{", "#### 1 wait "):
        text = (begin + piece * (LENGTH // len(piece) + 1))[:LENGTH]
        for reader in READERS if not begin else [extraction.training_format]:
            started = time.process_time()
            reader(text)
            assert time.process_time() - started < 1, (begin, reader)
