"""For every test: no network, fixed seeds, few threads, and no use of Transformers that it calls deprecated."""

from __future__ import annotations

import logging
import os

os.environ.update(  # before anything imports huggingface_hub, which reads them once
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)

import random

import numpy
import pytest
import torch

from hf_efficient_attn import kernels

# Workers of pytest-xdist share the cores; a lone process may have two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


class DeprecationRecorder(logging.Handler):
    """
    Keeps what Transformers logs about our use of something deprecated (most of it is logged, not warned).

    The message is kept rather than raised from `emit`, where a `try` around the call would hide it.
    """

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(f"{record.name}: {message}")

    def check(self) -> None:
        """Raises AssertionError with the messages kept since the last check, and forgets them."""
        messages, self.messages = self.messages, []
        if messages:
            raise AssertionError("Transformers calls deprecated what this test used:\n" + "\n".join(messages))


DEPRECATIONS = DeprecationRecorder()


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("transformers").addHandler(DEPRECATIONS)


def pytest_unconfigure(config: pytest.Config) -> None:
    logging.getLogger("transformers").removeHandler(DEPRECATIONS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fails a test whose fixtures or body made Transformers log a deprecation."""
    try:
        result = yield
    except BaseException:
        DEPRECATIONS.messages.clear()  # the test's own failure comes first, and the next test starts clean
        raise
    DEPRECATIONS.check()
    return result


@pytest.fixture
def deprecations() -> DeprecationRecorder:
    """The recorder, for a test that expects a deprecation or tests the recorder."""
    return DEPRECATIONS


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled kernels' functions that the test calls."""
    names, call = [], kernels.call
    monkeypatch.setattr(
        kernels, "call", lambda function, *args: names.append(function.__name__) or call(function, *args)
    )
    return names
