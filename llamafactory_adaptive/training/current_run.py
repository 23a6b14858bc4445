"""The run this process is in."""

from contextvars import ContextVar
from typing import Any


# The callback (with plan and counters) of the run this process is in; read where upstream builds its LoraConfig.
_current: ContextVar[Any] = ContextVar("adaptive_run", default=None)
