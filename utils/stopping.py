"""Leaving in time: SIGTERM, SIGINT and a time limit, seen by all processes at the same step."""

import signal
import time

import torch
import torch.distributed as dist

START = time.monotonic()  # of the program, teacher's training included


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class Stopper:
    """stop(step, last) -> bool: is this run to stop after this step?

    A first SIGTERM or SIGINT asks for it; a second one kills, as ever. Several processes agree every `every` steps and
    at the `last` of an epoch; `asked` is what they agreed on.
    """

    def __init__(self, stop_after, every, device):
        self.stop_after, self.every, self.device = stop_after, every, device
        self.signalled, self.asked = False, False
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, self._signal)

    def _signal(self, number, frame):
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self, step, last):
        late = self.stop_after > 0 and time.monotonic() - START > self.stop_after
        self.asked = self.signalled or late
        if dist.is_initialized():
            if (step + 1) % self.every and not last:
                self.asked = False
            else:
                asked = torch.tensor(float(self.asked), device=self.device)
                dist.all_reduce(asked, dist.ReduceOp.MAX)
                self.asked = bool(asked)
        return self.asked
