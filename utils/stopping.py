"""Leaving in time: SIGTERM, SIGINT and a time limit, and what all processes agree on after each step."""

import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

START = time.monotonic()  # of the program, teacher's training included
SIGNALLED = []  # time of the first signal; of the program: one between a teacher's run and its student's counts
PASSED_ON = 5.0  # seconds: launchers pass SIGTERM on to processes that may have had it already


class Stopped(Exception):
    """The run was asked to stop, and nothing of it is lost."""


def note(number, frame):
    """The handler. No method: that would keep the Stopper and its process group alive after the run."""
    if not SIGNALLED:
        SIGNALLED.append(time.monotonic())
    elif number == signal.SIGINT or time.monotonic() - SIGNALLED[0] > PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


class Stopper:
    """stop(now) after each step -> bool: is this run to stop here?

    A first SIGTERM or SIGINT asks for it, and so does the time limit of `stop_after` seconds; a second signal kills, as
    ever, but for a SIGTERM that follows within 5 seconds. `failed` and `count` are for what else concerns all: whether
    a process cannot go on, and a number to be summed (of unreadable images); after a call `asked`, `any_failed` and
    `total` hold what the processes agreed on.

    Several processes exchange this after each step, over gloo, and read the exchange of the step before, so that
    neither host nor device waits; with now=True they wait for this one, and agree on this very step.
    """

    def __init__(self, stop_after=0.0, timeout=None):
        self.stop_after = stop_after
        self.asked, self.any_failed, self.total = False, False, 0
        self.group, self.exchanges = None, []
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout) if timeout else None)
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, note)

    def __call__(self, now=False, failed=False, count=0):
        due = bool(SIGNALLED) or 0 < self.stop_after < time.monotonic() - START
        flags = torch.tensor([due, failed, count], dtype=torch.int64)
        if self.group:
            self.exchanges.append((flags, dist.all_reduce(flags, group=self.group, async_op=True)))
            flags = torch.zeros(3, dtype=torch.int64)
            while len(self.exchanges) > (0 if now else 1):
                flags, work = self.exchanges.pop(0)
                work.wait()
        self.asked, self.any_failed, self.total = bool(flags[0]), bool(flags[1]), int(flags[2])
        return self.asked
