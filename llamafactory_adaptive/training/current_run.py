"""The run of this process, for code that does not receive it as an argument."""

from contextvars import ContextVar
from typing import Any


# The callback (with plan and counters); read where the Trainer and the host's LoraConfig are built.
current_run: ContextVar[Any] = ContextVar("adaptive_run", default=None)
