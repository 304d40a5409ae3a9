import pytest
import torch
import torch.distributed as dist

from utils import distributed
from utils.errors import InputError


def test_rank_0_is_known_before_there_is_a_process_group(monkeypatch):
    for name in "RANK", "LOCAL_RANK":
        monkeypatch.delenv(name, raising=False)
    assert distributed.is_main() and distributed.is_main_of_node()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not distributed.is_main() and distributed.is_main_of_node()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not distributed.is_main_of_node()


def test_a_process_takes_the_device_of_its_local_rank(monkeypatch):
    taken, values = [], {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in ("is_initialized", True), ("get_rank", 5), ("get_world_size", 8):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert distributed.start(torch.device("cuda")) == (5, 8, torch.device("cuda", 1))
    assert taken == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.start(torch.device("cuda"))[0] == 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--nproc_per_node: 4 processes; valid: up to 2"):
        distributed.start(torch.device("cuda"))


def test_one_process_of_torchrun_is_one_process(monkeypatch):
    for name, value in zip(distributed.TORCHRUN, ("0", "0", "1", "localhost", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.start(torch.device("cpu")) == (0, 1, torch.device("cpu")) and not dist.is_initialized()


def test_a_rank_without_the_rest_is_named(monkeypatch):
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="RANK: .* without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start"):
        distributed.start(torch.device("cpu"))
    assert distributed.is_main_of_node()  # so that somebody says it


def test_one_of_each_node_goes_first(monkeypatch):
    for first, order in (True, ["download", "barrier"]), (False, ["barrier", "download"]):
        done = []
        monkeypatch.setattr(distributed, "is_main_of_node", lambda first=first: first)
        monkeypatch.setattr(distributed, "barrier", lambda done=done: done.append("barrier"))
        with distributed.one_of_each_node_first():
            done.append("download")
        assert done == order
        done.clear()
        with pytest.raises(InputError), distributed.one_of_each_node_first():
            raise InputError("data.root", "nowhere")
        assert done == ["barrier"]  # the others go on, and say the same


def test_alone_a_process_does_not_leave_nccl(monkeypatch):
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    for backend, together, leaves in ("nccl", True, 1), ("nccl", False, 0), ("gloo", False, 1):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        left.clear()
        distributed.finish(together)
        assert len(left) == leaves
