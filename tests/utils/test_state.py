import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from distillers import DISTILLERS
from utils import checkpoint
from utils.checkpoint import append
from utils.config import section, setting
from utils.errors import InputError
from utils.log import Table, read_log
from utils.state import load_state, lock, open_log, restore, save_state, with_distiller_defaults


@dataclass
class Optimizer:
    lr: float = setting(0.1, "learning rate")


@dataclass
class Settings:
    name: str = setting("run", "name")
    device: str = setting("cpu", "device")
    optimizer: Optimizer = section(Optimizer)
    distiller: dict = setting({"name": "ce"}, "distiller")


def a_run(seed):
    torch.manual_seed(seed)
    distiller = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1, momentum=0.9)
    distiller(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return SimpleNamespace(distiller=distiller, optimizers={"student": optimizer}, scaler=torch.amp.GradScaler("cpu"),
                           images_checksum=0, teacher_checksum=0)


def test_a_state_comes_back_whole(tmp_path):
    run, other, table = a_run(0), a_run(1), Table(3, "cpu")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    table.write(0, {"ce": torch.tensor(2.0)}, {"cka": 0.5}, torch.tensor(3), 4)
    save_state(Settings(), run, tmp_path, table, epoch=1, step=1, best=3.0, clock={"seconds": 2.0})
    state = load_state(Settings(), tmp_path, set())
    restore(other, state)
    assert all(torch.equal(a, b) for a, b in zip(run.distiller.parameters(), other.distiller.parameters()))
    for a, b in zip(run.distiller.parameters(), other.distiller.parameters()):
        momenta = [r.optimizers["student"].state[p]["momentum_buffer"] for r, p in ((run, a), (other, b))]
        assert torch.equal(*momenta)
    assert other.scaler.get_scale() == 128
    assert [state[key] for key in ("epoch", "step", "best", "clock")] == [1, 1, 3.0, {"seconds": 2.0}]
    assert Table(3, "cpu", state["table"]).means() == table.means()
    assert load_state(Settings(), tmp_path / "nothing", set()) is None


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path, monkeypatch):
    here = {"torch": "2.11", "hardware": "a CPU", "git": "abc", "command": "python train.py"}

    def start(after, **changed):
        monkeypatch.setattr("utils.state.environment", lambda device, world: here | changed)
        open_log(Settings(), tmp_path, {"epoch": after} if after is not None else None, 1, "cpu")
        append(tmp_path / "log.jsonl", {"epoch": (after or 0) + 1})
        return read_log(tmp_path / "log.jsonl")

    assert "resumed" not in start(None)[0]
    assert "resumed" not in start(1, command="python train.py again")[0]
    header = start(2, hardware="a GPU", git="abd")[0]
    assert header == {"run": "run"} | here | {"resumed": [{"after_epoch": 2, "hardware": "a GPU", "git": "abd"}]}
    assert start(3, hardware="a GPU", git="abd")[0] == header
    lines = start(4)
    assert lines[0]["resumed"] == [*header["resumed"], {"after_epoch": 4, "hardware": "a CPU", "git": "abc"}]
    assert [line["epoch"] for line in lines[1:]] == [1, 2, 3, 4, 5]


def test_another_config_is_refused_by_its_key(tmp_path):
    table = Table(1, "cpu")
    table.write(0, {"ce": torch.tensor(2.0)}, {}, torch.tensor(3), 4)
    save_state(Settings(), a_run(0), tmp_path, table, epoch=1, step=0, best=0.0, clock={})
    changed = Settings(device="cuda")
    assert load_state(changed, tmp_path, {"device"})["epoch"] == 1
    with pytest.raises(InputError, match="device: 'cuda' now, 'cpu' in"):
        load_state(changed, tmp_path, set())
    with pytest.raises(InputError, match="optimizer.lr: 0.2 now, 0.1 in"):
        load_state(Settings(optimizer=Optimizer(0.2)), tmp_path, set())


