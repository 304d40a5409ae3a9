import builtins
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import checkpoint, log
from utils.errors import InputError
from utils.log import Table, environment, epoch_line, progress, read_log, tensorboard_writer, write_log

CPU = torch.device("cpu")
SIZES = [64, 64, 17]  # the images of each step


def filled(rows, steps=None, table=None, first=0):
    """A table of rows (ce, kd, cka, correct)."""
    table = table or Table(steps or len(rows), CPU)
    for step, (ce, kd, cka, correct) in enumerate(rows):
        table.write(first + step, {"ce": torch.tensor(ce, requires_grad=True), "kd": torch.tensor(kd)}, {"cka": cka},
                    torch.tensor(correct), SIZES[first + step])
    return table


ROWS = [(2.0, 0.5, 0.25, 3), (1.5, 0.25, 0.5, 10), (1.0, 4.0, 0.75, 17)]


# The table


def test_means_are_over_images_not_over_steps():
    losses = np.array([row[:3] for row in ROWS])
    expected = dict(zip(("ce", "kd", "cka"), np.average(losses, axis=0, weights=SIZES).tolist()))
    expected["train_top1"] = 100 * (3 + 10 + 17) / sum(SIZES)
    means = filled(ROWS).means()
    assert list(means) == ["ce", "kd", "cka", "train_top1"]
    assert means == pytest.approx(expected, rel=1e-6)
    assert all(type(mean) is float for mean in means.values())


def test_rows_of_two_processes_are_summed():
    both = filled(ROWS)
    both.rows += filled([(4.0, 0.5, 0.25, 64), (0.5, 1.0, 0.0, 0), (3.0, 4.0, 1.0, 1)]).rows
    assert both.means()["ce"] == pytest.approx(np.average([2, 1.5, 1, 4, 0.5, 3], weights=SIZES * 2), rel=1e-6)
    assert both.rows[:, -1].tolist() == [128, 128, 34]


def test_a_metric_that_is_not_finite_does_not_count_for_that_step():
    for value in math.nan, math.inf, -math.inf:
        rows = [(2.0, 0.5, value, 3), *ROWS[1:]]
        means = filled(rows).means()
        assert means["cka"] == pytest.approx((0.5 * 64 + 0.75 * 17) / 81, rel=1e-6)
        assert means["ce"] == filled(ROWS).means()["ce"]
        assert filled(rows).failure(3, epoch=0) == ""  # a metric may be


def test_a_metric_that_is_always_nan_is_none_and_json():
    means = filled([(ce, kd, math.nan, correct) for ce, kd, _, correct in ROWS]).means()
    assert means["cka"] is None and means["kd"] == filled(ROWS).means()["kd"]
    assert json.loads(json.dumps(means, allow_nan=False)) == means
    assert filled([(math.inf, 0.5, 0.5, 1)]).means()["ce"] is None


def test_steps_not_done_yet_count_for_nothing():
    assert filled(ROWS[:2], steps=9).means() == filled(ROWS[:2]).means()


