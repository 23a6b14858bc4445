"""What a folder or a name of the hub gives besides weights: the commit behind a name, and a tokenizer that loads."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download

from eval.errors import EvalError


_LONGEST = 300  # characters of what a library says


def commit_of(name: str) -> str:
    """Ask the hub for the commit that a model's name stands for now; without the hub, the local cache.

    A small file is fetched, as loading the tokenizer and the server do: so all three get one commit, before the first
    question as in a run that goes on.

    Raises:
        EvalError: neither knows the name.
    """
    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except Exception as error:  # each release of the library has other errors of its own
        raise EvalError(
            f"--base {name}: there is no such folder, and neither the hub nor its local cache has a model of that "
            f"name ({_words(error)}); try --base DIR with a downloaded copy, or HF_TOKEN where it needs access"
        ) from error


def check_tokenizers(places: Iterable[str], template: str) -> None:
    """Load every tokenizer once, before any server starts.

    Raises:
        EvalError: it cannot be had, or has no chat template where one is asked for.
    """
    from transformers import AutoTokenizer  # takes seconds

    for place in sorted(places):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer from elsewhere makes of the libraries that load it
            if "trust_remote_code" in str(error):
                raise EvalError(
                    f"the tokenizer of {place} needs code that comes with it, which is never run; evaluate a copy "
                    "with a tokenizer of transformers"
                ) from error
            raise EvalError(
                f"the tokenizer of {place} cannot be loaded: {_words(error)}; give a folder with one that "
                "transformers loads"
            ) from error
        if template == "training" and tokenizer.chat_template is None:
            raise EvalError(
                f"--template training: {place} has no chat template; use --template none, or for a base whose adapter "
                "brings one --base-tokenizer with the adapter's NAME, or --no-base-row"
            )


def _words(error: Exception) -> str:
    """Put an error of a library into one line; some say nothing, or a key alone."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = [] if isinstance(error, (OSError, ValueError)) and said else [type(error).__name__]
    return ": ".join((*kind, *said[:1]))[:_LONGEST]
