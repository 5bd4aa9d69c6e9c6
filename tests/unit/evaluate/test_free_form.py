"""Free-form answers against one question at a time, and how they are compared."""

from __future__ import annotations

import pytest

from megavl.config.errors import DataError
from megavl.evaluate.free_form import FreeFormAnswer, encode_open_questions, plain
from megavl.evaluate.run_tasks import evaluate
from megavl.evaluate.task import OpenQuestion
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import answer_text, read_canvases
from tests.unit.generate import models

PRESET = "tiny-hybrid"
CONFIG = models.config_of(PRESET)


def question(prompt="which colour is it?", images=(), answers=("red",), number=0):
    return OpenQuestion(
        id=f"o{number}", location=f"t:{number}", images=images, kind="k", prompt=prompt, answers=answers
    )


@pytest.mark.parametrize(
    ("answers", "text", "exact", "contains"),
    [
        (["red"], " Red.", True, True),
        (["red"], "It is red, I think", False, True),
        (["red"], "It is dark-red", False, True),
        (["red"], "credible", False, False),
        (["5"], "15", False, False),
        (["5"], "3.5", False, False),
        (["5"], "the answer is 5.", False, True),
        (["5"], "-5", False, True),
        (["50%"], "50%", True, True),
        (["-5"], "5", False, False),
        (["blue", "sky  blue"], "Sky Blue!", True, True),
        (["红色"], "这是红色的。", False, True),
        (["红色"], "红色。", True, True),
        (["A"], "(A)", True, True),
        (["A"], "Ａ", True, True),
        (["+"], "+", True, True),
        (["!"], "!", True, True),
        (["red"], "", False, False),
    ],
)
def test_answers_are_compared_as_plain_text(answers, text, exact, contains):
    answer = FreeFormAnswer(entry=question(answers=tuple(answers)), text=text)
    assert (answer.exact, answer.contains) == (exact, contains), (plain(text), [plain(one) for one in answers])


def test_batched_answers_equal_single_ones(tokenizer, tmp_path):
    pictures = tuple(models.write_picture(tmp_path / f"{number}.png", seed=number) for number in range(3))
    shown = [(), pictures[:1], pictures[1:], (), pictures[:1]]
    asked = [question(f"colour {number}?", images=images, number=number) for number, images in enumerate(shown)]
    processor = Processor(CONFIG, tokenizer)
    with models.built(PRESET, seed=models.TALKATIVE[PRESET]) as model:
        report = evaluate(Model(model, processor), asked, max_new_tokens=12, batch_size=2)
        alone = []
        for one, ids in zip(asked, encode_open_questions(asked, processor=processor, max_new_tokens=12)):
            canvases = read_canvases(one.images, geometry=CONFIG.image_geometry)
            tokens = models.greedy_tokens(model, ids, images=canvases, eos_id=tokenizer.eos_id, count=12)
            alone.append(answer_text(tokens, tokenizer=tokenizer))
        right = [
            question(f"colour {n}?", images=i, answers=(t,), number=n) for n, (i, t) in enumerate(zip(shown, alone))
        ]
        found = evaluate(Model(model, processor), right, max_new_tokens=12).to_dict()
    assert [answer.text for answer in report.free_form] == alone and len(set(alone)) > 1
    assert list(found) == ["written"]
    assert found["written"]["exact"] == found["written"]["contains"] == 1 and found["written"]["n"] == 5
    assert found["written"]["questions"][2] == {
        "id": "o2",
        "kind": "k",
        "answers": [alone[2]],
        "text": alone[2],
        "exact": True,
        "contains": True,
    }
    assert report.table().splitlines()[0].split() == ["kind", "n", "exact", "contains"]


def test_prompt_without_room_names_its_line(tokenizer):
    ids = encode_open_questions([question()], processor=Processor(CONFIG, tokenizer), max_new_tokens=1)[0]
    short = models.load_model_config(PRESET, llm={"max_position_embeddings": len(ids) + 5})
    encode_open_questions([question()], processor=Processor(short, tokenizer), max_new_tokens=5)
    with pytest.raises(DataError, match=r"t:0: .* 6 after them exceed"):
        encode_open_questions([question()], processor=Processor(short, tokenizer), max_new_tokens=6)


def test_a_damaged_image_names_its_line(tokenizer, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with models.built(PRESET) as model, pytest.raises(DataError, match=r"t:0: .*bad\.png"):
        evaluate(Model(model, Processor(CONFIG, tokenizer)), [question(images=(bad,))], max_new_tokens=2)
