import os

import pytest
import torch

# Triton decides when it is imported whether its kernels are interpreted, so this comes before any import of it. With
# a card the kernels run there; without one, in the interpreter. What must compile them here uses a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long property tests, sanitizers, architectures; run by `make check`")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The tests' tensors are tiny: a second thread only waits, and where other work shares the cores, it waits for long.
    torch.set_num_threads(1)
