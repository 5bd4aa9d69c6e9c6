"""Each parser reads at least twenty answers in the words that models use."""

from __future__ import annotations

import pytest

from megavl.evaluate.benchmarks.cmmmu import CHOOSE, FILL, JUDGE
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import letter_of, lettered
from megavl.evaluate.benchmarks.mm_vet import grade_of
from megavl.evaluate.benchmarks.table import BENCHMARKS

ANIMALS = lettered(["a dog", "a cat", "a hot dog", "none of them"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        (" B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("(b) a cat", "B"),
        ("A is the correct answer", "A"),
        ("The answer is (A) a dog", "A"),
        ("C) a hot dog", "C"),
        ("B - a cat", "B"),
        ("C.", "C"),
        ("**D**", "D"),
        ("B. a cat", "B"),
        ("(B) a cat", "B"),
        ("B: because it purrs.", "B"),
        ("Answer: B", "B"),
        ("The answer is C.", "C"),
        ("The correct option is (D).", "D"),
        ("The correct answer is **B**, since the animal has whiskers.", "B"),
        ("I would choose option A because of the tail.", "A"),
        ("答案是B。", "B"),
        ("选C", "C"),
        ("\\boxed{D}", "D"),
        ("a cat", "B"),
        ("It is a cat.", "B"),
        ("The picture shows a hot dog.", "C"),
        ("A dog", "A"),
        ("None of them", "D"),
        ("First I thought of A, but the answer is B.", "B"),
        ("The animal here must be B", "B"),
        ("A", "A"),  # full width
        ("B\n\nExplanation: A is wrong.", "B"),
        ("A or B", None),
        ("Both A and B", None),
        ("The answer is A or B.", None),
        ("A. a dog\nB. a cat\nC. a hot dog\nD. none of them", None),
        ("a dog and a cat", None),
        ("A photo of an animal", None),
        ("I cannot tell.", None),
        ("E", None),
        ("", None),
        ("Sorry, I can't help with that.", None),
        ("ABCD", None),
        ("The answer is b.", "B"),
        ("answer: c) a hot dog", "C"),
        ("option d", "D"),
        ("b) because it purrs", "B"),
        ("c. It is hot", "C"),
        ("b.c. is an era", None),
        ("**Answer:** B", "B"),
        ("故选：B", "B"),
        ("答案：A", "A"),
        ("A选项", "A"),
        ("The answer is: **C. a hot dog**", "C"),
        ("The answer is (B) and not (C).", "B"),
    ],
)
def test_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert letter_of(answer, ANIMALS) == letter


SOLUTIONS = lettered(["neither", "Solution A", "Solution B"])
NUMBERS = lettered(["3", "13", "30", "-3", "0.3"])
NUTRIENTS = lettered(["Vitamin C", "5 A", "Hepatitis B", "Plan D is better than plan C"])


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (SOLUTIONS, "B. Solution A", "B"),
        (SOLUTIONS, "(C) Solution B", "C"),
        (SOLUTIONS, "**C.** Solution B", "C"),
        (SOLUTIONS, "B\n\nSolution A", "B"),
        (SOLUTIONS, "B. Solution A, because solution B is weaker.", "B"),
        (SOLUTIONS, "B. The stronger one is Solution A", "B"),
        (SOLUTIONS, "B - Solution A", "B"),
        (SOLUTIONS, "A. neither", "A"),
        (SOLUTIONS, "Solution B has a higher concentration.", "C"),
        (SOLUTIONS, "The stronger one is Solution A.", "B"),
        (SOLUTIONS, "The answer is Solution B.", "C"),
        (SOLUTIONS, "The answer is B. Solution A", "B"),
        (SOLUTIONS, "Solution A and Solution B", None),
        (SOLUTIONS, "A. neither\nB. Solution A\nC. Solution B", None),
        (SOLUTIONS, "B. Solution A C. Solution B", None),
        (NUTRIENTS, "A. Vitamin C", "A"),
        (NUTRIENTS, "B. 5 A", "B"),
        (NUTRIENTS, "B. 5 A flows through it.", "B"),
        (NUTRIENTS, "C: Hepatitis B", "C"),
        (NUTRIENTS, "It is caused by hepatitis B", "C"),
        (NUTRIENTS, "It lacks vitamin C", "A"),
        (NUTRIENTS, "Plan D is better than plan C", "D"),
        (NUTRIENTS, "It must be D", "D"),
        (ANIMALS, "B, because it does not look like a dog", "B"),
        (NUMBERS, "It is 30.", "C"),
        (NUMBERS, "30%", "C"),
        (NUMBERS, "0.30", None),
        (NUMBERS, "about 3.5", None),
        (NUMBERS, "13,000", None),
        (NUMBERS, "It is -3 degrees", "D"),
        (NUMBERS, "-13", None),
        (NUMBERS, "0.3 of it", "E"),
        (NUMBERS, "3, not more", "A"),
        (ANIMALS, "A. B.", None),
        (ANIMALS, "(A) or (B)", None),
        (ANIMALS, "A. a dog B. a cat", None),
    ],
)
def test_letters_inside_of_option_texts(options: dict[str, str], answer: str, letter: str | None) -> None:
    assert letter_of(answer, options) == letter


