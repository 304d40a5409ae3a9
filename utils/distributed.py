"""One process or many (torchrun): rank, sums over all processes, and who may speak."""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import InputError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets for each process


def start(device, timeout=None):
    """(rank, world, device) of this process: torchrun's where it started several, else (0, 1, device).

    A process that waits for another more than `timeout` seconds (None: PyTorch's 10 to 30 minutes) ends the job.
    Raises InputError where some of torchrun's variables are set, RANK among them, and others not, and for more
    processes than GPUs.
    """
    if "RANK" not in os.environ:
        return 0, 1, device
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise InputError("RANK", f"set in the environment without {', '.join(missing)}; start by torchrun, or unset it")
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise InputError("--nproc_per_node", f"{here} processes; valid: up to {gpus}, a GPU each")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if os.environ["WORLD_SIZE"] == "1":  # torchrun with one process is one process
        return 0, 1, device
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # One node: torchrun serves the same store again after a restart, where a process would still find the
            # addresses of those that died. (Of several nodes, each counts its own restarts; their store is a new one.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(seconds=timeout) if timeout else None)
    return dist.get_rank(), dist.get_world_size(), device


def is_main():
    """Whether this is rank 0, which alone prints and writes."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


def is_main_of_node():
    """Whether this process is the one of its node that speaks for it."""
    return is_main() or os.environ.get("LOCAL_RANK", "0") == "0"


def sum_over_processes(tensor):
    """The sum over all processes, in place; counts are to be summed, and divided only then."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def is_the_same(number, device):
    """Whether `number` is the same on all processes."""
    if not dist.is_initialized():
        return True
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return (extremes[0] == -extremes[1]).item()


def broadcast_buffers(model):
    """Give every process rank 0's buffers, BatchNorm's statistics for instance."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def one_of_each_node_first():
    """with …: one process of each node goes before the others of it, to download for instance."""
    first = is_main_of_node()
    if not first:
        barrier()
    try:
        yield
    finally:  # what stops the first, a missing file for instance, stops the others in the same way
        if first:
            barrier()


def finish(together=True):
    """Leave the process group. Not `together`: others may know nothing of it, and NCCL would wait for them."""
    if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
        dist.destroy_process_group()