def test_the_table_keeps_no_graph_and_is_exact():
    table = filled([(1 / 3, 1 / 7, 1 / 9, 1)] * 3)
    assert not table.rows.requires_grad and table.rows.dtype == torch.float64
    assert table.means()["cka"] == pytest.approx(1 / 9, rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_named_with_epoch_and_step(value):
    rows = [ROWS[0], (1.0, value, 0.5, 1), (value, value, 0.5, 1)]
    table = filled(rows)
    assert table.failure(1, epoch=4) == ""
    for steps in 2, 3:
        assert table.failure(steps, epoch=4) == "loss 'kd' is not finite at epoch 5, step 2"
    assert filled([(value, 1.0, 0.5, 1)]).failure(1, epoch=0) == "loss 'ce' is not finite at epoch 1, step 1"


def test_a_saved_table_goes_on_as_if_never_saved(tmp_path):
    half = filled(ROWS[:2], steps=3)
    checkpoint.save(tmp_path / "t.pth", {"names": half.names, "losses": half.num_losses, "rows": half.rows})
    restored = Table(3, CPU, checkpoint.load(tmp_path / "t.pth", "name"))
    assert (restored.names, restored.num_losses) == (half.names, 2) and torch.equal(restored.rows, half.rows)
    filled(ROWS[2:], table=restored, first=2)
    whole = filled(ROWS)
    assert torch.equal(restored.rows, whole.rows) and restored.means() == whole.means()
    assert restored.failure(3, epoch=0) == ""


def test_more_steps_than_when_it_was_saved():
    """With other processes the last batch of an epoch may be a step or not."""
    half = filled(ROWS[:2], steps=2)
    saved = {"names": half.names, "losses": half.num_losses, "rows": half.rows}
    assert filled(ROWS[2:], table=Table(3, CPU, saved), first=2).means() == filled(ROWS).means()
    assert torch.equal(Table(1, CPU, saved).rows, half.rows)


def test_batches_of_one_step_are_added_up():
    table = filled(ROWS[:1])
    filled(ROWS[1:2], table=table)  # into the same row
    assert table.images() == 128 and table.means()["ce"] == filled(ROWS[:2]).means()["ce"]
    table.clear()
    assert table.images() == 0


# The log


LINES = [{"run": "a"}, *({"epoch": epoch, "top1": 10.5 * epoch, "cka": None} for epoch in (1, 2, 3))]


def test_the_row_of_another_table_is_added():
    table = Table(2, CPU)
    for row in ROWS[:2]:
        table.add(1, filled([row]))
    assert table.rows[1].tolist() == filled(ROWS[:2]).rows.sum(0).tolist() and not table.rows[0].any()
    assert list(table.means()) == ["ce", "kd", "cka", "train_top1"] and table.failure(2, epoch=0) == ""
    table.add(0, filled([(math.nan, 0.5, 0.25, 3)]))
    assert "'ce' is not finite" in table.failure(2, epoch=0)


def test_a_log_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    write_log(path, LINES[:2])
    for line in LINES[2:]:
        checkpoint.append(path, line)
    assert read_log(path) == LINES
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in LINES)
    assert read_log(tmp_path / "nowhere.jsonl") == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    last = len(text) - len(json.dumps(LINES[-1])) - 1
    for cut in range(last, len(text) - 1):
        path.write_text(text[:cut])
        assert read_log(path) == LINES[:-1]
    for cut in len(text) - 1, len(text):
        path.write_text(text[:cut])
        assert read_log(path) == LINES
    path.write_text(text[:5])
    assert read_log(path) == []
    for damaged in b"{", b"3", b"\0\0\xff", b"":  # as by a disk: the rest is kept
        path.write_bytes(b"\n".join([damaged if i == 2 else json.dumps(line).encode() for i, line in enumerate(LINES)]))
        assert read_log(path) == [*LINES[:2], *LINES[3:]]
        path.write_bytes(b"\n".join([damaged, *(json.dumps(line).encode() for line in LINES[1:])]))
        assert read_log(path) == [{}, *LINES[1:]]
    path.write_text("")
    assert read_log(path) == []


def test_epochs_past_the_limit_are_left_out_and_the_header_stays(tmp_path):
    write_log(tmp_path / "log.jsonl", LINES)
    for epoch in range(5):
        assert read_log(tmp_path / "log.jsonl", epoch) == LINES[:epoch + 1]


def test_a_log_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    write_log(tmp_path / "log.jsonl", LINES)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(InputError, match="No space left"):
        write_log(tmp_path / "log.jsonl", [])
    assert read_log(tmp_path / "log.jsonl") == LINES


# What is said


def test_the_environment_says_versions_git_hardware_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--cfg", "yaml/a.yaml"])
    said = environment(CPU, 2)
    assert {"python", "torch", "torchvision", "numpy", "git", "hardware", "processes", "command"} == said.keys()
    assert said["torch"] == torch.__version__ and said["numpy"] == np.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", said["python"]) and said["processes"] == 2
    assert said["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", said["git"])
    assert said["hardware"].endswith(f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads")
    assert said["command"].startswith("python") and said["command"].endswith(" train_cifar.py --cfg yaml/a.yaml")
    assert json.loads(json.dumps(said)) == said


def test_the_environment_where_git_is_not_installed_or_this_is_no_repository(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment(CPU, 1)["git"] is None
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 128, "", "fatal"))
    assert environment(CPU, 1)["git"] is None


def test_the_commit_is_that_of_the_code_without_its_tags_and_says_what_is_not_in_it(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not here")

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True,
                       capture_output=True)

    (tmp_path / "log.py").touch()
    for command in "init", "add log.py", "commit -m first", "tag -a -m first v1":
        git(*command.split())
    monkeypatch.setattr(log, "__file__", str(tmp_path / "log.py"))
    clean = environment(CPU, 1)["git"]
    (tmp_path / "log.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}", clean) and environment(CPU, 1)["git"] == f"{clean}-dirty"


def test_a_line_for_people():
    entry = {"epoch": 7, "top1": 71.239, "top5": 92.5, "best_top1": 72.0, "lr": 0.05, "ce": 1.23456, "cka": None,
             "images_per_s": 12345.678}
    assert epoch_line(entry, 240) == \
        "epoch 7/240: top-1 71.24 top-5 92.50 | lr 0.05 ce 1.235 images_per_s 1.235e+04"
    assert "\n" not in epoch_line(entry, 240)


def test_no_progress_bar_where_the_output_is_no_terminal_or_tqdm_is_missing(monkeypatch):
    steps = range(3)
    assert progress(steps, "epoch") is steps
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert progress(steps, "epoch") is steps


def test_without_tensorboard_a_run_goes_on_with_a_line(monkeypatch, capsys, tmp_path):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert tensorboard_writer(tmp_path) is None
    assert "TensorBoard is not installed" in capsys.readouterr().err


def test_a_processor_without_a_model_name_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(log.Path, "read_text", lambda self: "processor : 0\n")
    assert environment(CPU, 1)["hardware"].endswith(" threads")
