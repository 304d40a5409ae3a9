"""From a list of runs to a table: utils/run_list.py and utils/report.py."""

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import train_cifar
from utils import report, run_list
from utils.config import flatten, load_config, yaml_text
from utils.state import with_distiller_defaults

ROOT = Path(__file__).parents[2]
RUN = "yaml/ce_plaincnn2.yaml epochs=2 data.name=synthetic data.samples=300 device=cpu"


@pytest.fixture
def listed(tmp_path):
    """A list of a section with two runs and two seeds, and the folder of its results."""
    sections = {"small": {"title": "A small section", "seeds": [0, 1], "published": {"second": 70.66},
                          "runs": {"first": RUN, "second": f"{RUN} optimizer.lr=0.01"}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/runs.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "results/runs.yaml"


def write_run(results, name, accuracies, epochs=None):
    (results / name).mkdir(parents=True, exist_ok=True)
    header = {"run": name, "hardware": "a machine", "git": "0123456789-dirty"}
    entries = [{"epoch": i + 1, "top1": top1, "best_top1": max(accuracies[: i + 1]), "seconds": 1800.0,
                "cka_2": 0.5, "ratio_2": 0.5} for i, top1 in enumerate(accuracies)]
    (results / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *entries]))
    (results / name / "config.yaml").write_text(
        yaml.safe_dump({"epochs": epochs or len(accuracies), "distiller": {"name": "ce"}}))


@contextlib.contextmanager
def held_by_another_process(path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as other:
        other.stdout.readline()
        yield
        other.communicate(b"\n")


def test_runs_are_taken_one_after_the_other_and_leave_their_logs(listed, tmp_path, capfd):
    arguments = [str(listed), f"--runs={tmp_path / 'runs'}"]
    assert run_list.main([*arguments, "--seconds=10"]) == 0  # too few left, or a first run and a bit of the next
    assert run_list.main(arguments) == 0
    out = capfd.readouterr().out
    order = [out.index(f"name=small_{run}") for run in ("first_s0", "second_s0", "first_s1", "second_s1")]
    assert order == sorted(order) and "all runs of the list are finished" in out
    for run in "first_s0", "second_s0", "first_s1", "second_s1":
        folder = tmp_path / "results" / f"small_{run}"
        assert run_list.finished(folder)
        assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "log.jsonl"]
    assert run_list.main(arguments) == 0
    assert "train_cifar.py" not in capfd.readouterr().out
    text = report.report(listed, drawn=False)
    assert "not run" not in text and text.count("| 2 |") == 2


def test_a_run_that_fails_is_not_passed_over(listed, tmp_path, capfd):
    assert run_list.main([str(listed), f"--runs={tmp_path / 'runs'}", "optimizer.lr=-1"]) == 2
    assert "optimizer.lr" in capfd.readouterr().err


def test_a_run_that_another_process_is_at_is_passed_over(listed, tmp_path, capfd):
    (tmp_path / "runs").mkdir()
    listed.write_text(listed.read_text().replace("epochs=2", "epochs=1"))
    with held_by_another_process(tmp_path / "runs/small_first_s0.lock"):
        assert run_list.main([str(listed), f"--runs={tmp_path / 'runs'}"]) == 0
    out = capfd.readouterr().out
    assert "name=small_first_s0" not in out and "name=small_second_s1" in out


