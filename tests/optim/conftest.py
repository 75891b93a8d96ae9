import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The machine that runs these tests is shared, and tiny tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
