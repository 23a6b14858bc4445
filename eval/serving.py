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
        yield _describe(request.url, serving, None)
        return
    port = request.server.port or free_port()
    check_port(port)
    url = f"http://{LOOPBACK}:{port}"
    log = request.out / "logs" / f"server_{serving.name}{'_lora' if serving.adapters else ''}.log"
    words = command(serving, port, request.server)
    say(f"starting vLLM (log: {log})")
    with Server(words, url, log, request.server.startup_seconds, environment(request.server), say) as server:
        say(f"vLLM is up on {url}")
        yield _describe(url, serving, server)


def _describe(url: str, serving: Serving, server: Server | None) -> Endpoint:
    models = ask(url, "/v1/models")["data"]
    names = {job.served_as: _find(job.served_as, serving, models, url) for job in serving.jobs}
    length = next((m["max_model_len"] for m in models if m.get("max_model_len")), _DEFAULT_LENGTH)
    return Endpoint(url, names, int(length), _version(url), server)


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