def item_of(answer: str, *, options: tuple[str, ...] = (), **details: str) -> Item:
    lettered_options = lettered(options)
    return Item(
        id="1", location="", prompt="?", answer=answer, answers=(answer,), options=lettered_options, details=details
    )


def verdict(name: str, item: Item, answer: str) -> bool | None:
    """Whether an answer is right; None for a failed parse."""
    prediction = BENCHMARKS[name].parse(item, answer)
    return None if prediction is None else BENCHMARKS[name].is_right(item, prediction)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is (D).", "D"),
        ("The answer is B", "B"),
        ("Answer: C", "C"),
        ("A. 12 cm", "A"),
        ("(A) or (B)", "B"),
        ("First (B), on second thought (A)", "A"),
        ("B because the ratio is larger", "B"),
        ("D!", "D"),
        ("'C'", "C"),
        ("12 cm", "A"),
        ("The length of the side must be 15 cm here", "B"),
        ("I am quite sure it is 18 CM in total", "C"),
        ("Option A is right.", "A"),
        ("Therefore, the correct choice would be D.", "D"),
        ("B\nBecause of symmetry", "B"),
        ("The answer is option C ", "C"),
        ("too short", None),
        ("", None),
        ("I do not know the answer to this question", None),
        ("it is 99 cm", None),
    ],
)
def test_mmmu_finds_the_option(answer: str, letter: str | None) -> None:
    item = item_of("A", options=("12 cm", "15 cm", "18 cm", "21 cm"))
    assert BENCHMARKS["mmmu"].parse(item, answer) == letter


@pytest.mark.parametrize(
    ("right", "answer", "wanted"),
    [
        ("3.14", "3.14", True),
        ("3.14", "The result is 3.141.", True),
        ("3.14", "pi = 3.1", False),
        ("1000", "1,000", True),
        ("1000", "So the total is 1,000 dollars", True),
        ("-5", "x = -5", True),
        ("-5", "x = 5", False),
        ("1500", "It is 1.5e3.", True),
        ("0.5", ".5", True),
        ("24/7", "The answer is 24/7.", True),
        ("Paris", "The capital is Paris.", True),
        ("paris", "PARIS", True),
        ("Paris", "London", False),
        ("Sonata form", "It is written in sonata form", True),
        ("x", "The variable is x", True),
        ("x", "maximum", False),
        ("7", "Thus 3 + 4 = 7", True),
        ("7", "17", False),
        ("2 apples", "We could be 2 apples short", True),
        ("30", "30%", True),
        ("blue", "", None),
        ("nan", "nan", True),
    ],
)
def test_mmmu_open_answers(right: str, answer: str, wanted: bool | None) -> None:
    assert verdict("mmmu", item_of(right), answer) is wanted


