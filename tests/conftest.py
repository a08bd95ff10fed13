import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long property tests, sanitizers, architectures; run by `make check`")
