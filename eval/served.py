"""A served model as lm-evaluation-harness's ``local-completions`` model: the prompts are its own, the requests ours.

lm-evaluation-harness makes the payloads. They are sent here, and the answers are checked and stored, so that nothing
is asked twice and no invalid answer is used.
"""

import copy
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tqdm import tqdm

from eval import completions
from eval.cache import AnswerCache, key_of
from eval.decoding import Decoding, Prompting
from eval.errors import EvalError
from eval.transport import Asker, Patience, Site


class UnansweredError(EvalError):
    """A question without a stored answer, and no server to ask."""


@dataclass(frozen=True)
class Asking:
    """The model to ask, its server, and the answers that are stored already.

    Attributes:
        site: the server; None when every answer is stored.
        name: the model's name on the server.
        identity: key of the model in ``cache``, the same on every server that gives the same answers.
        max_length: most tokens of prompt and answer together.
        ended: returns why the server's process has ended, or None.
        repeated: number of failures after which a question was asked again, by kind.
    """

    site: Site | None
    name: str
    identity: str
    tokenizer: str
    max_length: int
    concurrency: int = 64
    patience: Patience = field(default_factory=Patience)
    cache: AnswerCache = field(default_factory=AnswerCache)
    ended: Callable[[], str | None] = lambda: None
    repeated: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Question:
    """A request's body, and the function that reads the answer to it."""

    body: Mapping[str, Any]
    read: Callable[[Any], Any]


class ServedModel(LocalCompletionsAPI):  # type: ignore[misc]
    """lm-evaluation-harness's ``local-completions`` model, for one model on one server.

    It adds the tokenizer's start token to raw text, as lm-evaluation-harness's ``hf`` and ``vllm`` models do, and beam
    search, for which a server returns every beam and ignores stop words. ``cut`` holds, per task, the rows that were
    longer than the server takes and lost their beginning.
    """

    def __init__(self, asking: Asking, decoding: Decoding, prompting: Prompting, seed: int, repeat: int = 0) -> None:
        self.cut: dict[str, set[int]] = defaultdict(set)
        self.decoding, self.prompting, self.seed, self.repeat = decoding, prompting, seed, repeat
        self.fresh = 0
        self._asking = asking
        self._scored: list[Instance] = []
        super().__init__(
            base_url="",  # nothing is sent by lm-evaluation-harness itself
            model=asking.name,
            tokenizer=asking.tokenizer,
            tokenizer_backend="huggingface",
            revision=None,
            max_length=asking.max_length,
            seed=seed,
        )
        start = self.tokenizer("").input_ids
        self.add_bos_token = bool(start) and not prompting.chat  # a chat template writes its own

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, which lm-evaluation-harness puts into its cache of requests (not used here)."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation with the tokenizer's own chat template.

        Raises:
            EvalError: the template refuses it (one without system messages, say).
        """
        with self._template_errors():
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.prompting.template_options,
            )
        return text

    @contextmanager
    def _template_errors(self) -> Iterator[None]:
        try:
            yield
        except (TemplateError, ValueError, TypeError) as error:
            raise EvalError(
                f"the chat template of {self._asking.tokenizer} cannot show a question: {str(error)[:300]}; look at "
                "--system-prompt and --chat-template-kwargs, or use --template none"
            ) from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate the answer to every request; after beam search, cut each text at its first stop word."""
        prompts = self.tok_encode([r.args[0] for r in requests], add_special_tokens=self.add_bos_token)
        texts = self._ask([self._generation(r, prompt) for r, prompt in zip(requests, prompts, strict=True)])
        if self.decoding.num_beams == 1:
            return texts
        return [cut(text, request.args[1].get("until") or []) for text, request in zip(texts, requests, strict=True)]

    def _generation(self, request: Instance, prompt: list[int]) -> Question:
        settings = copy.deepcopy(request.args[1])
        answer = settings.get("max_gen_toks", self._max_gen_toks)
        if (room := self.max_length - answer) < 1:
            raise EvalError(
                f"an answer of {answer} tokens to {request.task_name} leaves no room for the question: the server "
                f"takes {self._asking.max_length} tokens in all; lower --max-gen-toks, or give "
                'more with --server-args="--max-model-len N"'
            )
        self._count(request, len(prompt) + answer)
        body = self._create_payload(
            [prompt[-room:]], generate=True, gen_kwargs=settings, seed=self._sampling_seed(prompt)
        )
        beams = self.decoding.num_beams
        return Question(body, lambda document: completions.texts(document, beams)[0])  # the best beam comes first

    def _sampling_seed(self, prompt: list[int]) -> int:
        """Choose the server's seed for a question; for sampled answers, another one per question and repeat.

        With one seed for all, every question would be sampled with the same random draws.
        """
        if not self.decoding.temperature > 0:
            return self.seed
        named = hashlib.sha256(repr((self.seed, self.repeat, prompt)).encode()).digest()
        return int.from_bytes(named[:4], "big") >> 1

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Compute the log-likelihoods of continuations.

        The requests are kept for ``_loglikelihood_tokens``, which counts cut rows and gets their tokens alone.
        """
        self._scored = requests
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        questions = []
        for request, (_, context, continuation) in zip(self._scored, requests, strict=True):
            self._count(request, len(context) + len(continuation))
            questions.append(self._likelihood(context, continuation))
        return [(value, greedy) for value, greedy in self._ask(questions)]

    def _likelihood(self, context: list[int], continuation: list[int]) -> Question:
        prompt = (context + continuation)[-self.max_length :]
        given = len(prompt) - len(continuation)
        if given < 1:
            raise EvalError(
                f"a choice of {len(continuation)} tokens leaves no room for its question: the server takes "
                f"{self._asking.max_length} tokens in all"
            )
        body = self._create_payload([prompt], generate=False, seed=self.seed)
        return Question(body, lambda document: list(completions.likelihood(document, len(prompt), given)))

    def _count(self, request: Instance, tokens: int) -> None:
        if tokens > self.max_length:
            self.cut[request.task_name].add(request.doc_id)

    def _ask(self, questions: Sequence[Question]) -> list[Any]:
        """Return answers in the order of the questions, from the cache where they are stored, else from the server."""
        cache = self._asking.cache
        keys = [key_of(self._asking.identity, _without_name(q.body), self.repeat) for q in questions]
        open_ = {key: question for key, question in zip(keys, questions, strict=True) if key not in cache}
        if open_:
            self._ask_server(list(open_), list(open_.values()))
            self.fresh += len(open_)
        return [cache[key] for key in keys]

    def _ask_server(self, keys: Sequence[str], questions: Sequence[Question]) -> None:
        site, cache = self._asking.site, self._asking.cache
        if site is None:
            raise UnansweredError(f"{len(keys)} questions to {self._asking.name} are open")
        asker = Asker(site, "/v1/completions", self._asking.concurrency, self._asking.patience, self._asking.ended)
        with tqdm(total=len(keys), desc="  asking", leave=False) as progress:

            def keep(index: int, answer: Any) -> None:
                cache.add(keys[index], answer)
                progress.update()

            try:
                asker.ask([q.body for q in questions], lambda i, document: questions[i].read(document), keep)
            finally:
                self._asking.repeated.update(asker.repeated)
                cache.sync()


def _without_name(body: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the model's name from a payload, as it differs from run to run."""
    return {key: value for key, value in body.items() if key != "model"}


def cut(text: str, stops: Sequence[str]) -> str:
    """Cut ``text`` off at the first of its stop words."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
