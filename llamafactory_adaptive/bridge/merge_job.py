"""A job of a comparison: the merge of a saved adapter into its base, where it cannot be served beside the base."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.comparison_rows import base_settings
from llamafactory_adaptive.bridge.host_loading import open_host
from llamafactory_adaptive.files import cannot_write


_LESS_MEMORY = "use a machine with more memory, or leave out arms such as dora, whose adapters must be merged"
_TOKENIZER = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
              "*.model")  # fmt: skip


@dataclass(frozen=True)
class MergeJob:
    """The merge of an adapter into the base as it was before any quantisation, by PEFT, in the host's data type.

    Attributes:
        settings: settings of the YAML.
        adapter: folder of the saved adapter.
        tokenizer: folder of the tokenizer with which it was trained.
        folder: receives the merged model.
    """

    settings: Args
    adapter: str
    tokenizer: str
    folder: str

    def run(self) -> dict[str, Any]:
        """Write the merged model, and return its folder.

        Raises:
            CalibrationError: the base cannot be loaded.
            OutputError: the model cannot be written.
        """
        from peft import PeftModel

        settings = {key: value for key, value in base_settings(self.settings).items() if "quantization" not in key}
        with open_host(settings, "the merge", _LESS_MEMORY) as host:
            merged = PeftModel.from_pretrained(host.load_base(), self.adapter).merge_and_unload()
            folder = Path(self.folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
                merged.save_pretrained(folder)
                host.tokenizer.save_pretrained(folder)
                for pattern in _TOKENIZER:
                    for file in Path(self.tokenizer).glob(pattern):
                        shutil.copy(file, folder)
            except OSError as error:
                raise cannot_write(folder, error) from error
        return {"folder": self.folder}
