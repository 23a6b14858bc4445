"""Questions to the models of a run, answered from stored answers where those suffice, else by a server."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from eval import results
from eval.arguments import Request
from eval.cache import AnswerCache, key_of
from eval.errors import EvalError
from eval.models import Job, Serving, content_digest
from eval.output import OutputFolder
from eval.serving import Command, Endpoint, open_endpoint


if TYPE_CHECKING:
    from eval.client import Asked
    from eval.served import Asking


@dataclass
class Record:
    """Results of a run so far: answers, timings, versions, facts about the rows, and warnings."""

    answers: list[results.Answers] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)

    @property
    def all_warnings(self) -> list[str]:
        """List every warning once, and how often each kind of failure was resolved by asking again."""
        again = [f"{kind}: mended by asking again, {times} times" for kind, times in sorted(self.repeated.items())]
        return list(dict.fromkeys([*self.warnings, *again]))


@dataclass(frozen=True)
class Round:
    """Everything that asking a model needs besides the model itself.

    Attributes:
        loaded: tasks with their rows, by name.
        command: returns a server's command line.
    """

    request: Request
    loaded: Mapping[str, Any]
    cache: AnswerCache
    folder: OutputFolder
    record: Record
    command: Command

    def ask(self, serving: Serving, title: str) -> None:
        """Ask the questions of every job of one serving; start no server where all answers are stored.

        Raises:
            EvalError: the server failed; the answers that it gave before are kept.
        """
        facts = key_of("server", self._identity(serving, serving.name))
        done = self._from_kept(serving, facts)
        rest = [job for job in serving.jobs if job.served_as not in done]
        if not rest:
            print(f"{title} all answers are kept from before", flush=True)
        else:
            with open_endpoint(self.request, serving, self.command, partial(print, title, flush=True)) as endpoint:
                self.cache.add(facts, {"max_length": endpoint.max_length, "version": endpoint.version})
                self.record.versions["vllm"] = endpoint.version
                for job in rest:
                    done[job.served_as] = self._on_server(serving, job, endpoint)
        for job in serving.jobs:
            self._gather(job, done[job.served_as])

    def _from_kept(self, serving: Serving, facts: str) -> "dict[str, Asked]":
        """Answer jobs from the stored answers, in their order, up to the first that needs the server."""
        from eval.served import UnansweredError

        if facts not in self.cache:
            return {}
        known, done = self.cache[facts], {}
        endpoint = Endpoint(None, {job.served_as: job.served_as for job in serving.jobs}, known["max_length"],
                            known["version"], None)  # fmt: skip
        for job in serving.jobs:
            try:
                done[job.served_as] = self._questions(job, self._asking(serving, job, endpoint))
            except UnansweredError:
                return done
        self.record.versions["vllm"] = endpoint.version
        return done

    def _on_server(self, serving: Serving, job: Job, endpoint: Endpoint) -> "Asked":
        from eval.transport import ServerFailedError

        print(f"  {job.model} ({job.form}): {', '.join(task.name for task in job.tasks)}", flush=True)
        asking = self._asking(serving, job, endpoint)
        try:
            return self._questions(job, asking)
        except ServerFailedError as error:
            raise EvalError(_why(error, endpoint, job)) from error
        finally:
            self.record.repeated.update(asking.repeated)

    def _questions(self, job: Job, asking: "Asking") -> "Asked":
        from eval import client

        request, made = self.request, [self.loaded[task.name] for task in job.tasks]
        return client.ask_model(
            asking, job.tasks, made, request.seeds, request.limit, request.decoding, request.prompting
        )

    def _asking(self, serving: Serving, job: Job, endpoint: Endpoint) -> "Asking":
        from eval.served import Asking

        return Asking(
            site=endpoint.site,
            name=endpoint.names[job.served_as],
            identity=self._identity(serving, job.served_as),
            tokenizer=job.tokenizer,
            max_length=endpoint.max_length,
            concurrency=self.request.concurrency,
            patience=self.request.patience,
            cache=self.cache,
            ended=endpoint.server.died if endpoint.server else _never,
        )

    def _identity(self, serving: Serving, name: str) -> str:
        """Compute the key of a served model from what its answers depend on.

        On our own server: the contents of base and adapter (not their folders), the dtype, further server arguments
        and whether LoRA is enabled. On a running server: its address, and the paths or names of base and model.
        """
        server = self.request.server
        if self.request.url is not None:
            return key_of("running server", self.request.url, serving.model, name)
        adapter = next((adapter.path for adapter in serving.adapters if adapter.name == name), None)
        parts = [model_digest(serving.model), None if adapter is None else model_digest(adapter)]
        return key_of("own server", parts, server.dtype, server.extra, bool(serving.adapters))

    def _gather(self, job: Job, asked: "Asked") -> None:
        record = self.record
        record.answers += results.gather(job.model, job.form, job.tasks, asked.samples, asked.cut)
        if self.request.log_samples:
            lines = ({"model": job.model, **asdict(sample)} for sample in asked.samples)
            self.folder.append(results.SAMPLES_FILE, lines)
        record.timings.append(
            {"model": job.model, "form": job.form, "requests": asked.requests, "asked": asked.fresh,
             "seconds": round(asked.seconds, 2)}
        )  # fmt: skip


_digests: dict[str, str] = {}


def model_digest(path: str) -> str:
    """Identify the content of a model: a folder by the digest of its files, a hub name by its current commit."""
    if path not in _digests:
        _digests[path] = content_digest(path) or _hub_digest(path)
    return _digests[path]


def _hub_digest(name: str) -> str:
    from eval.hub import commit_of  # its library reads HF_HUB_OFFLINE as it is imported

    return f"{name}@{commit_of(name)}"


def _never() -> None:
    """Return None: whether a server that was not started here has ended is unknown."""


def _why(error: Exception, endpoint: Endpoint, job: Job) -> str:
    """Describe in one line why a server could not be asked any more."""
    ended = endpoint.server.died(patience=10) if endpoint.server else None
    if ended is not None:
        return f"the server ended while {job.model} was asked: {ended}"
    where = endpoint.site.url if endpoint.site else "the server"
    log = f"; log: {endpoint.server.log}" if endpoint.server else ""
    return f"{where} failed while {job.model} was asked: {error}{log}"


def settings_of(request: Request, versions: Mapping[str, str]) -> dict[str, Any]:
    """Collect everything that the results of a run depend on; a run is resumed only where all of it is equal."""
    models = [
        asdict(model) | {"content": None if request.url else model_digest(model.path)} for model in request.models
    ]
    files = request.files or {}
    return {
        "protocol": request.protocol,
        "template": request.template,
        "tasks": [f"{task.name} {task.version} {task.fewshot}-shot" for task in request.tasks],
        "limit": request.limit,
        "seeds": list(request.seeds),
        "decoding": asdict(request.decoding),
        "prompting": asdict(request.prompting),
        "strip_thinking": request.strip_thinking,
        "models": models,
        "base_row": request.base_row,
        "base_tokenizer": request.base_tokenizer,
        "data": {name: {part: results.digest(path) for part, path in paths.items()} for name, paths in files.items()},
        "server": {"url": request.url, "dtype": request.server.dtype, "extra": list(request.server.extra)},
        "log_samples": request.log_samples,
        "versions": dict(versions),
        "hub": None if request.files else os.environ.get("HF_ENDPOINT", "default"),
    }