def test_the_table_says_mean_deviation_and_what_was_not_run(listed):
    write_run(listed.parent, "small_second_s0", [71.0, 70.0])
    write_run(listed.parent, "small_second_s1", [69.0, 68.0])
    write_run(listed.parent, "small_first_s0", [10.0], epochs=2)  # not finished
    lines = report.report(listed, drawn=False).splitlines()
    assert "| first | not run | 0 |  | – |  |  |  |" in lines
    assert "| second | 69.00 ± 1.41 | 2 | 70.00 ± 1.41 | 70.66 | 1 h 00 min | a machine | 0123456-dirty |" in lines
    assert any(line.startswith("python train_cifar.py --cfg yaml/ce_plaincnn2.yaml") for line in lines)
    sections = yaml.safe_load(listed.read_text())
    del sections["small"]["published"]
    listed.write_text(yaml.safe_dump(sections, sort_keys=False))
    lines = report.report(listed, drawn=False).splitlines()
    assert "| run | top-1 | n | best epoch | time a run | machine | commit |" in lines
    assert "| second | 69.00 ± 1.41 | 2 | 70.00 ± 1.41 | 1 h 00 min | a machine | 0123456-dirty |" in lines


def test_figures_where_matplotlib_is_installed(listed):
    pytest.importorskip("matplotlib")
    write_run(listed.parent, "small_first_s0", [10.0, 70.0])
    write_run(listed.parent, "small_second_s0", [10.0, 71.0])
    text = report.report(listed)
    for kind in "accuracy", "ratio":
        assert (listed.parent / f"small_{kind}.png").stat().st_size > 5000 and f"](small_{kind}.png)" in text
    shutil.rmtree(listed.parent / "small_second_s0")  # one line is left, which is no figure
    assert "small_accuracy.png" not in report.report(listed) and not (listed.parent / "small_accuracy.png").exists()


def test_student_over_teacher():
    section = {"teachers": {"plaincnn4": 40.0, "plaincnn10": 50.0}}
    logs = {key: [[{}, {"epoch": 1, "top1": top1}]] for key, top1 in
            [("kd_plaincnn10", 31.0), ("kd_plaincnn4", 30.0), ("dpk_plaincnn4", 33.0)]}
    _, panels = report.curves(section, logs)["teachers"]
    assert panels == {"": {"kd": [((40.0, 50.0), (30.0, 31.0), "o-")],  # from left to right
                           "dpk": [((40.0,), (33.0,), "o-")]}}
    logs["kd_plaincnn4"].append([{}, {"epoch": 1, "top1": 32.0}])
    lines = report.curves(section, logs)["teachers"][1][""]["kd"]
    assert lines == [((40.0, 50.0), (31.0, 31.0), "o-"), ((40.0, 40.0), (30.0, 32.0), "-")]  # the mean; worst to best
    assert report.curves(section, logs)["accuracy"][1][""]["kd_plaincnn4"] == [([1], [30.0], "-")]  # the first seed's


def test_teachers_of_one_accuracy_and_methods_with_an_underscore():
    section = {"teachers": {"a": 50.0, "b": 50.0, "wide_b": 60.0}}
    logs = {key: [[{}, {"epoch": 1, "top1": top1}]] for key, top1 in
            [("kd_a", 30.0), ("kd_b", 40.0), ("dpk_small_b", 41.0), ("kd_wide_b", 42.0), ("a", 1.0)]}
    assert report.curves(section, logs)["teachers"][1] == {"": {
        "kd": [((50.0, 50.0, 60.0), (30.0, 40.0, 42.0), "o-")], "dpk_small": [((50.0,), (41.0,), "o-")]}}
    assert report.by_teacher(Path(), section, logs)[4:-1] == [
        "| a | 50.00 | 30.00 | – |", "| b | 50.00 | 40.00 | 41.00 |", "| wide_b | 60.00 | 42.00 | – |"]


def test_a_cka_without_a_ratio_is_drawn():
    panels = report.curves({}, {"mine": [[{}, {"epoch": 1, "top1": 1.0, "cka_3": 0.5}]]})["ratio"][1]
    assert panels == {"stage 3": {"mine": [([1], [0.5], "-")]}}


