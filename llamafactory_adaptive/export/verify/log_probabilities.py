"""Log-probabilities in fp32 on fixed prompts, with no more than one copy of the model in memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


TOP_K = 20  # vLLM gives no more log-probabilities per token unless its server is told to
# Plain text, arithmetic, code, another script, a chat-like opening: different parts of the vocabulary.
PROMPTS = (
    "The capital of France is",
    "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Water boils at 100 degrees Celsius because",
    "Die Antwort auf die Frage lautet",
    "今天的天气",
    "User: Write one sentence about the sea.\nAssistant:",
    "1, 1, 2, 3, 5, 8, 13,",
)


def tokenise(folder: Path) -> list[list[int]]:
    """Tokenise the fixed prompts with the tokenizer in ``folder``.

    Raises:
        ValueError, OSError: there is no tokenizer, or it is empty.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    if len(set(map(tuple, rows))) < len(rows):  # transformers makes an empty tokenizer where there are no files
        raise ValueError("it tells the prompts of the check not apart")
    return rows


@contextmanager
def computing_in_fp32(model: nn.Module, rounded: Collection[str] = ()) -> Iterator[None]:
    """Make each layer compute in fp32 within the context, while weights stay as they are stored.

    A layer's own parameters are converted to fp32, which is exact, for its forward pass alone: the result is that of
    ``model.float()``, and memory holds one converted layer.

    Args:
        rounded: names of layers whose weights are moved by a random part, up to half, of their last place, as rounding
            to the stored type may move them.
    """
    noise, noisy = torch.Generator().manual_seed(0), {model.get_submodule(name) for name in rounded}
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(layer: nn.Module, inputs: object) -> None:
        kept[layer] = [(p, p.data) for p in layer.parameters(recurse=False) if p.dtype.is_floating_point]
        for parameter, stored in kept[layer]:
            parameter.data = stored.float()
            if layer in noisy:
                parameter.data += last_place(stored) * (torch.rand(stored.shape, generator=noise) - 0.5)

    def restore(layer: nn.Module, inputs: object, output: object) -> None:
        for parameter, stored in kept.pop(layer):
            parameter.data = stored

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_pre_hook(widen) for layer in layers]
    handles += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_place(weight: Tensor) -> Tensor:
    """Compute the distance from each weight to the next number of its type, in fp32."""
    _, exponent = torch.frexp(weight.float())
    return torch.exp2((exponent - 1).float()) * torch.finfo(weight.dtype).eps


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: list[list[int]], rounded: Collection[str] = ()) -> list[Tensor]:
    """Compute log-probabilities of the next token at every place of every row, (tokens, vocabulary) per row.

    All rows go through the model at once, so that each layer is converted once. They are filled up at their ends,
    which does not change earlier places of a causal model.
    """
    longest = max(map(len, rows))
    filled = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    with computing_in_fp32(model, rounded):
        logits = model(input_ids=filled).logits
    return [row_logits[: len(row)].float().log_softmax(-1) for row, row_logits in zip(rows, logits, strict=True)]


def largest_difference(reference: list[Tensor], other: list[Tensor], top_k: int = TOP_K) -> float:
    """Compute the largest distance of two sets of log-probabilities at the reference's ``top_k`` tokens per place."""
    worst = 0.0
    for expected, given in zip(reference, other, strict=True):
        best = expected.topk(min(top_k, expected.shape[-1]), dim=-1).indices
        distance = (expected.gather(-1, best) - given.gather(-1, best)).abs()
        worst = max(worst, float(distance.nan_to_num(nan=float("inf")).max()))
    return worst
