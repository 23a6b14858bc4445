"""Ask a model behind an OpenAI-compatible server on this machine, with the ``openai`` package.

Run: ``python examples/inference/client.py MODEL [QUESTION] [--base-url URL]``. MODEL is the name the server gives the
merged model or the adapter; without a question the names it knows are listed.
"""

import argparse

from openai import APIConnectionError, NotFoundError, OpenAI


def main() -> None:
    """One greedy answer, or the list of models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="name of a served model or adapter")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    words = parser.parse_args()
    client = OpenAI(base_url=words.base_url, api_key="none", max_retries=0)
    try:
        if words.question is None:
            print("\n".join(model.id for model in client.models.list()))
            return
        answer = client.chat.completions.create(
            model=words.model, messages=[{"role": "user", "content": words.question}], temperature=0.0, max_tokens=128
        )
    except APIConnectionError as error:
        raise SystemExit(f"no server answers at {words.base_url}; start one, or give --base-url") from error
    except NotFoundError as error:
        raise SystemExit(f"the server does not know {words.model}; run without arguments for the names") from error
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