@pytest.mark.parametrize(
    ("kind", "right", "answer", "wanted"),
    [
        (CHOOSE, "A", "A", True),
        (CHOOSE, "A", "(A)", True),
        (CHOOSE, "B", "正确答案是B。", True),
        (CHOOSE, "B", "\uff08B\uff09", True),
        (CHOOSE, "C", "选择(C),因为(C)最大,而(A)较小", True),
        (CHOOSE, "AB", "AB", True),
        (CHOOSE, "AB", "(A)和(B)", True),
        (CHOOSE, "AB", "A", False),
        (CHOOSE, "D", "答案为宋代", True),
        (CHOOSE, "D", "唐代", False),
        (CHOOSE, "A", "不知道", None),
        (CHOOSE, "A", "", None),
        (JUDGE, "对", "对", True),
        (JUDGE, "对", "这个说法是正确的。", True),
        (JUDGE, "错", "错误", True),
        (JUDGE, "错", "不正确", True),
        (JUDGE, "错", "题目的陈述不对。", True),
        (JUDGE, "对", "错的", False),
        (JUDGE, "对", "无法判断是否正确", None),
        (JUDGE, "对", "图中有一只猫", None),
        (JUDGE, "对", "", None),
        (FILL, "12", "12", True),
        (FILL, "12", "所以结果是12.00", True),
        (FILL, "12", "x=12", True),
        (FILL, "12", "答案是13", False),
        (FILL, "北京", "首都是北京。", True),
        (FILL, "北京", "上海", False),
        (FILL, "北京", "我认为答案可能在北京或者上海或者广州或者深圳或者天津之中的某一个城市也说不定", False),
        (FILL, "1200", "总数为1\uff0c200", True),
        (FILL, "北京", "", None),
    ],
)
def test_cmmmu_answers(kind: str, right: str, answer: str, wanted: bool | None) -> None:
    options = ("汉代", "唐代", "明代", "宋代") if kind == CHOOSE else ()
    assert verdict("cmmmu", item_of(right, options=options, type=kind), answer) is wanted


@pytest.mark.parametrize(
    ("type_", "places", "right", "answer", "wanted"),
    [
        ("integer", "0", "14", "14", True),
        ("integer", "0", "14", "The number missing in the sequence is 14.", True),
        ("integer", "0", "14", "14.0", True),
        ("integer", "0", "2000", "2,000 people", True),
        ("integer", "0", "14", "between 13 and 15", False),
        ("integer", "0", "14", "fourteen", None),
        ("integer", "0", "14", "The answer is 14 (see figure 2).", True),
        ("integer", "0", "14", "2 and 3 give \\boxed{14}, as in line 5.", True),
        ("integer", "0", "1200", "Answer: 1,200 cm", True),
        ("integer", "0", "-3", "x = -3", True),
        ("integer", "0", "3", "The answer is 3 (three).", True),
        ("float", "1", "0.6", "The fraction is 0.6", True),
        ("float", "2", "0.75", "3/4", True),
        ("float", "2", "0.75", "The answer is \\frac{3}{4}.", True),
        ("float", "2", "0.5", "1/0", None),
        ("float", "1", "1234.5", "It is 1,234.5 km long", True),
        ("integer", "0", "-3", "x = −3", True),
        ("integer", "0", "14", "14% of them", True),
        ("float", "1", "0.6", "0.62", True),
        ("float", "1", "0.6", "60%", False),
        ("float", "2", "1.45", "Luca needs $1.45.", True),
        ("float", "2", "1.45", "1.455 dollars", False),
        ("float", "2", "1.40", "1.4", True),
        ("float", "2", "1.4", "", None),
        ("list", "0", "[2007, 2008]", "[2007, 2008]", True),
        ("list", "0", "[2007, 2008]", "The years are [2007,2008].", True),
        ("list", "0", "[2007, 2008]", "[2008, 2007]", False),
        ("list", "0", "[2007, 2008]", "between 2007 and 2008", None),
        ("list", "0", "[2007, 2008]", "[__import__('os').getcwd()]", None),
        ("text", "0", "Yes", "yes", True),
    ],
)
def test_mathvista_free_answers(type_: str, places: str, right: str, answer: str, wanted: bool | None) -> None:
    assert verdict("mathvista", item_of(right, type=type_, places=places), answer) is wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Yes", "Yes"),
        ("yes.", "Yes"),
        ("No", "No"),
        ("no, there is none", "No"),
        ("Yes, there is a dog in the image.", "Yes"),
        ("No, there is no dog in the image.", "No"),
        ("There is no snowboard.", "No"),
        ("There is not a car.", "No"),
        ("There isn't any.", "No"),
        ("There isn’t any.", "No"),
        ("I cannot see one.", "No"),
        ("**Yes**", "Yes"),
        ("YES!", "Yes"),
        (" Yes\n", "Yes"),
        ("The answer is yes.", "Yes"),
        ("Yeah, on the left.", "Yes"),
        ("Yup", "Yes"),
        ("Yes, and not only one.", "Yes"),
        ("Well. No.", "No"),
        ("Nope.", "No"),
        ("A dog sits on the sofa.", None),
        ("maybe", None),
        ("", None),
        ("Is it a yes or a no", None),
        ("nothing", None),
        ("yesterday", None),
    ],
)
def test_pope_answers(answer: str, wanted: str | None) -> None:
    assert BENCHMARKS["pope"].parse(item_of("Yes"), answer) == wanted