def test_cka_and_ratio_have_a_panel_a_stage():
    log = [{}, *({"epoch": i, "top1": 1.0, "cka_1": 0.1 * i, "ratio_1": 0.9, "cka_2": 0.5, "ratio_2": 0.5}
                 for i in (1, 2))]
    _, panels = report.curves({}, {"dpk": [log], "kd": [[{}, {"epoch": 1, "top1": 1.0}]]})["ratio"]
    assert panels["stage 1"] == {"dpk": [([1, 2], [0.1, 0.2], "-"), ([1, 2], [0.9, 0.9], "--")]}
    assert list(panels) == ["stage 1", "stage 2"]


def test_students_by_teacher_and_method(tmp_path):
    section = {"teachers": {"plaincnn4": 40.0, "plaincnn10": None}}
    logs = {"alone": [[{}, {"top1": 29.0}]], "kd_plaincnn4": [[{}, {"top1": 30.0}], [{}, {"top1": 32.0}]],
            "kd_plaincnn10": [], "dpk_plaincnn10": [[{}, {"top1": 33.0}]]}
    lines = report.by_teacher(tmp_path, section, logs)
    assert lines[2:] == ["| teacher | top-1 | kd | dpk |", "|---|---|---|---|",
                         "| plaincnn4 | 40.00 | 31.00 ± 1.41 | – |", "| plaincnn10 | not run | not run | 33.00 |", ""]
    assert report.by_teacher(tmp_path, {}, logs) == []
    entry = {"cka_before": [0.1, 0.25], "cka_after": [0.3, 0.5], "probe_top1": 12.0}
    (tmp_path / "r.jsonl").write_text("".join(
        json.dumps(entry | {"teacher": teacher}) + "\n" for teacher in ("plaincnn10", "plaincnn4", "resnet20")))
    lines = report.by_teacher(tmp_path, section | {"ranking": "r.jsonl"}, logs)
    assert lines[4:-1] == ["| plaincnn10 | not run | 0.25 to 0.50 | 12.00 | not run | 33.00 |",
                           "| plaincnn4 | 40.00 | 0.25 to 0.50 | 12.00 | 31.00 ± 1.41 | – |"]
    (tmp_path / "r.jsonl").write_text(json.dumps(entry | {"teacher": "plaincnn10"}) + "\n")
    lines = report.by_teacher(tmp_path, section | {"ranking": "r.jsonl"}, logs)
    assert lines[5] == "| plaincnn4 | 40.00 | – | – | 31.00 ± 1.41 | – |"  # not ranked, and there all the same
    odd = [{"teacher": "vgg8"}, {"teacher": "plaincnn4", "cka_after": []}]
    for text in "", "{", '{"teacher": "plaincnn4"}', *(json.dumps(entry | changes) for changes in odd):
        (tmp_path / "r.jsonl").write_text(text)
        with pytest.raises(ValueError, match="r.jsonl"):
            report.by_teacher(tmp_path, section | {"ranking": "r.jsonl"}, logs)


def test_first_seeds_come_first_in_all_sections():
    sections = {"a": {"seeds": [3, 5], "runs": {"x": "x.yaml", "y": "y.yaml"}}, "b": {"runs": {"z": "z.yaml"}}}
    runs = [run for run, _ in run_list.in_turn(sections)]
    assert runs == ["a_x_s3", "a_y_s3", "b_z_s0", "a_x_s5", "a_y_s5"]


