"""Where models are asked: on a server of ours, started and ended here, or on one that runs already."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eval.arguments import Request
from eval.errors import EvalError
from eval.models import Serving
from eval.server import LOOPBACK, Server, ServerOptions, ask, check_port, environment, free_port


Command = Callable[[Serving, int, ServerOptions], Sequence[str]]
_DEFAULT_LENGTH = 2048  # of servers that do not tell


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        names: our model names to the server's.
        max_length: tokens of prompt and answer together.
        version: of vLLM.
        server: its process, when it is ours.
    """

    url: str
    names: Mapping[str, str]
    max_length: int
    version: str
    server: Server | None


@contextmanager
def endpoint(request: Request, serving: Serving, command: Command, say: Callable[[str], None]) -> Iterator[Endpoint]:
    """The endpoint for one serving; a server started for it is gone when the block is left, however it is left.

    Raises:
        EvalError: the port is taken, the server does not start, nobody answers, or a model is not served.
    """
    if request.url is not None:
        say(f"asking the server at {request.url}")
        place = _describe(request.url, serving, None, str)
        _probe(place, serving, request.num_beams)
        yield place
        return
    port = request.server.port or free_port()
    check_port(port)
    url = f"http://{LOOPBACK}:{port}"
    log = request.out / "logs" / f"server_{serving.name}{'_lora' if serving.adapters else ''}.log"
    words = command(serving, port, request.server)
    say(f"starting vLLM (log: {log})")
    with Server(words, url, log, request.server.startup_seconds, environment(request.server), say) as server:
        say(f"vLLM is up on {url}")
        yield _describe(url, serving, server, request.server.served_name)


def _describe(url: str, serving: Serving, server: Server | None, name_of: Callable[[str], str]) -> Endpoint:
    models = _models(url)
    if server is None:
        names = {job.served_as: _find(job.served_as, serving, models, url) for job in serving.jobs}
    else:
        names = {job.served_as: name_of(job.served_as) for job in serving.jobs}
        if not set(names.values()) <= {m["id"] for m in models}:
            raise EvalError(
                f"another server answers at {url} in place of ours (it serves {', '.join(m['id'] for m in models)}); "
                "leave --port out to take a free one"
            )
    length = next((m["max_model_len"] for m in models if m.get("max_model_len")), _DEFAULT_LENGTH)
    return Endpoint(url, names, int(length), _version(url), server)


def _models(url: str) -> list[Mapping[str, Any]]:
    answer = ask(url, "/v1/models")
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in models):
        raise EvalError(f"--base-url: {url}/v1/models lists no models; give an OpenAI-compatible server's address")
    return models


def _probe(place: Endpoint, serving: Serving, num_beams: int) -> None:
    """Ask a foreign server the shortest question of each kind that is to come.

    Raises:
        EvalError: it cannot score prompts, or cannot generate (with that many beams).
    """
    name, tasks = place.names[serving.jobs[0].served_as], serving.jobs[0].tasks
    question = {"model": name, "prompt": [[1, 2, 3]], "max_tokens": 1, "temperature": 0}
    if any(task.likelihood for task in tasks):
        _require(place.url, {**question, "echo": True, "logprobs": 1}, _scores_prompts, "score the tokens of a prompt "
                 "(echo with logprobs), which likelihood tasks need; try --protocol llm_adapters")  # fmt: skip
    if not all(task.likelihood for task in tasks):
        beams = {"use_beam_search": True, "n": num_beams} if num_beams > 1 else {}
        hint = f" with --num-beams {num_beams}; vLLM needs --max-logprobs {2 * num_beams} for it" if beams else ""
        _require(place.url, {**question, **beams}, lambda choice: isinstance(choice["text"], str), f"generate{hint}")


def _require(url: str, body: Mapping[str, Any], fits: Callable[[Any], bool], what: str) -> None:
    why = "its answer lacks it"
    try:
        if fits(ask(url, "/v1/completions", body)["choices"][0]):
            return
    except EvalError as error:
        why = str(error)
    except (KeyError, IndexError, TypeError):
        pass
    raise EvalError(f"--base-url: the server at {url} cannot {what} ({why})")


def _scores_prompts(choice: Any) -> bool:
    """Whether there are values for the tokens of the prompt, after the first one."""
    return isinstance(choice["logprobs"]["token_logprobs"][1], float)


def _find(name: str, serving: Serving, models: Sequence[Mapping[str, Any]], url: str) -> str:
    """The server's name for one of ours. A base may be known by its path, or be the only model that is no adapter."""
    if any(m["id"] == name for m in models):
        return name
    if name == serving.name:
        bases = [m["id"] for m in models if not m.get("parent")]
        rooted = [m["id"] for m in models if serving.model in (m["id"], m.get("root"))]
        if len(found := rooted[:1] or (bases if serving.name == "base" else [])) == 1:
            return str(found[0])
    raise EvalError(f"the server at {url} does not serve {name}; it serves {', '.join(m['id'] for m in models)}")


def _version(url: str) -> str:
    try:
        return str(ask(url, "/version")["version"])
    except (EvalError, KeyError, TypeError):
        return "unknown"  # another server than vLLM
