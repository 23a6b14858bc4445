"""Checks of models on the hub or in folders: the commit behind a name, and whether tokenizers load."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download

from eval.errors import EvalError


_LONGEST = 300  # characters of a library's error message


def commit_of(name: str) -> str:
    """Look up the commit that a model's name on the hub stands for now; without the hub, in the local cache.

    A small file is fetched in the way in which the tokenizer and the server load theirs, so that all three use one
    commit, also in a run that is resumed.

    Raises:
        EvalError: neither has a model of that name.
    """
    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except Exception as error:  # each release of the library has other errors of its own
        raise EvalError(
            f"--base {name}: there is no such folder, and neither the hub nor its local cache has a model of that "
            f"name ({_words(error)}); try --base DIR with a downloaded copy, or HF_TOKEN where it needs access"
        ) from error


def check_tokenizers(tokenizers: Iterable[str], template: str) -> None:
    """Check that every tokenizer loads, before any server starts.

    Raises:
        EvalError: a tokenizer cannot be loaded, or has no chat template where one is needed.
    """
    from transformers import AutoTokenizer  # takes seconds

    for name_or_path in sorted(tokenizers):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer from elsewhere makes of the libraries that load it
            if "trust_remote_code" in str(error):
                raise EvalError(
                    f"the tokenizer of {name_or_path} needs code that comes with it, which is never run; evaluate a "
                    "copy with a tokenizer of transformers"
                ) from error
            raise EvalError(
                f"the tokenizer of {name_or_path} cannot be loaded: {_words(error)}; give a folder with one that "
                "transformers loads"
            ) from error
        if template == "training" and tokenizer.chat_template is None:
            raise EvalError(
                f"--template training: {name_or_path} has no chat template; use --template none, or for a base whose "
                "adapter brings one --base-tokenizer with the adapter's NAME, or --no-base-row"
            )


def _words(error: Exception) -> str:
    """Format a library's error as one line, with its type where the text may be empty or a mere key."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = [] if isinstance(error, (OSError, ValueError)) and said else [type(error).__name__]
    return ": ".join((*kind, *said[:1]))[:_LONGEST]
