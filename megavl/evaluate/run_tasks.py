"""All entries of tasks and all benchmarks, in one report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from megavl.config.errors import DataError, one_line
from megavl.config.evaluation import Normalization
from megavl.data.image import ImageError
from megavl.data.template import Template
from megavl.evaluate.benchmarks.ask import BenchmarkTask, EncodedBenchmark, ask_benchmark, encode_benchmark
from megavl.evaluate.benchmarks.report import Mode
from megavl.evaluate.bits_per_byte import encode_passages, score_passages
from megavl.evaluate.free_form import answer_questions, encode_open_questions
from megavl.evaluate.ledger import Ledger
from megavl.evaluate.multiple_choice import encode_questions, evaluate_choices
from megavl.evaluate.report import Report
from megavl.evaluate.task import Entry, OpenQuestion, Passage, Question, Task
from megavl.files.hashing import file_sha256
from megavl.generate.pretrained import Model
from megavl.generate.prompt import ImageSource
from megavl.generate.score_rows import ScoreRequest


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    *,
    benchmarks: Sequence[BenchmarkTask] = (),
    template: Template = "deepseek",
    system: str | None = None,
    blind: bool = False,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    normalize: Normalization = "token",
    mode: Mode = "generate",
    open_ledger: Callable[[Callable[[], str]], Ledger] = lambda fingerprint: Ledger(),
) -> Report:
    """Score every entry. Entries that do not fit the model are found before the model runs.

    Args:
        model: who answers, on one process or on all ranks.
        template: format of prompts, see `prompt_pieces`; texts follow BOS, as documents are trained.
        system: system text of the chat format; empty for none, None for the model's.
        blind: ask the choices of task files again with shuffled images.
        batch_size: most free-form answers in progress at a time.
        normalize: by what options are compared.
        mode: how benchmarks are asked.
        open_ledger: given what computes a fingerprint of all questions and images, returns the answers to go on from.

    Raises:
        DataError: an entry does not fit the model, an image cannot be read, or images cannot be shuffled.
        NumericsError: a perplexity or logits are not finite.
        StorageError: an answer cannot be written.
    """
    processor = model.processor
    choices = [entry for entry in tasks if isinstance(entry, Question)]
    questions = [entry for entry in tasks if isinstance(entry, OpenQuestion)]
    passages = [entry for entry in tasks if isinstance(entry, Passage)]
    ids = encode_open_questions(
        questions, processor=processor, max_new_tokens=max_new_tokens, template=template, system=system
    )
    windows = encode_passages(passages, processor=processor)
    encoded = [
        encode_benchmark(
            task, processor=processor, mode=mode, max_new_tokens=max_new_tokens, template=template, system=system
        )
        for task in benchmarks
    ]
    requests = encode_questions(choices, processor=processor, template=template, system=system)
    requests += [one for windows_of_text in windows for one in windows_of_text]
    ledger = open_ledger(lambda: fingerprint([*questions, *choices, *passages], requests, ids, encoded))
    report = Report()
    if choices or blind:
        report = evaluate_choices(
            model,
            choices,
            template=template,
            system=system,
            blind=blind,
            seed=seed,
            normalize=normalize,
            ledger=ledger,
        )
    answers = answer_questions(
        model, questions, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, ledger=ledger
    )
    found = [
        ask_benchmark(
            model, one, max_new_tokens=max_new_tokens, batch_size=batch_size, normalize=normalize, ledger=ledger
        )
        for one in encoded
    ]
    return replace(
        report,
        free_form=tuple(answers),
        passages=tuple(score_passages(model, passages, windows, ledger=ledger)),
        benchmarks=tuple(found),
    )


def fingerprint(
    entries: Sequence[Entry],
    requests: Sequence[ScoreRequest],
    ids: Sequence[Sequence[int]],
    benchmarks: Sequence[EncodedBenchmark],
) -> str:
    """Digest of all prompts and options as token ids, and of the names and contents of the images.

    Raises:
        DataError: an image cannot be read any more.
    """
    digest = hashlib.sha256()
    for request in [*requests, *(one for benchmark in benchmarks for one in benchmark.requests)]:
        digest.update(repr([(option.ids, option.start) for option in request.options]).encode())
    for prompt in [*ids, *(one for benchmark in benchmarks for one in benchmark.ids)]:
        digest.update(repr(list(prompt)).encode())
    images: list[ImageSource] = [image for entry in entries for image in entry.images]
    images += [image for one in benchmarks for item in one.task.items for image in item.images]
    # Questions share images, and each is read once.
    for image in dict.fromkeys(images):
        digest.update(f"{image}\0{_image_sha256(image)}\0".encode())
    return digest.hexdigest()


def _image_sha256(image: ImageSource) -> str:
    try:
        if isinstance(image, (str, Path)):
            return file_sha256(image)
        data = image.tobytes() if isinstance(image, Image.Image) else image.read()
    except (OSError, ImageError) as error:
        raise DataError(f"{image}: the image cannot be read any more ({one_line(error)}); put it back") from error
    return hashlib.sha256(data).hexdigest()
