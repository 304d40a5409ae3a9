import os
import signal
import time

import pytest
import torch

from utils import stopping
from utils.stopping import Stopper


@pytest.fixture(autouse=True)
def own_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stopper(stop_after=0.0):
    return Stopper(stop_after, every=10, device=torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_and_a_second_one_kills(number):
    stop = stopper()
    assert not stop(0, last=False)
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    assert not stop.asked  # only when the loop looks: never in the middle of a step
    assert stop(1, last=False) and stop.asked
    assert signal.getsignal(number) == signal.SIG_DFL


def test_stop_after_counts_from_the_start_of_the_program(monkeypatch):
    stop = stopper(stop_after=100.0)
    monkeypatch.setattr(stopping, "START", time.monotonic() - 90)
    assert not stop(0, last=False)
    monkeypatch.setattr(stopping, "START", time.monotonic() - 101)
    assert stop(1, last=False)
    assert not stopper()(0, last=True)  # 0: never