@pytest.mark.parametrize(
    ("right", "data_set", "answer", "wanted"),
    [
        (("CENTRE",), "IIIT5K", "CENTRE", True),
        (("CENTRE",), "IIIT5K", "centre", True),
        (("CENTRE",), "IIIT5K", "The word is Centre.", True),
        (("CENTRE",), "IIIT5K", "CENTER", False),
        (("CENTRE",), "IIIT5K", "CEN TRE", False),
        (("coca cola", "coca-cola"), "ESTVQA", "Coca-Cola", True),
        (("coca cola", "coca-cola"), "ESTVQA", "pepsi", False),
        (("two\nlines",), "textVQA", "two lines", True),
        (("two lines",), "textVQA", "TWO\nLINES", True),
        (("12.50",), "SROIE", "Total: 12.50 EUR", True),
        (("12.50",), "SROIE", "12.5", False),
        ((r"\frac { 1 } { 2 }",), "HME100k", r"\frac{1}{2}", True),
        ((r"\frac { 1 } { 2 }",), "HME100k", r"\frac { 1 }{ 2 }", True),
        ((r"x _ { 1 }",), "HME100k", r"$x_{1}$", True),
        ((r"X",), "HME100k", "x", False),
        ((r"a + b",), "HME100k", "b + a", False),
        (("2019",), "docVQA", "It was in 2019", True),
        (("yes",), "docVQA", "Yes", True),
        (("é",), "docVQA", "É", True),
        (("a",), "docVQA", "", None),
        (("a",), "docVQA", "   ", None),
    ],
)
def test_ocrbench_answers(right: tuple[str, ...], data_set: str, answer: str, wanted: bool | None) -> None:
    item = Item(
        id="1", location="", prompt="?", answer=right[0], answers=right, details={"data set": data_set}, kind="VQA"
    )
    assert verdict("ocrbench", item, answer) is wanted


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1", 1.0),
        ("0", 0.0),
        ("0.0", 0.0),
        (" 0.7\n", 0.7),
        ("Grade: 0.3", 0.3),
        ("Correctness: 0.9", 0.9),
        ("**0.4**", 0.4),
        ("score 0.2", 0.2),
        ("0.8 (the prediction names one element)", 0.8),
        ("0.6.", 0.6),
        ("2", None),
        ("10", None),
        ("0.5.5", None),
        ("-0.5", None),
        ("half", None),
        ("", None),
        ("I would say 0.5", None),
        ("nan", None),
        ("1e9", None),
    ],
)
def test_mm_vet_grades(reply: str, grade: float | None) -> None:
    assert grade_of(reply) == grade
