import os
import signal
import time

import pytest

from utils import stopping
from utils.stopping import Stopper


@pytest.fixture(autouse=True)
def own_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    stopping.SIGNALLED.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_and_a_second_one_kills(number, monkeypatch):
    stop, killed = Stopper(), []
    monkeypatch.setattr(signal, "raise_signal", killed.append)
    assert not stop()
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    assert stop.due and not stop.asked  # only when the loop looks: never in the middle of a step
    assert stop() and stop.asked
    assert Stopper().due  # the next run of the program, one's student for instance, is not begun either
    if number == signal.SIGTERM:  # torchrun passes on what SLURM has sent to its processes too
        os.kill(os.getpid(), number)
        assert not killed and signal.getsignal(number) == stopping.note
        stopping.SIGNALLED[0] -= 6
    os.kill(os.getpid(), number)
    assert killed == [number] and signal.getsignal(number) == signal.SIG_DFL


def test_stop_after_counts_from_the_start_of_the_program(monkeypatch):
    stop = Stopper(stop_after=100.0)
    monkeypatch.setattr(stopping, "START", time.monotonic() - 90)
    assert not stop()
    monkeypatch.setattr(stopping, "START", time.monotonic() - 101)
    assert stop()
    assert not Stopper()(now=True)  # 0: never


def test_failures_and_counts_are_passed_on():
    stop = Stopper()
    assert not stop(failed=True, count=3)
    assert stop.any_failed and stop.total == 3
    assert not stop() and not stop.any_failed and stop.total == 0