@pytest.fixture
def teacher_and_student(tmp_path, monkeypatch):
    """A list in which a run teaches another, and a train_cifar.py that does nothing but to leave its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_list, "__file__", str(tmp_path / "utils/run_list.py"))
    sections = {"teachers": {"title": "T", "runs": {"t": "t.yaml"}},
                "students": {"title": "S", "runs": {"s": "s.yaml teacher.checkpoint=runs/teachers_t_s0/student.pth"}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/runs.yaml").write_text(yaml.safe_dump(sections))
    for name in "tso":
        (tmp_path / f"{name}.yaml").write_text("epochs: 2")
    trained = []

    def fake(command, folder):
        name, runs = (next(a for a in command if a.startswith(key)).removeprefix(key) for key in ("name=", "runs="))
        trained.append(name)
        write_run(folder / runs, name, [1.0, 2.0])
        (folder / runs / name / "student.pth").touch()
        return 0, False

    monkeypatch.setattr(run_list, "train", fake)
    return trained


def test_a_teacher_without_weights_is_trained_again_and_its_results_are_kept(teacher_and_student, tmp_path):
    write_run(tmp_path / "results", "teachers_t_s0", [40.0, 50.0])
    assert run_list.main(["results/runs.yaml", "--only=students"]) == 0
    assert teacher_and_student == ["teachers_t_s0", "students_s_s0"]
    assert '"top1": 50.0' in (tmp_path / "results/teachers_t_s0/log.jsonl").read_text()
    assert run_list.main(["results/runs.yaml"]) == 0
    assert teacher_and_student == ["teachers_t_s0", "students_s_s0"]  # and not once more


def add_another_run():
    """other_o_s0 to the list of teacher_and_student, before theirs."""
    sections = yaml.safe_load(Path("results/runs.yaml").read_text())
    sections["other"] = {"title": "O", "runs": {"o": "o.yaml"}}
    Path("results/runs.yaml").write_text(yaml.safe_dump(sections))


def test_a_teachers_teacher_is_trained_again_too(teacher_and_student, tmp_path):
    runs = {"a": "t.yaml", "b": "t.yaml teacher.checkpoint=runs/x_a_s0/student.pth",
            "c": "t.yaml teacher.checkpoint=runs/x_b_s0/student.pth",
            "d": "t.yaml teacher.checkpoint=runs/x_d_s0/student.pth"}  # its own, which nobody can make
    (tmp_path / "results/runs.yaml").write_text(yaml.safe_dump({"x": {"title": "T", "runs": runs}}))
    for name, teacher in ("x_a_s0", ""), ("x_b_s0", "runs/x_a_s0/student.pth"):
        write_run(tmp_path / "results", name, [1.0, 2.0])
        (tmp_path / "results" / name / "config.yaml").write_text(yaml.safe_dump(
            {"epochs": 2, "teacher": {"checkpoint": teacher}, "distiller": {"name": "ce"}}))
    assert run_list.main(["results/runs.yaml"]) == 0
    assert teacher_and_student == ["x_a_s0", "x_b_s0", "x_c_s0"]


def test_runs_may_be_kept_elsewhere(teacher_and_student, tmp_path):
    assert run_list.main(["results/runs.yaml", "--only=students", "--runs=elsewhere"]) == 0
    assert teacher_and_student == ["teachers_t_s0", "students_s_s0"] and not (tmp_path / "runs").exists()


def test_runs_may_be_kept_at_home(teacher_and_student, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_list.main(["results/runs.yaml", "--runs=~/mine"]) == 0  # no shell's ~, behind a =
    assert (tmp_path / "home/mine/students_s_s0/student.pth").exists() and not (tmp_path / "~").exists()


def test_every_run_gets_the_overrides_last_and_the_time_that_is_left(teacher_and_student, monkeypatch):
    fake, commands = run_list.train, []
    monkeypatch.setattr(run_list, "train", lambda command, folder: (commands.append(command), fake(command, folder))[1])
    monkeypatch.setattr(run_list, "time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    assert run_list.main(["results/runs.yaml", "--only=students,teachers", "--seconds=100", "device=cpu"]) == 0
    assert teacher_and_student == ["teachers_t_s0", "students_s_s0"]
    assert [command[-2:] for command in commands] == [["device=cpu", f"stop_after={left}"] for left in (90, 80)]


def test_the_last_teacher_counts():
    assert run_list.teacher_file(["teacher.checkpoint=a", "teacher.checkpoint=b", "epochs=1"]) == "b"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_for_the_run(tmp_path, number):
    """SIGTERM is passed on; Ctrl-C comes from the terminal, and here not at all."""
    (tmp_path / "run.py").write_text("import os, signal, sys, time\n"
                                     "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
                                     f"os.kill(os.getppid(), {number:d})\n"
                                     "time.sleep(0.1 if sys.argv[1:] else 60)\n")
    before = signal.getsignal(number)
    command = [sys.executable, "run.py", *(["short"] if number == signal.SIGINT else [])]
    assert run_list.train(command, tmp_path) == (7 if number == signal.SIGTERM else 0, True)
    assert signal.getsignal(number) == before
    assert run_list.train([sys.executable, "-c", ""], tmp_path) == (0, False)


def test_no_further_run_after_a_signal(teacher_and_student, tmp_path, monkeypatch):
    fake = run_list.train
    monkeypatch.setattr(run_list, "train", lambda *arguments: (fake(*arguments)[0], True))
    assert run_list.main(["results/runs.yaml"]) == 0
    assert teacher_and_student == ["teachers_t_s0"] and run_list.finished(tmp_path / "results/teachers_t_s0")


@pytest.mark.parametrize("code", [0, 1, 3, 130, -signal.SIGTERM])
def test_no_further_run_after_a_signal_however_this_one_ended(teacher_and_student, monkeypatch, code, capsys):
    add_another_run()
    calls = []
    monkeypatch.setattr(run_list, "train", lambda *arguments: calls.append(arguments) or (code, True))
    assert run_list.main(["results/runs.yaml"]) == (code == 1) and len(calls) == 1
    out = capsys.readouterr().out
    assert ("failed: " in out) == (code == 1) and "all runs of the list" not in out


def test_a_failed_run_is_named_where_time_is_up_before_the_list_ends(teacher_and_student, monkeypatch, capsys):
    add_another_run()
    codes = iter([1, 0])  # the second one stops in time, not finished
    monkeypatch.setattr(run_list, "train", lambda *arguments: (next(codes), False))
    assert run_list.main(["results/runs.yaml", "--seconds", "540"]) == 1
    out = capsys.readouterr().out
    assert "failed: other_o_s0\n" in out and "all runs of the list" not in out


def test_a_failed_run_is_named_where_a_wrong_one_ends_the_list(teacher_and_student, monkeypatch, capsys):
    add_another_run()
    codes = iter([1, 2])
    monkeypatch.setattr(run_list, "train", lambda *arguments: (next(codes), False))
    assert run_list.main(["results/runs.yaml"]) == 2
    printed = capsys.readouterr()
    assert "failed: other_o_s0\n" in printed.out and "teachers_t_s0 ended with 2" in printed.err


def test_no_run_begins_with_fewer_than_30_seconds_left(teacher_and_student, monkeypatch, capsys):
    monkeypatch.setattr(run_list, "time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    assert run_list.main(["results/runs.yaml", "--seconds=45"]) == 0  # 35 left, then 25
    assert teacher_and_student == ["teachers_t_s0"]
    assert "out of time before students_s_s0" in capsys.readouterr().out


def test_a_mistake_is_found_before_the_first_run(teacher_and_student, capsys):
    sections = yaml.safe_load(Path("results/runs.yaml").read_text())
    sections["last"] = {"title": "L", "runs": {"l": "o.yaml optimiser.lr=0.1"}}
    Path("results/runs.yaml").write_text(yaml.safe_dump(sections))
    assert run_list.main(["results/runs.yaml"]) == 2 and not teacher_and_student
    error = capsys.readouterr().err
    assert error.startswith("error: results/runs.yaml: last_l_s0: o.yaml: optimiser") and "nearest: optimizer" in error
    for setting, words in (("'distiller={name: dpk, stages: [{student: 9}]}'", "the student has no map 9"),
                           ("distiller.name=kd", "teacher.checkpoint: nowhere.pth is missing"),
                           ("distiller.name=kd 'teacher={name: resnet8, checkpoint: runs/teachers_t_s0/student.pth}'",
                            "teacher.checkpoint: this list makes runs/teachers_t_s0/student.pth; valid: ")):
        teacher = "" if "teacher=" in setting else "teacher.name=resnet8 teacher.checkpoint=nowhere.pth"
        sections["last"]["runs"]["l"] = f"o.yaml {setting} {teacher}"
        Path("results/runs.yaml").write_text(yaml.safe_dump(sections))
        assert run_list.main(["results/runs.yaml"]) == 2 and not teacher_and_student
        error = capsys.readouterr().err
        assert error.startswith("error: results/runs.yaml: last_l_s0: o.yaml: ") and words in error


def test_results_that_cannot_be_written_are_said_to_be_kept(teacher_and_student, tmp_path, capsys):
    (tmp_path / "results/teachers_t_s0").touch()  # a file in the folder's place
    assert run_list.main(["results/runs.yaml"]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and str(tmp_path / "runs/teachers_t_s0") in error and error.count("\n") == 1


def test_a_student_waits_for_a_teacher_that_another_process_trains(teacher_and_student, tmp_path):
    (tmp_path / "runs").mkdir()
    with held_by_another_process(tmp_path / "runs/teachers_t_s0.lock"):
        assert run_list.main(["results/runs.yaml"]) == 0
    assert teacher_and_student == []


def test_a_loss_that_is_not_finite_leaves_the_other_runs_alone(teacher_and_student, monkeypatch, capsys):
    fake = run_list.train
    codes = {"teachers_t_s0": 1, "other_o_s0": 0}
    add_another_run()

    def train(command, folder):
        code = codes[next(a for a in command if a.startswith("name=")).removeprefix("name=")]
        return (code, False) if code else fake(command, folder)

    monkeypatch.setattr(run_list, "train", train)
    assert run_list.main(["results/runs.yaml"]) == 1
    assert teacher_and_student == ["other_o_s0"] and "failed: teachers_t_s0" in capsys.readouterr().out
    codes["teachers_t_s0"] = 2  # bad input, most likely that of all runs
    assert run_list.main(["results/runs.yaml"]) == 2
    assert "error: results/runs.yaml: teachers_t_s0 ended with 2" in capsys.readouterr().err


def test_a_run_whose_teacher_another_process_trains_is_passed_over(teacher_and_student, monkeypatch):
    fake, codes = run_list.train, iter([3, 0])
    monkeypatch.setattr(run_list, "train", lambda *arguments: (3, False) if next(codes) else fake(*arguments))
    Path("results/runs.yaml").write_text("a: {title: A, runs: {b: t.yaml, c: o.yaml}}")
    assert run_list.main(["results/runs.yaml"]) == 0
    assert teacher_and_student == ["a_c_s0"]


@pytest.mark.parametrize("text, words", [
    ("- 1", "mapping"), ("a: 3", "needs title and runs"), ("a: {title: b, runs: {}, sedes: [1]}", "may have common"),
    ("a: {title: b, runs: [x.yaml]}", "a: runs: not a mapping"),
    ("a: {title: b, runs: {}, seeds: 3}", "seeds: 3 is not a list of integers"),
    ("a: {title: b, runs: {}, seeds: [a]}", "seeds: .'a'. is not a list of integers"),
    ("a: {title: b, runs: {c/d: x.yaml}}", "a: c/d: a / in a name"),
    ("a: {title: 2020-13-45, runs: {}}", "runs.yaml: month must be"),
    ("[" * 3000, "runs.yaml: "),
    ("a: {title: b, runs: {}, common: epochs=1}", "common: not a list"),
    ("a: {title: b, runs: {c: \"x.yaml 'd\"}}", "a: runs: not a mapping"),
    ("a: {title: b, runs: {c: ''}}", "a: runs: not a mapping"),
    ("a: {title: b, runs: {c: }}", "a: runs: not a mapping"),
    ("a: {title: b, runs: {}, teachers: [c]}", "teachers: not a mapping"),
    ("a: {title: b, runs: {}, ranking: x}", "ranking needs teachers"),
    ("a: {title: b, runs: {}, ranking: 3, teachers: {c: d}}", "a: ranking: 3"),
    ("a: {title: b, runs: {}, teachers: {c: 3}}", "teachers: not a mapping"),
    ("a: {title: b, runs: {}, text: }", "a: text: None"),
    ("a: {title: b, runs: {}, published: [1]}", "a: published"),
    ("a: {title: b, runs: {0.5: x.yaml}}", "a: 0.5 is not a name"),
    ("2024: {title: b, runs: {}}", "2024 is not a name"),
    ("a: {title: b, runs: {}, runs: {c: x.yaml}}", "runs is there twice"),
    ("a: {title: b, runs: {b_c: x.yaml}}\na_b: {title: b, runs: {c: x.yaml}}", "two runs are called a_b_c_s0")])
def test_a_bad_list_names_the_section(tmp_path, text, words):
    (tmp_path / "runs.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        run_list.load_list(tmp_path / "runs.yaml")


@pytest.mark.parametrize("program", [run_list, report])
@pytest.mark.parametrize("text, words", [(None, "No such file"), ("a: 3", "a: needs title"), ("a: [", "line 1")])
def test_a_bad_list_ends_with_a_line(program, tmp_path, text, words, capsys):
    if text:
        (tmp_path / "runs.yaml").write_text(text)
    assert program.main([str(tmp_path / "runs.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error and "runs.yaml" in error


def test_results_of_other_settings_are_not_those_of_the_list(listed, capsys):
    write_run(listed.parent, "small_second_s0", [1.0, 70.0])
    for program in run_list, report:
        listed.write_text(listed.read_text().replace("epochs=2", "epochs=3"))
        assert program.main([str(listed)]) == 2
        assert "small_second_s0 is of another run: epochs is 2 there, 3 was asked for" in capsys.readouterr().err
    (listed.parent / "small_second_s0/config.yaml").write_text(
        "{epochs: 2, teacher: {checkpoint: /tmp/a/b.pth}, distiller: {name: ce}}")
    arguments = ["--cfg", "yaml/ce_plaincnn2.yaml", "epochs=2"]
    run_list.check_results(listed.parent / "small_second_s0", [*arguments, "teacher.checkpoint=runs/a/b.pth"], ROOT)
    with pytest.raises(ValueError, match="distiller.label_smoothing is 0.0 there, 0.1 was asked for"):
        run_list.check_results(listed.parent / "small_second_s0", [*arguments, "distiller.label_smoothing=0.1"], ROOT)
    with pytest.raises(ValueError, match="teacher.checkpoint"):
        run_list.check_results(listed.parent / "small_second_s0", [*arguments, "teacher.checkpoint=runs/c/b.pth"], ROOT)


def test_results_of_other_overrides_are_not_those_asked_for(teacher_and_student, tmp_path, capsys):
    write_run(tmp_path / "results", "teachers_t_s0", [1.0, 70.0])
    sections = yaml.safe_load(Path("results/runs.yaml").read_text())
    sections["teachers"]["common"] = ["epochs=3"]
    Path("results/runs.yaml").write_text(yaml.safe_dump(sections))
    assert run_list.main(["results/runs.yaml"]) == 2
    assert "teachers_t_s0 is of another run: epochs is 2 there, 3 was asked for" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["epochs=3", "seed=1", "name=mine", "optimizer.lr=9", "runs=mine", "nonsense"])
def test_settings_that_change_results_belong_in_the_list(teacher_and_student, capsys, override):
    assert run_list.main(["results/runs.yaml", override]) == 2 and not teacher_and_student
    error = capsys.readouterr().err
    assert f"error: {override}: valid here: baseline, " in error and error.endswith("belongs in the list\n")


@pytest.mark.parametrize("code, signalled, returned", [
    (130, True, 0), (-2, True, 0), (-15, True, 0), (-15, False, -15), (-9, True, -9),
])
def test_a_signal_before_there_is_anything_to_save(teacher_and_student, monkeypatch, code, signalled, returned):
    monkeypatch.setattr(run_list, "train", lambda *arguments: (code, signalled))
    assert run_list.main(["results/runs.yaml"]) == returned


def test_settings_in_results_that_are_none_are_named(listed, capsys):
    write_run(listed.parent, "small_second_s0", [1.0, 70.0])
    for content in "<<<<<<< HEAD\nepochs: 2\n", "seed: 0\n", "- epochs\n":
        (listed.parent / "small_second_s0/config.yaml").write_text(content)
        for program in run_list, report:
            assert program.main([str(listed)]) == 2
            error = capsys.readouterr().err
            assert "small_second_s0/config.yaml" in error and error.count("\n") == 1


def test_another_readme_is_not_written_over(listed, capsys):
    page = listed.parent / "README.md"
    page.write_text("# Mine\n")
    assert report.main([str(listed)]) == 2
    assert "README.md is not of utils.report" in capsys.readouterr().err and page.read_text() == "# Mine\n"
    page.unlink()
    assert report.main([str(listed)]) == 0 == report.main([str(listed)])  # its own it writes again


def test_an_unknown_section_is_named(listed, capsys):
    assert run_list.main([str(listed), "--only=smal"]) == 2
    assert capsys.readouterr().err == f"error: {listed}: no section 'smal'; valid: small\n"


@pytest.mark.parametrize("path", ["results/runs.yaml", "results/full/runs.yaml"])
def test_every_run_of_our_lists_is_valid(path):
    names = []
    for name, section in run_list.load_list(ROOT / path).items():
        for run, _, seed, (_, cfg, *overrides) in run_list.runs_of(name, section):
            names.append(run)
            settings = load_config(train_cifar.Settings, ROOT / cfg, overrides)
            assert (settings.name, settings.seed) == (run, seed)
            if seed == 0 and "full" not in path:  # those are the YAML files as they are, which another test builds
                train_cifar.read_settings(ROOT / cfg, overrides)
            teacher = run_list.teacher_file(overrides) or settings.teacher.checkpoint
            if settings.distiller["name"] != "ce":  # made by an earlier run of the list, or a file that we have
                assert teacher in {f"runs/{run}/student.pth" for run in names} or (ROOT / teacher).is_file()
        for teacher in section.get("teachers", {}).values():
            assert teacher in names  # trained before
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", ["results", "results/full"])
def test_the_tables_follow_from_the_logs(tmp_path, folder):
    shutil.copytree(ROOT / folder, tmp_path / "copy")
    assert report.report(tmp_path / "copy/runs.yaml", drawn=False) == (ROOT / folder / "README.md").read_text()


@pytest.mark.parametrize("folder", ["results", "results/full"])
def test_the_logs_are_of_the_runs_that_the_list_names(folder):
    for name, section in run_list.load_list(ROOT / folder / "runs.yaml").items():
        for run, _, _, (_, cfg, *overrides) in run_list.runs_of(name, section):
            if run_list.finished(ROOT / folder / run):
                listed = yaml.safe_load(yaml_text(load_config(train_cifar.Settings, ROOT / cfg, overrides)))
                logged = yaml.safe_load((ROOT / folder / run / "config.yaml").read_text())
                listed, logged = (flatten(with_distiller_defaults(settings)) for settings in (listed, logged))
                different = {key for key in listed.keys() | logged.keys() if listed.get(key) != logged.get(key)}
                assert different <= {"data.root", "runs", "device", "stop_after", "save_every", "cuda_graph"}, run
