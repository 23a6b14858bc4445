"""Checks of ``--server-args``, the user's words for vLLM's command line; some would undo what the harness sets."""

import re
import shlex
from collections.abc import Iterator

from eval.redaction import secrets_given


# vLLM takes '_' for '-' and any beginning of an option that is unique, so every beginning of these is refused.
RESERVED = {
    "--host": "it is 127.0.0.1 always",
    "--port": "use the harness's --port",
    "--uds": "the harness asks on a port",
    "--grpc": "the harness asks over HTTP",
    "--headless": "the harness asks over HTTP",
    "--tokens-only": "the harness asks for texts",
    "--ssl-keyfile": "the harness asks without TLS on 127.0.0.1",
    "--ssl-certfile": "the harness asks without TLS on 127.0.0.1",
    "--ssl-ca-certs": "the harness asks without TLS on 127.0.0.1",
    "--ssl-cert-reqs": "the harness asks without TLS on 127.0.0.1",
    "--api-key": "our own server is asked without a key",
    "--hf-token": "put it into the environment variable HF_TOKEN",
    "--config": "name the options themselves: a file could set any of these",
    "--dtype": "use the harness's --dtype",
    "--model": "use --base or --merged",
    "--tokenizer": "use --base-tokenizer",
    "--skip-tokenizer-init": "answers must come as text",
    "--served-model-name": "names come from --base, --adapter and --merged",
    "--lora-modules": "use --adapter",
    "--generation-config": "it would change how answers are generated; use --temperature, --top-p, --max-gen-toks",
    "--override-generation-config": "it would change how answers are generated; use --temperature and --top-p",
    "--logprobs-mode": "likelihoods are those of the model itself",
    "--trust-remote-code": "code that comes with a model is never run",
}
_REMOTE_CODE = re.compile(r"trust[-_. ]*remote[-_. ]*code", re.I)


def problems(text: str) -> Iterator[str]:
    """Find what is wrong with the words of ``--server-args``; values are not repeated, as one may be a key."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        yield f"--server-args: this is no command line ({error})"
        return
    if words and not words[0].startswith("-"):
        yield '--server-args: its first word must be an option; try --server-args="--tensor-parallel-size 2"'
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        undone = [ours for ours in RESERVED if len(option) > 2 and ours.startswith(option.partition(".")[0])]
        for ours in undone:
            yield f"--server-args: {option} would undo what the harness sets ({ours}); {RESERVED[ours]}"
        if not undone and _REMOTE_CODE.search(word):
            yield "--server-args: trust_remote_code is not possible: code that comes with a model is never run"
        elif not undone and secrets_given([word]):
            yield f"--server-args: {option} takes a secret, which others on this machine can read in a command line"
