import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long property tests, sanitizers, architectures; run by `make check`")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The tests' tensors are tiny: a second thread only waits, and where other work shares the cores, it waits for long.
    torch.set_num_threads(1)
