"""What the host loads for a run's settings: tokenizer, rows and base model, outside of its training function."""

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from llamafactory_adaptive.bridge.arguments import Args, split_names
from llamafactory_adaptive.errors import CalibrationError


T = TypeVar("T")
LESS_MEMORY = (
    "score the base in 4-bit (docs/how-to.md), lower adaptive_calibration_batch_size or cutoff_len, leave "
    "adaptive_calibration_device_map at auto, which spreads it over all GPUs, CPU memory and disk, or use a machine "
    "with more memory"
)


def rows_of(settings: Args) -> str:
    """Join the names of the data sets that rows are drawn from."""
    return ", ".join(split_names(settings["dataset"])) or "the training data"


@dataclass(frozen=True)
class Host:
    """The host's parsed arguments, and the tokenizer.

    Attributes:
        settings: the settings as given.
        arguments: the host's own objects: of the model, the data, training and finetuning.
        modules: tokenizer and processor.
        purpose: what things are loaded for, in one word, for messages.
        less_memory: what a user can do where memory runs out, for messages.
    """

    settings: Args
    arguments: tuple[Any, Any, Any, Any]
    modules: dict[str, Any]
    purpose: str
    less_memory: str = LESS_MEMORY

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the model."""
        return self.modules["tokenizer"]

    @property
    def streaming(self) -> bool:
        """Tell whether the training set is streamed."""
        return bool(self.arguments[1].streaming)

    def read_rows(self, pick: Callable[[Any], T]) -> T:
        """Read and tokenise the data sets as the host would, and return what ``pick`` takes of them.

        Args:
            pick: gets the host's mapping with ``train_dataset`` and maybe ``eval_dataset``.
        """
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

        model, data, training, finetuning = self.arguments
        stage = "rm" if finetuning.stage == "dpo" else finetuning.stage
        what = f"the data set {rows_of(self.settings)} cannot be read for {self.purpose}"
        with as_calibration_error(what, self.less_memory):
            template = get_template_and_fix_tokenizer(self.tokenizer, data)
            return pick(get_dataset(template, model, data, training, stage=stage, **self.modules))

    def load_base(self, is_trainable: bool = False) -> Any:
        """Load the base model for inference, without an adapter; as for training where ``is_trainable``."""
        from llamafactory.model import load_model

        model, _, _, finetuning = self.arguments
        named = self.settings["model_name_or_path"]
        with as_calibration_error(f"the model {named} cannot be loaded for {self.purpose}", self.less_memory):
            return load_model(self.tokenizer, model, finetuning, is_trainable=is_trainable)


@contextmanager
def open_host(settings: Args, purpose: str, less_memory: str = LESS_MEMORY) -> Iterator[Host]:
    """Parse settings as the host does and load the tokenizer; output goes to a scratch folder.

    Raises:
        CalibrationError: the host refuses the settings, or cannot load what they name.
    """
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch:
        with as_calibration_error(f"the settings cannot be used for {purpose}"):
            *arguments, _ = get_train_args({**settings, "output_dir": scratch})
        with as_calibration_error(f"the tokenizer of {settings['model_name_or_path']} cannot be loaded"):
            modules = load_tokenizer(arguments[0])
        parsed = (arguments[0], arguments[1], arguments[2], arguments[3])
        yield Host(settings, parsed, dict(modules), purpose, less_memory)


@contextmanager
def seeing_one_device() -> Iterator[None]:
    """Restrict the host's parser to one GPU: without a launcher it refuses a machine with several.

    What it parses within the context trains nothing.
    """
    from transformers import TrainingArguments

    original = TrainingArguments.__dict__["n_gpu"]
    TrainingArguments.n_gpu = property(lambda arguments: min(1, original.fget(arguments)))
    try:
        yield
    finally:
        TrainingArguments.n_gpu = original


@contextmanager
def as_calibration_error(what: str, less_memory: str = LESS_MEMORY) -> Iterator[None]:
    """Convert whatever the host raises within the context to one line; print its traceback to where the log is made.

    Raises:
        CalibrationError: the host raised an error; the message gives ``what`` and the cause.
    """
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        memory = isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
        why = str(error).strip().splitlines()
        cause = f"memory ran out: {less_memory}" if memory else f"{type(error).__name__}: {why[0] if why else what}"
        raise CalibrationError(f"{what} ({cause})") from error
