"""Tokens and keys of services, in settings and in the words of a command."""

import pytest

from llamafactory_adaptive.comparison.secrets import redacted, without_secrets


def test_tokens_keys_and_web_hooks_are_left_out_of_settings():
    kept = without_secrets({
        "hf_hub_token": "x", "hub_token": "x", "swanlab_api_key": "y", "swanlab_lark_secret": "z",
        "swanlab_lark_webhook_url": "https://x", "tokenized_path": "z", "add_tokens": "a", "lora_rank": 8,
        "model_init_kwargs": {"token": "x", "revision": "main"},
    })  # fmt: skip
    assert list(kept) == ["tokenized_path", "add_tokens", "lora_rank", "model_init_kwargs"]
    assert kept["model_init_kwargs"] == {"revision": "main"}


@pytest.mark.parametrize(
    "word",
    [
        "hf_hub_token=hf_1,2 3",
        "--hub_token=hf_1",
        "swanlab_lark_webhook_url=https://h/hf_1?a=b",
        "x:use_dora=true,hf_hub_token=hf_1,lora_dropout=0.1",
        "x:{use_dora: true, hf_hub_token: hf_1}",
        "x:{'hf_hub_token': 'hf_1'}",
    ],
)
def test_secrets_are_left_out_of_the_words_of_a_command(word):
    command = redacted(["llamafactory-adaptive", "compare", "my.yaml", word])
    assert "hf_1" not in command
    assert "..." in command


def test_other_words_are_as_a_shell_reads_them():
    assert redacted(["compare", "my file.yaml", "--out", "x", "tokenized_path=a"]) == (
        "compare 'my file.yaml' --out x tokenized_path=a"
    )
