"""What a run says: the environment, a table of an epoch's steps, one line an epoch, a progress bar, TensorBoard."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision

from utils import checkpoint, distributed


def environment(device, world):
    """Versions, git sha, hardware and command: the first line of a log."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # git is not installed
        git = ""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
                  if line.startswith("model name")] if cpuinfo.exists() else []
        hardware = (f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()}), "
                    f"{torch.get_num_threads()} threads")
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "numpy": numpy.__version__, "git": git or None, "hardware": hardware, "processes": world,
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
    }


class Table:
    """An epoch's losses, metrics and counts, a row a step, kept on the device: read when a line is due, not before."""

    def __init__(self, steps, device, saved=None):
        self.steps, self.device = steps, device
        self.names, self.num_losses, self.rows = [], 0, None
        if saved:
            self.names, self.num_losses, rows = saved["names"], saved["losses"], saved["rows"].to(device)
            self.rows = F.pad(rows, (0, 0, 0, max(steps - len(rows), 0)))  # another number of processes: more steps

    def _open(self, names, num_losses):
        """The rows, at the first step, when it is known what they hold: the first `num_losses` names are losses'."""
        if self.rows is None:
            self.names, self.num_losses = names, num_losses
            self.rows = torch.zeros(self.steps, len(names), dtype=torch.float64, device=self.device)

    def add(self, step, other):
        """Add the one row of another table to row `step`."""
        self._open(other.names, other.num_losses)
        self.rows[step].add_(other.rows[0])

    def write(self, step, losses, metrics, correct, n):
        """Add n images to row `step`: everything times n, so that batches and processes can be summed."""
        self._open([*losses, *metrics, "train_top1", "n"], len(losses))
        row = self.rows[step]
        for column, value in enumerate([*losses.values(), *metrics.values(), 100 * correct / n, 1.0]):
            row[column].add_((value.detach() if isinstance(value, torch.Tensor) else value) * n)

    def clear(self):
        """All rows to zero."""
        if self.rows is not None:
            self.rows.zero_()

    def failure(self, steps, epoch):
        """What to say of the first loss of the first `steps` that is not finite, or ""."""
        bad = (~self.rows[:steps, :self.num_losses].isfinite()).nonzero()
        if len(bad):
            step, column = bad[0].tolist()
            return f"loss {self.names[column]!r} is not finite at epoch {epoch + 1}, step {step + 1}"
        return ""

    def images(self):
        """How many images the rows hold."""
        return self.rows[:, -1].sum().item()

    def means(self):
        """{name: mean over the epoch's images}; steps in which a metric was not finite (a CKA) do not count for it."""
        finite = self.rows.isfinite()
        means = (self.rows.where(finite, 0).sum(0) / (self.rows[:, -1:] * finite).sum(0)).tolist()
        return {name: mean if math.isfinite(mean) else None for name, mean in zip(self.names[:-1], means)}


def read_log(path, epoch=math.inf):
    """The lines of a log as dicts: the header, then the epochs up to `epoch`. A damaged line, as one that a kill cut
    off, is left out, a damaged header empty.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and line.get("epoch", 0) <= epoch:
            lines.append(line)
    return [{}, *lines] if lines and "epoch" in lines[0] else lines


def write_log(path, lines, key="runs"):
    """Write a whole log anew, atomically. Raises InputError on `key` where the disk refuses."""
    checkpoint.write(path, "".join(json.dumps(line) + "\n" for line in lines), key)


def epoch_line(entry, epochs):
    """A log entry for people."""
    numbers = " ".join(f"{key} {value:.4g}" for key, value in entry.items()
                       if key not in ("epoch", "top1", "top5", "best_top1") and value is not None)
    return f"epoch {entry['epoch']}/{epochs}: top-1 {entry['top1']:.2f} top-5 {entry['top5']:.2f} | {numbers}"


def progress(steps, label):
    """A progress bar around an iterable, with tqdm where it is installed and the output is a terminal."""
    if distributed.is_main() and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return steps
        return tqdm(steps, label, leave=False)
    return steps


def tensorboard_writer(folder):
    """A SummaryWriter on `folder`, or None with a line where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard: true, but TensorBoard is not installed; going on without", file=sys.stderr)
        return None
    return SummaryWriter(folder)
