"""`megavl serve` on two ranks gives what one gives, and none outlives another."""

from __future__ import annotations

import signal
from pathlib import Path

import openai
import pytest

from launch.bench.engines.random_models import write_tokenizer
from tests.tiny_run import PATIENCE_S
from tests.unit.generate import models
from tests.unit.serve.servers import data_url, question, serving

PRESET = "tiny-hybrid"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    tokenizer = write_tokenizer(root / "tokenizer")
    return models.write_folder(PRESET, root / "tiny", tokenizer=tokenizer, fmt="native", seed=models.TALKATIVE[PRESET])


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_picture(tmp_path_factory.mktemp("pictures") / "a.png", seed=1)


def asked(client: openai.OpenAI, picture: Path) -> tuple[str, list[float], list[float]]:
    """An answer with an image, its log-probabilities, and those of a prompt."""
    messages = question("which colour?", data_url(picture))
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, logprobs=True).choices[0]
    scored = client.completions.create(model="tiny", prompt="red or blue", echo=True, logprobs=1, max_tokens=1)
    values = scored.choices[0].logprobs.token_logprobs[1:]
    return chat.message.content, [one.logprob for one in chat.logprobs.content], values


def test_ranks_answer_like_one_process(folder, picture, tmp_path):
    """Once with the head on rank 0, and once on the other rank; then one end in peace and one by a lost rank."""
    with serving(folder) as alone:
        text, values, scores = asked(alone.client, picture)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:-100])
    with serving(folder, "--tensor", "2", ranks=2) as running:
        with pytest.raises(openai.BadRequestError, match="truncated"):
            asked(running.client, broken)
        found = asked(running.client, picture)
        assert found == (text, pytest.approx(values, abs=1e-4), pytest.approx(scores, abs=1e-4))
        assert running.end(signal.SIGTERM) == [0, 0]
    with serving(folder, "--pipeline", "2", ranks=2) as running:
        found = asked(running.client, picture)
        assert found == (text, pytest.approx(values, abs=1e-4), pytest.approx(scores, abs=1e-4))
        (follower,) = running.followers
        follower.kill()
        assert running.process.wait(PATIENCE_S) == 7 and "lost a peer" in running.errors.read_text()
