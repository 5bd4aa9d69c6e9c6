"""A conversation answers as recomputation from its first token would, and reads only what is new."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.errors import DataError
from megavl.generate.conversation import Conversation
from megavl.generate.pretrained import Model, Processor
from megavl.generate.sampling import Sampling
from tests.unit.generate import models


@pytest.fixture(scope="module", params=models.PRESETS)
def model(request: pytest.FixtureRequest, tokenizer) -> Iterator[Model]:
    with models.built(request.param, seed=models.TALKATIVE[request.param]) as stage:
        yield Model(stage, Processor(models.config_of(request.param), tokenizer))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [models.write_picture(folder / f"{i}.png", seed=60 + i) for i in range(3)]


def ask(conversation: Conversation, text: str, images: list[Path] | None = None) -> str:
    return "".join(conversation.ask(text, images or []))


def from_scratch(model: Model, messages: list[dict[str, object]], **how: Sampling) -> str:
    return model.generate(model.processor(messages), max_new_tokens=12, **how).text.strip()


def test_every_turn_is_what_the_whole_conversation_gives(model, pictures):
    conversation, messages, reused = Conversation(model, max_new_tokens=12), [], []
    turns = [("which colour?", []), ("and this <image_placeholder>, or <image_placeholder>?", pictures[:2])]
    for text, images in [*turns, ("why?", []), ("look", pictures[2:])]:
        answer = ask(conversation, text, images)
        messages.append({"role": "User", "content": text, "images": images})
        expected = from_scratch(model, messages)
        assert answer == expected
        reused.append(conversation.reused)
        messages.append({"role": "Assistant", "content": answer})
    assert reused[0] == 0 and reused == sorted(set(reused))
    # At the last turn both images of the second one are in the cache.
    assert reused[3] > 2 * model.processor.config.image_tokens


def test_reset_keeps_the_common_prompt_in_the_cache(model, pictures):
    conversation = Conversation(model, max_new_tokens=12)
    first = ask(conversation, "which colour?", pictures[:1])
    ask(conversation, "why?")
    conversation.reset()
    assert conversation.turns == []
    assert ask(conversation, "which colour?", pictures[:1]) == first
    assert conversation.reused > 0


def test_other_pictures_are_not_taken_from_the_cache(model, pictures):
    """The ids of both prompts are equal."""
    conversation = Conversation(model, max_new_tokens=12)
    ask(conversation, "which colour?", pictures[:1])
    conversation.reset()
    answer = ask(conversation, "which colour?", pictures[1:2])
    expected = from_scratch(model, [{"role": "user", "content": "which colour?", "images": pictures[1:2]}])
    assert answer == expected
    before = model.processor([{"role": "user", "content": "x", "images": pictures[1:2]}]).ids.index(3)
    assert 0 < conversation.reused <= before


def test_interrupted_answer_keeps_its_shown_text(model):
    conversation = Conversation(model, max_new_tokens=12)
    pieces = conversation.ask("which colour?")
    said = ""
    while not said:
        said += next(pieces)
    pieces.close()
    assert [turn.text for turn in conversation.turns] == ["which colour?", said]
    messages = [{"role": "user", "content": "which colour?"}, {"role": "assistant", "content": said}]
    assert ask(conversation, "go on") == from_scratch(model, [*messages, {"role": "user", "content": "go on"}])


def test_what_cannot_be_asked_changes_nothing(model, pictures, tmp_path):
    conversation = Conversation(model, max_new_tokens=12)
    ask(conversation, "which colour?", pictures[:1])
    turns = list(conversation.turns)
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:100])
    for text, images, message in [
        ("look", [broken], "broken.png"),
        ("<image_placeholder> <image_placeholder>", pictures[:1], "has 2 <image_placeholder>, but 1 images"),
        ("red " * 5000, [], "exceed the model's 4096 positions"),
    ]:
        with pytest.raises(DataError, match=message):
            ask(conversation, text, images)
        assert conversation.turns == turns
    assert ask(conversation, "why?")


def test_draws_follow_the_seed(model):
    def talk(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.5, seed=seed)
        conversation = Conversation(model, max_new_tokens=8, sampling=sampling)
        return [ask(conversation, "which colour?"), ask(conversation, "which colour?")]

    assert talk(1) == talk(1) != talk(2)
