import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    assert stopping.SIGNALLED and not stop.asked  # only when the loop looks: never in the middle of a step
    assert stop() and stop.asked
    assert Stopper()()  # the next run of the program, one's student for instance, is not begun either
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


CODE = '''
import sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from utils.stopping import SIGNALLED, Stopper
dist.init_process_group("gloo")
rank, stop = dist.get_rank(), Stopper(timeout=60)
said = []

def step(**arguments):
    said.append((stop(**arguments), stop.any_failed, stop.total))

step(failed=rank == 1, count=rank + 1)
step()
step(now=True, count=10 * (rank + 1))
step(failed=rank == 0, now=True)
if rank == 1:
    SIGNALLED.append(0.0)
step()
step()
assert stop.asked
print(said, file=open(f"{sys.argv[2]}/{rank}", "w"))
dist.destroy_process_group()
'''


def test_two_processes_agree_on_the_step_before_or_on_this_one(tmp_path):
    (tmp_path / "two.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(tmp_path / "two.py"), str(Path(__file__).resolve().parents[2]), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    expected = [(False, False, 0),  # nothing was exchanged before
                (False, True, 3), (False, False, 30), (False, True, 0),
                (False, False, 0),  # nothing is left of a step that they waited for
                (True, False, 0)]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [f"{expected}\n"] * 2
