import pytest
import torch


# Tiny models gain nothing from threads, and test processes that run side by side lose by them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Plans and statistics of the tests never meet the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("TOKENIZERS_PARALLELISM", "false")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.delenv("LLAMAFACTORY_ADAPTIVE", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    from tests.helpers.tiny import write_datasets

    return write_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    from tests.helpers.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("llama"))
