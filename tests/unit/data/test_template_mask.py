"""Templates and label masks, word for word."""

from dataclasses import replace

import pytest

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.data.template import (
    IMAGE_TAG,
    Encoded,
    Template,
    Turn,
    conversation_pieces,
    document_pieces,
    encode,
    inference_prompt,
)
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from tests.unit.data.corpus_files import make_tokenizer

N = 3
TALK = (
    Turn(role="user", text=f"{IMAGE_TAG}\nWhich colour? "),
    Turn(role="assistant", text=" red"),
    Turn(role="user", text="And the form?"),
    Turn(role="assistant", text="A square."),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _supervised(encoded: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Text of each supervised span, and whether EOS ends it."""
    spans = [encoded.ids[start:end].tolist() for start, end in encoded.spans]
    return [(tokenizer.decode(span), span[-1] == tokenizer.eos_id) for span in spans]


def test_chat_supervises_answers_and_their_eos(tokenizer: Tokenizer) -> None:
    encoded = encode(conversation_pieces(TALK, template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    # The whole prompt, tokenized between special tokens in one go.
    before = tokenizer.encode(f"{SYSTEM_PROMPT}\n\nUser: ")
    first = tokenizer.encode("\nWhich colour?\n\nAssistant: red")
    second = tokenizer.encode("User: And the form?\n\nAssistant: A square.")
    bos, eos, image = tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id
    assert encoded.ids.tolist() == [bos, *before, *[image] * N, *first, eos, *second, eos]
    assert encoded.images == 1
    assert _supervised(encoded, tokenizer) == [(" red", True), (" A square.", True)]


def test_own_system_turn_replaces_the_usual_one(tokenizer: Tokenizer) -> None:
    pieces = conversation_pieces([Turn(role="system", text="Be brief."), *TALK[2:]], template="deepseek")
    text = tokenizer.decode(encode(pieces, tokenizer=tokenizer, image_tokens=N).ids.tolist())
    assert text == "Be brief.\n\nUser: And the form?\n\nAssistant: A square."
    pieces = conversation_pieces(TALK[2:], template="deepseek", system="")
    assert tokenizer.decode(encode(pieces, tokenizer=tokenizer, image_tokens=N).ids.tolist()).startswith("User: And")


def test_documents_supervise_text_and_eos_but_no_image(tokenizer: Tokenizer) -> None:
    pieces = document_pieces(f"{IMAGE_TAG}A red square.", template="plain", tagged=True)
    encoded = encode(pieces, tokenizer=tokenizer, image_tokens=N)
    assert encoded.ids.tolist() == [0, 3, 3, 3, *tokenizer.encode("A red square."), 1]
    assert encoded.spans == ((4, len(encoded.ids)),)


def test_template_none_adds_nothing(tokenizer: Tokenizer) -> None:
    text = "A red square."
    pieces = document_pieces(text, template="none", tagged=False)
    assert encode(pieces, tokenizer=tokenizer, image_tokens=N).ids.tolist() == tokenizer.encode(text)
    joined = encode(conversation_pieces(TALK[2:], template="none"), tokenizer=tokenizer, image_tokens=N)
    assert joined.ids.tolist() == tokenizer.encode("And the form?A square.")


def test_tag_in_an_untagged_document_is_text(tokenizer: Tokenizer) -> None:
    pieces = document_pieces(f"see {IMAGE_TAG}", template="plain", tagged=False)
    encoded = encode(pieces, tokenizer=tokenizer, image_tokens=N)
    assert tokenizer.image_id not in encoded.ids and encoded.images == 0


def test_inference_prompt_begins_the_training_text(tokenizer: Tokenizer) -> None:
    prompt = encode(inference_prompt(TALK[:3]), tokenizer=tokenizer, image_tokens=N)
    whole = encode(conversation_pieces(TALK, template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert whole.spans[-1][0] == len(prompt.ids)
    assert prompt.spans == ()


@pytest.mark.parametrize("turns", [(), TALK[:3], TALK[1:], TALK[:1] * 2])
def test_turns_that_do_not_alternate_are_refused(turns: tuple[Turn, ...]) -> None:
    with pytest.raises(DataError, match="turn"):
        conversation_pieces(turns, template="deepseek")


def test_an_empty_answer_is_not_supervised(tokenizer: Tokenizer) -> None:
    """The released text of an empty message is its role alone: no space, no EOS."""
    turns = (*TALK[:1], Turn(role="assistant", text=" "), *TALK[2:])
    encoded = encode(conversation_pieces(turns, template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    text = tokenizer.decode(encoded.ids.tolist())
    assert text.endswith("\n\nAssistant:User: And the form?\n\nAssistant: A square.")
    assert _supervised(encoded, tokenizer) == [(" A square.", True)]
    assert encoded.ids.tolist().count(tokenizer.eos_id) == 1


def test_an_answer_that_is_not_learned_keeps_its_tokens(tokenizer: Tokenizer) -> None:
    turns = (*TALK[:1], replace(TALK[1], learned=False), *TALK[2:])
    encoded = encode(conversation_pieces(turns, template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    whole = encode(conversation_pieces(TALK, template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    assert encoded.ids.tolist() == whole.ids.tolist()
    assert _supervised(encoded, tokenizer) == [(" A square.", True)]


@pytest.mark.parametrize("template", ["deepseek", "plain"])
def test_only_the_numbered_tags_are_images(tokenizer: Tokenizer, template: Template) -> None:
    text = f"Not {IMAGE_TAG}, this: {IMAGE_TAG} and {IMAGE_TAG}"
    turns = [Turn(role="user", text=text, tags=(1,)), Turn(role="assistant", text=IMAGE_TAG, tags=())]
    pieces = conversation_pieces(turns, template=template)
    assert [piece.kind for piece in pieces].count("image") == 1
    texts = "".join("@" if piece.kind == "image" else piece.text for piece in pieces)
    assert f"Not {IMAGE_TAG}, this: @ and {IMAGE_TAG}" in texts and texts.endswith(IMAGE_TAG)
    assert encode(pieces, tokenizer=tokenizer, image_tokens=N).ids.tolist().count(tokenizer.image_id) == N


def test_a_tag_is_an_image_only_in_turns(tokenizer: Tokenizer) -> None:
    turn = Turn(role="system", text=f"As in {IMAGE_TAG}.")
    own = encode(conversation_pieces([turn, *TALK[2:]], template="deepseek"), tokenizer=tokenizer, image_tokens=N)
    assert own.images == 1 and own.ids.tolist().count(tokenizer.image_id) == N
    given = conversation_pieces(TALK[2:], template="deepseek", system=turn.text)
    assert encode(given, tokenizer=tokenizer, image_tokens=N).images == 0


@pytest.mark.parametrize("template", ["deepseek", "plain", "none"])
def test_a_tag_in_an_untagged_turn_is_text(template: Template, tokenizer: Tokenizer) -> None:
    turns = [
        Turn(role="user", text=f"What is {IMAGE_TAG}?", tags=()),
        Turn(role="assistant", text=f"{IMAGE_TAG} is <image>.", tags=()),
        Turn(role="user", text=f"{IMAGE_TAG}And this?"),
        Turn(role="assistant", text="Red."),
    ]
    encoded = encode(conversation_pieces(turns, template=template), tokenizer=tokenizer, image_tokens=N)
    assert encoded.images == 1 and encoded.ids.tolist().count(tokenizer.image_id) == N
    text = tokenizer.decode(encoded.ids.tolist())
    assert f"What is {IMAGE_TAG}?" in text and f"{IMAGE_TAG} is <image>." in text
