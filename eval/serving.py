"""Endpoints at which models are asked: a server that is started and ended here, or one that runs already."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eval import completions
from eval.arguments import Request
from eval.errors import EvalError
from eval.models import Serving
from eval.redaction import excerpt
from eval.server import LOOPBACK, Server, ServerOptions, check_port, environment, free_port
from eval.transport import Patience, Site, fetch


Command = Callable[[Serving, int, ServerOptions], Sequence[str]]
_DEFAULT_LENGTH = 2048  # of servers that report none


@dataclass(frozen=True)
class Endpoint:
    """A server at which models are asked, or were when the stored answers were made.

    Attributes:
        site: its address and key; None for one that is no longer needed, as all its answers are stored.
        names: the server's name of each model, by our own name.
        max_length: most tokens of prompt and answer together.
        version: version of vLLM.
        server: its process, when it was started here.
    """

    site: Site | None
    names: Mapping[str, str]
    max_length: int
    version: str
    server: Server | None


@contextmanager
def open_endpoint(
    request: Request, serving: Serving, command: Command, say: Callable[[str], None]
) -> Iterator[Endpoint]:
    """Yield the endpoint for one serving; end a server that was started for it when the block is left.

    Raises:
        EvalError: the port is taken, the server does not start or answer, or a model is not served.
    """
    if request.url is not None:
        say(f"asking the server at {request.url}")
        site = Site(request.url, os.environ.get("OPENAI_API_KEY", "").strip() or None)
        endpoint = _describe(site, serving, None, str)
        _probe(site, endpoint, serving, request.decoding.num_beams, request.patience)
        yield endpoint
        return
    port = request.server.port or free_port()
    check_port(port)
    url = f"http://{LOOPBACK}:{port}"
    log = request.out / "logs" / f"server_{serving.name}{'_lora' if serving.adapters else ''}.log"
    words = command(serving, port, request.server)
    say(f"starting vLLM (log: {log})")
    with Server(words, url, log, request.server.startup_seconds, environment(request.server), say) as server:
        say(f"vLLM is up on {url}")
        yield _describe(Site(url), serving, server, request.server.served_name)  # ours is asked without a key


def _describe(site: Site, serving: Serving, server: Server | None, name_of: Callable[[str], str]) -> Endpoint:
    models, url = _models(site), site.url
    if server is None:
        names = {job.served_as: _find(job.served_as, serving, models, url) for job in serving.jobs}
    else:
        names = {job.served_as: name_of(job.served_as) for job in serving.jobs}
        if not set(names.values()) <= {m["id"] for m in models}:
            raise EvalError(
                f"another server answers at {url} in place of ours (it serves {_served(models)}); "
                "leave --port out to take a free one"
            )
    return Endpoint(site, names, _max_length(models, url), _version(site), server)


def _max_length(models: Sequence[Mapping[str, Any]], url: str) -> int:
    length = next((m["max_model_len"] for m in models if m.get("max_model_len") is not None), _DEFAULT_LENGTH)
    if type(length) is not int or length < 2:
        raise EvalError(
            f"the server at {url} says it takes {excerpt(str(length), 40)} tokens (max_model_len): it must be a whole "
            "number from 2"
        )
    return length


def _models(site: Site) -> list[Mapping[str, Any]]:
    answer, url = fetch(site, "/v1/models"), site.url
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in models):
        raise EvalError(f"--base-url: {url}/v1/models lists no models; give an OpenAI-compatible server's address")
    return models


def _probe(site: Site, endpoint: Endpoint, serving: Serving, num_beams: int, patience: Patience) -> None:
    """Check with short questions that a running server can score prompts and generate, as far as its tasks need it.

    Raises:
        EvalError: the server cannot score prompts, or cannot generate (with that many beams).
    """
    name, tasks = endpoint.names[serving.jobs[0].served_as], serving.jobs[0].tasks
    prompt = [1, 2, 3]
    question = {"model": name, "prompt": [prompt], "max_tokens": 1, "temperature": 0}

    def require(body: Mapping[str, Any], read: Callable[[Any], Any], what: str) -> None:
        try:
            read(fetch(site, "/v1/completions", body, patience))
        except EvalError as error:
            raise EvalError(f"--base-url: the server at {site.url} cannot {what} ({error})") from error

    if any(task.likelihood for task in tasks):
        require({**question, "echo": True, "logprobs": 1},
                lambda answer: completions.likelihood(answer, len(prompt), 1),
                "score the tokens of a prompt (echo with logprobs), which likelihood tasks need; try --protocol "
                "llm_adapters")  # fmt: skip
    if not all(task.likelihood for task in tasks):
        beams = {"use_beam_search": True, "n": num_beams} if num_beams > 1 else {}
        hint = f" with --num-beams {num_beams}; vLLM needs --max-logprobs {2 * num_beams} for it" if beams else ""
        require({**question, **beams}, lambda answer: completions.texts(answer, num_beams), f"generate{hint}")


def _find(name: str, serving: Serving, models: Sequence[Mapping[str, Any]], url: str) -> str:
    """Find the server's name for one of our models.

    A base may be listed under its path, or be the only model that is no adapter.
    """
    if any(m["id"] == name for m in models):
        return name
    if name == serving.name:
        bases = [m["id"] for m in models if not m.get("parent")]
        rooted = [m["id"] for m in models if serving.model in (m["id"], m.get("root"))]
        if len(candidates := rooted[:1] or (bases if serving.name == "base" else [])) == 1:
            return str(candidates[0])
    raise EvalError(f"the server at {url} does not serve {name}; it serves {_served(models)}")


def _served(models: Sequence[Mapping[str, Any]]) -> str:
    """List the models that a server serves, shortened for a message."""
    return excerpt(", ".join(m["id"] for m in models), 300)


def _version(site: Site) -> str:
    try:
        return excerpt(str(fetch(site, "/version")["version"]), 80)
    except (EvalError, KeyError, TypeError):
        return "unknown"  # another server than vLLM
