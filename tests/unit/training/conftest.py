"""What the tests of chosen samples share."""

import pytest

from tests.helpers.sample_runs import begin_sampling, live_adapter


@pytest.fixture(scope="module")
def model():
    return live_adapter()


@pytest.fixture
def begin(model, tmp_path):
    """Begin a run on samples; returns its selection."""
    return lambda live=model, **more: begin_sampling(tmp_path, live, **more)