def test_a_key_of_the_distiller_that_one_of_two_lacks_is_refused_too(tmp_path):
    plain, smoothed = (Settings(distiller={"name": "mine"} | more) for more in ({}, {"label_smoothing": 0.1}))
    for before, now, words in (plain, smoothed, "0.1 now, None in"), (smoothed, plain, "None now, 0.1 in"):
        save_state(before, a_run(0), tmp_path, Table(1, "cpu"), epoch=1, step=0, best=0.0, clock={})
        with pytest.raises(InputError, match=f"distiller.label_smoothing: {words}"):
            load_state(now, tmp_path, set())


def test_a_setting_that_came_later_does_not_stop_a_run(tmp_path):
    save_state(Settings(), a_run(0), tmp_path, Table(1, "cpu"), epoch=1, step=0, best=0.0, clock={})
    state = checkpoint.load(tmp_path / "latest.pth", "name")
    del state["config"]["optimizer"]["lr"]
    checkpoint.save(tmp_path / "latest.pth", state)
    assert load_state(Settings(optimizer=Optimizer(0.2)), tmp_path, set())["epoch"] == 1


def test_a_default_of_the_distiller_is_the_same_said_or_not(tmp_path):
    for before, now in ({}, {"label_smoothing": 0.0}), ({"label_smoothing": 0.0}, {}):
        before, now = (Settings(distiller={"name": "ce"} | more) for more in (before, now))
        save_state(before, a_run(0), tmp_path, Table(1, "cpu"), epoch=1, step=0, best=0.0, clock={})
        assert load_state(now, tmp_path, set())["epoch"] == 1


@pytest.mark.parametrize("name", DISTILLERS)
def test_settings_are_the_same_read_from_the_run_s_own_file(name):
    settings = with_distiller_defaults({"distiller": {"name": name}})
    assert with_distiller_defaults(yaml.safe_load(yaml.safe_dump(settings))) == settings


def test_a_file_that_lacks_a_key_is_refused(tmp_path):
    save_state(Settings(), a_run(0), tmp_path, Table(1, "cpu"), epoch=1, step=0, best=0.0, clock={})
    whole = checkpoint.load(tmp_path / "latest.pth", "name")
    assert load_state(Settings(), tmp_path, set())["epoch"] == 1
    for key in whole.keys() - {"images", "teacher"}:  # which older files lack
        checkpoint.save(tmp_path / "latest.pth", {name: value for name, value in whole.items() if name != key})
        with pytest.raises(InputError, match=f"is corrupt or unreadable, and was left as it is .*{key}"):
            load_state(Settings(), tmp_path, set())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", {"no": "config"}, torch.ones(2), [], 3])
def test_a_corrupt_file_is_kept(tmp_path, content):
    path = tmp_path / "latest.pth"
    checkpoint.save(path, content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is corrupt or unreadable, and was left as it is"):
        load_state(Settings(), tmp_path, set())
    assert path.read_bytes() == before


def test_a_log_is_begun_or_cut_back(tmp_path):
    open_log(Settings(), tmp_path, None, 1, torch.device("cpu"))
    [header] = read_log(tmp_path / "log.jsonl")
    assert header["run"] == "run"
    for epoch in 1, 2:
        checkpoint.append(tmp_path / "log.jsonl", {"epoch": epoch})
    open_log(Settings(), tmp_path, {"epoch": 1}, 1, torch.device("cpu"))
    assert read_log(tmp_path / "log.jsonl") == [header, {"epoch": 1}]
    assert "lr: 0.1" in (tmp_path / "config.yaml").read_text()


def test_a_lock_is_one_process_s_until_it_lets_go(tmp_path):
    path = tmp_path / "new folder" / ".lock"
    code = "import pathlib, sys, utils.state; print(utils.state.lock(pathlib.Path(sys.argv[1])) is not None)"

    def another_process_gets_it():
        return subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2], text=True,
                              capture_output=True, check=True).stdout.strip() == "True"

    held = lock(path)
    assert not another_process_gets_it()
    held.close()
    assert another_process_gets_it()
    held = lock(path)  # the other's end has set it free
    assert held
