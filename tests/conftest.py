import pytest
import torch
from hypothesis import settings

# the same examples on every run: a failure can be repeated, and a slow machine is not a failure
settings.register_profile("steppe", deadline=None, derandomize=True)
settings.load_profile("steppe")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
