"""A MegaVL model as lm-evaluation-harness calls one. The only module that subclasses the harness.

Text is tokenized as documents are trained: BOS, then the text, in which nothing yields a special token. Every rank
makes the same calls, so the harness sees one process.

Source: lm-evaluation-harness 0.4.13, `lm_eval/api/model.py` and `lm_eval/models/huggingface.py` (what its own client
truncates, and where).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megavl.config.errors import DataError
from megavl.evaluate.ledger import Ledger
from megavl.generate.decode import Request
from megavl.generate.pretrained import Inputs, Model
from megavl.generate.sampling import Sampling
from megavl.generate.score import Score
from megavl.generate.score_rows import EncodedOption, ScoreRequest
from megavl.parallel.groups import rank_from_env

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A text and its continuation, and the ids of both."""
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


class HarnessModel(TemplateLM):
    """Scores and answers for the harness. The weights are read at its first request, after all tasks were read."""

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        ledger: Ledger | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        """Keep how to load the model.

        Args:
            ledger: scores and answers that are there already; new ones are added.
            batch_size: most answers in progress at a time; options are packed into rows whatever their number.
            seed: of the draws of sampled answers.
        """
        super().__init__()
        self._load, self._ledger, self._batch_size, self._seed = load, ledger or Ledger(), batch_size, seed
        self._loaded: Model | None = None
        self.running = False
        """Whether an error is one of the model, not of a task."""

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self._model.processor.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text: BOS, or EOS in a tokenizer without one."""
        tokenizer = self._model.processor.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._model.processor.config.llm.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with BOS in front unless `add_special_tokens` is false or the tokenizer has none."""
        tokenizer = self._model.processor.tokenizer
        start = [] if add_special_tokens is False or tokenizer.bos_id is None else [tokenizer.bos_id]
        return [*start, *tokenizer.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would say it."""
        with self._run():
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text after BOS, once, in windows where it is longer than the model's positions."""
        with self._run():
            windows: list[tuple[int, Pair]] = []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                # The harness's own windows: the last one has as much context as fits.
                found = get_rolling_token_windows(
                    token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
                windows += [(number, (None, *make_disjoint_window(pair))) for pair in found]
            totals = [0.0] * len(requests)
            for (number, _), (log_prob, _) in zip(windows, self._loglikelihood_tokens([pair for _, pair in windows])):
                totals[number] += log_prob
            return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each text, up to the first of its stop texts; greedy unless a task samples."""
        with self._run():
            asked = [self._request(*request.args, number=number) for number, request in enumerate(requests)]
            keys = [_key("answer", request.args, one.sampling.seed) for request, one in zip(requests, asked)]
            missing = {key: one for key, one in zip(keys, asked) if self._ledger.get(key) is None}
            # Longest first: a cache that grows late would be copied.
            order = sorted(missing, key=lambda key: -len(missing[key].ids))
            longest = max((len(one.ids) + one.max_new_tokens for one in missing.values()), default=0)
            answers = self._model.answers(map(missing.__getitem__, order), batch_size=self._batch_size, length=longest)
            for key, answer in zip(
                order, tqdm(answers, total=len(order), unit="answer", disable=_quiet()), strict=True
            ):
                self._ledger.put(key, {"answer": answer.text})
            return [str((self._ledger.get(key) or {})["answer"]) for key in keys]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Continuations of one text are options of one request, so that the text is read once."""
        encoded = [self._option(*request) for request in requests]
        keys = [_key("score", one.ids, one.start) for one in encoded]
        missing = {key: one for key, one in zip(keys, encoded) if self._ledger.get(key) is None}
        options: dict[tuple[int, ...], list[str]] = {}
        for key, one in missing.items():
            # Texts after BOS alone share nothing that is worth a row in common.
            options.setdefault(one.ids[: one.start] if one.start > 1 else one.ids, []).append(key)
        groups = list(options.values())

        def keep(index: int, scores: Sequence[Score]) -> None:
            for key, one in zip(groups[index], scores, strict=True):
                if math.isfinite(one.log_prob):
                    self._ledger.put(key, {"log_prob": one.log_prob, "greedy": one.greedy})

        asked = [ScoreRequest(options=tuple(missing[key] for key in group)) for group in groups]
        with tqdm(total=len(missing), unit="option", disable=_quiet()) as bar:
            self._model.score_requests(asked, progress=bar.update, on_scores=keep)
        found = [self._ledger.get(key) or {} for key in keys]
        return [(float(one["log_prob"]), bool(one["greedy"])) for one in found]

    def _option(
        self, texts: tuple[str, str] | None, context: Sequence[int], continuation: Sequence[int]
    ) -> EncodedOption:
        # As the harness's client: the last token is only predicted, and a text that is too long loses its beginning.
        ids = (*context, *continuation)[-(self.max_length + 1) :]
        if not continuation or len(ids) <= len(continuation):
            said = "has no token of its own" if not continuation else f"is longer than {self.max_length} tokens"
            shown = "" if texts is None else f" {texts[1][:80]!r} after {texts[0][-80:]!r}"
            raise DataError(f"lm_eval: the continuation{shown} {said}; leave its document out of the task")
        return EncodedOption(ids=ids, start=len(ids) - len(continuation))

    def _request(self, context: str, options: dict[str, Any], *, number: int) -> Request:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS))
        until = [text for text in handle_stop_sequences(kwargs.pop("until", None), eos=None) if text]
        amount, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
        values = {name: kwargs.pop(name) for name in _SAMPLING if kwargs.get(name) is not None}
        strange = sorted(name for name in kwargs if name not in _SAMPLING)
        if strange:
            raise DataError(
                f"lm_eval: generation_kwargs: {', '.join(strange)} cannot be followed; known are until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        if amount >= self.max_length:
            raise DataError(
                f"lm_eval: generation_kwargs: max_gen_toks {amount} leaves no room for a prompt in the model's "
                f"{self.max_length} positions; ask for fewer"
            )
        if not sampled:
            values = {name: value for name, value in values.items() if name == "repetition_penalty"}
        else:
            # As transformers; 0 would be greedy.
            values.setdefault("temperature", 1.0)
        ids = self.tok_encode(context)[-(self.max_length - amount) :]
        if not ids:
            ids = [self.prefix_token_id]
        images = self._model.processor.read_images(())
        # Repeated questions get draws of their own.
        sampling = Sampling(seed=self._seed + number, **values) if sampled else Sampling(**values)
        return self._model.request(
            Inputs(ids=tuple(ids), images=images), max_new_tokens=amount, sampling=sampling, stop=until
        )

    @property
    def _model(self) -> Model:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @contextmanager
    def _run(self) -> Iterator[None]:
        self.running = True
        yield
        self.running = False


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _quiet() -> bool | None:
    """Whether this rank shows no progress; None leaves that to the terminal."""
    return rank_from_env() > 0 or None
