"""Leaving in time: SIGTERM, SIGINT and a time limit, seen by all processes at the same step."""

import signal
import time

import torch
import torch.distributed as dist

START = time.monotonic()  # of the program, teacher's training included


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class Stopper:
    """stop(step) -> bool: was this run asked to stop? With several processes they agree, every `every` steps.

    A first SIGTERM or SIGINT asks; a second one kills, as ever.
    """

    def __init__(self, stop_after, every, device):
        self.stop_after, self.every, self.device, self.asked = stop_after, every, device, False
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self, step):
        if self.stop_after and time.monotonic() - START > self.stop_after:
            self.asked = True
        if not dist.is_initialized():
            return self.asked
        if (step + 1) % self.every:
            return False
        asked = torch.tensor(float(self.asked), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.asked = bool(asked)
        return self.asked
