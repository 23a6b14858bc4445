"""Settings of prompts and of decoding, the same for every model and task of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """Settings by which answers are generated.

    Attributes:
        max_gen_toks: most tokens of an answer; None leaves it to each task.
        repeats: how often a question with a generated answer is asked, each time with another seed.
    """

    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_gen_toks: int | None = None
    repeats: int = 1

    def options(self) -> dict[str, Any] | None:
        """Return the generation settings that override a task's own; None when there are none."""
        overrides: dict[str, Any] = {}
        if self.num_beams > 1:
            overrides |= {"use_beam_search": True, "n": self.num_beams}
        if self.temperature > 0:
            overrides |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        if self.max_gen_toks is not None:
            overrides["max_gen_toks"] = self.max_gen_toks
        return overrides or None


@dataclass(frozen=True)
class Prompting:
    """Settings of the prompt around a question.

    Attributes:
        chat: whether the tokenizer's chat template is applied.
        system: the system message, if any.
        template_options: further arguments of the chat template (``enable_thinking`` of Qwen3, say).
    """

    chat: bool = False
    system: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
