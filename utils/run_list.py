"""Take the first unfinished run of a list, again and again, within a time budget: in a queue, or on a borrowed machine.

    python -m utils.run_list results/runs.yaml [--seconds 540] [--only gap,methods] [key.sub=value ...]

The list is a YAML file of sections: `title`, `text`, `common` overrides, `seeds`, and `runs`, a mapping of names to a
YAML file with overrides of its own; `published` figures of runs; `teachers` and `ranking`, for utils/report.py. In the
order of the list, the first seed of every run before the second of any. Overrides on the command line (data.root=…,
device=…) are for every run. A run that is finished leaves its log and its settings in a folder beside the list; the
next call goes on with an unfinished one where it was left, as after Ctrl-C or SIGTERM. A teacher of which only the
results are there, not the weights, is trained again. A run that fails by itself (a loss that is not finite, no GPU
memory left) is passed over, and named at the end. Several processes may share a list: each passes over the runs that
others are working on, and those that need them as teachers.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

import train_cifar
from utils import checkpoint, engine
from utils.config import NumberLoader, load_config
from utils.errors import InputError, one_line
from utils.log import read_log
from utils.state import differences, lock

FOR_EVERY_RUN = sorted(train_cifar.NOT_PART_OF_A_RUN - {"runs"})  # overrides of the command line; runs is --runs
KEYS = {"title", "text", "common", "seeds", "runs", "published", "teachers", "ranking"}


def is_command(text):
    """Whether this is a YAML file with overrides, as a shell would read it."""
    try:
        return isinstance(text, str) and bool(shlex.split(text))
    except ValueError:  # an open quote
        return False


def load_list(path):
    """{section: dict} of a list. Raises ValueError, a line that names the file, the section and the key."""
    try:
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), NumberLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path}: not a mapping of sections")
    for name, section in sections.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is not a name; in quotes it is")
        if not isinstance(section, dict) or not {"title", "runs"} <= set(section) or set(section) - KEYS:
            raise ValueError(f"{path}: {name}: needs title and runs, may have {', '.join(sorted(KEYS))}")
        seeds = section.get("seeds", [0])
        if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise ValueError(f"{path}: {name}: seeds: {seeds!r} is not a list of integers from 0 on")
        if "ranking" in section and not section.get("teachers"):
            raise ValueError(f"{path}: {name}: ranking needs teachers")
        if not isinstance(section["runs"], dict) or not all(map(is_command, section["runs"].values())):
            raise ValueError(f"{path}: {name}: runs: not a mapping of names to a YAML file and overrides")
        for key, kind in ("title", str), ("text", str), ("ranking", str), ("published", dict):
            if not isinstance(section.get(key, kind()), kind):
                raise ValueError(f"{path}: {name}: {key}: {section[key]!r} is not a {kind.__name__}")
        common, teachers = section.get("common", []), section.get("teachers", {})
        if not isinstance(common, list) or not all(isinstance(text, str) for text in common):
            raise ValueError(f"{path}: {name}: common: not a list of overrides")
        if not isinstance(teachers, dict) or not all(isinstance(run, str) for run in teachers.values()):
            raise ValueError(f"{path}: {name}: teachers: not a mapping of names to runs")
        for key in (*section["runs"], *teachers):
            if not isinstance(key, str):
                raise ValueError(f"{path}: {name}: {key!r} is not a name; in quotes it is")
            if "/" in f"{name}{key}":
                raise ValueError(f"{path}: {name}: {key}: a / in a name, which is to be a folder's")
    names = [run for run, _ in in_turn(sections)]
    for run in names:
        if names.count(run) > 1:
            raise ValueError(f"{path}: two runs are called {run}")
    return sections


def runs_of(name, section):
    """[(name of the run, its key, seed, arguments of train_cifar.py)], the first seed of all runs first."""
    runs = []
    for seed in section.get("seeds", [0]):
        for key, text in section["runs"].items():
            cfg, *overrides = shlex.split(text)
            run = f"{name}_{key}_s{seed}"
            runs.append((run, key, seed, ["--cfg", cfg, *section.get("common", []), *overrides, f"seed={seed}",
                                          f"name={run}"]))
    return runs


def in_turn(sections):
    """[(name of the run, its arguments)], section by section, the first seed of all before the second of any."""
    runs = [(section.get("seeds", [0]).index(seed), run, arguments) for name, section in sections.items()
            for run, _, seed, arguments in runs_of(name, section)]
    return [(run, arguments) for _, run, arguments in sorted(runs, key=lambda entry: entry[0])]


def saved_settings(folder):
    """The settings of the run in the folder, as a dict. Raises ValueError, a line that names their file."""
    try:
        settings = yaml.load((folder / "config.yaml").read_text(), NumberLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{folder}/config.yaml: {one_line(error)}") from None
    if not isinstance(settings, dict) or "epochs" not in settings:
        raise ValueError(f"{folder}/config.yaml: not the settings of a run")
    return settings


def finished(folder):
    """Whether the folder holds the log and the settings of a run that reached its last epoch."""
    lines = read_log(folder / "log.jsonl")
    return (len(lines) > 1 and (folder / "config.yaml").exists()
            and lines[-1]["epoch"] == saved_settings(folder)["epochs"])


def check_results(folder, arguments, root):
    """Raise ValueError, a line, where the results in the folder are of another run than that of the arguments."""
    _, cfg, *overrides = arguments
    try:
        asked = load_config(train_cifar.Settings, root / cfg, overrides)
        engine.check_distiller(asked)
    except InputError as error:
        raise ValueError(f"{folder}: {cfg}: {error}") from None
    asked = dataclasses.asdict(asked)
    for key, wanted, found in differences(asked, saved_settings(folder), train_cifar.NOT_PART_OF_A_RUN):
        if key == "teacher.checkpoint" and Path(wanted).parts[-2:] == Path(found).parts[-2:]:
            continue  # the runs may have been kept elsewhere
        raise ValueError(f"{folder} is of another run: {key} is {found} there, {wanted} was asked for; move it away, "
                         "or give the run another name (what is to change all runs of a list belongs under common: "
                         "there)")


def teacher_file(arguments):
    """The file in which a run looks for its teacher, where its arguments say so; else ""."""
    return next((a.partition("=")[2] for a in reversed(arguments) if a.startswith("teacher.checkpoint=")), "")


def unfinished(runs, makers, results, root, overrides=()):
    """Those of `runs` that left no results, each behind the runs that make its teacher, where that file is missing.

    makers: {file: (run, arguments)}. Results come with the code, weights do not. Raises ValueError for results of
    another run of that name.
    """
    queue = []

    def add(run, arguments, waiting=()):
        maker = makers.get(teacher_file(arguments))
        if maker and not (root / teacher_file(arguments)).exists() and maker[0] not in waiting:
            add(*maker, (*waiting, run))
        if (run, arguments) not in queue:
            queue.append((run, arguments))

    for run, arguments in runs:
        if finished(results / run):
            check_results(results / run, [*arguments, *overrides], root)
        else:
            add(run, arguments)
    return queue


def check(path, queue, makers, root, overrides=()):
    """Raise ValueError, a line that names the list `path`, the run, the YAML file and the key, where one of the queue
    could not begin.
    """
    checked = []
    for run, (_, cfg, *own) in queue:
        own = [a for a in (*own, *overrides) if not a.startswith(("seed=", "name="))]
        if (cfg, own) in checked:
            continue
        checked.append((cfg, own))
        try:
            asked = train_cifar.read_settings(root / cfg, own)
            teacher = asked.teacher.checkpoint
            if teacher not in makers:
                train_cifar.check_teacher_file(asked)
            elif teacher != teacher_file(own) and asked.distiller["name"] != "ce":  # nobody would wait for it
                raise InputError("teacher.checkpoint", f"this list makes {teacher}; valid: "
                                 f"teacher.checkpoint={teacher} among the run's arguments")
        except InputError as error:
            raise ValueError(f"{path}: {run}: {cfg}: {error}") from None


def train(command, folder):
    """(exit code of the command in the folder, whether a signal came): the run saves and leaves after a signal.

    The terminal gives Ctrl-C to both; SIGTERM is passed on, and the run knows one that it has had already.
    """
    signalled = []
    process = subprocess.Popen(command, cwd=folder)

    def note(number, _):
        signalled.append(number)
        if number == signal.SIGTERM:
            process.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, bool(signalled)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", help="the YAML file")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="save and leave after so long; no run begins with fewer than 30 left")
    parser.add_argument("--only", metavar="SECTION,…", help="these sections alone")
    parser.add_argument("--runs", default="runs", type=os.path.expanduser,
                        help="where the runs are kept, with their weights")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings for every run")
    args = parser.parse_intermixed_args(argv)
    root, results, deadline = Path(__file__).parents[1], Path(args.list).parent, time.monotonic() + args.seconds

    def entries(sections):  # a list says runs/… of the teachers that it trains
        return [(run, [a.replace("teacher.checkpoint=runs/", f"teacher.checkpoint={args.runs}/") for a in arguments])
                for run, arguments in in_turn(sections)]

    try:
        for override in args.overrides:
            if override.partition("=")[0] not in FOR_EVERY_RUN:
                raise ValueError(f"{override}: valid here: {', '.join(FOR_EVERY_RUN)}; what changes results belongs in "
                                 "the list")
        sections = load_list(args.list)
        only = args.only.split(",") if args.only else list(sections)
        for name in only:
            if name not in sections:
                raise ValueError(f"{args.list}: no section {name!r}; valid: {', '.join(sections)}")
        makers = {f"{args.runs}/{run}/student.pth": (run, arguments) for run, arguments in entries(sections)}
        chosen = entries({name: section for name, section in sections.items() if name in only})
        queue = unfinished(chosen, makers, results, root, args.overrides)
        check(args.list, queue, makers, root, args.overrides)  # now, and not when a run's turn comes
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed, result = [], 0
    for run, arguments in queue:
        folder, teacher = root / args.runs / run, teacher_file(arguments)
        if teacher in makers and not (root / teacher).exists():
            continue  # another process is at it
        try:
            mine = lock(folder.with_name(f"{run}.lock"))
        except InputError as error:
            print(f"error: --runs: {error}", file=sys.stderr)
            result = 2
            break
        if mine is None or finished(results / run) and (folder / "student.pth").exists():
            continue
        left = deadline - time.monotonic()
        if left < 30:
            print(f"out of time before {run}")
            break
        command = ["train_cifar.py", *arguments, f"runs={args.runs}", *args.overrides]
        command += [f"stop_after={left:.0f}"] if args.seconds < float("inf") else []
        print("python", shlex.join(command), flush=True)
        code, signalled = train([sys.executable, *command], root)
        if code == 1:  # a loss that is not finite, or a traceback: it concerns this run alone
            failed.append(run)
        elif code == 0 and finished(folder):
            try:
                for file in ("log.jsonl", "config.yaml") if not finished(results / run) else ():
                    checkpoint.write(results / run / file, (folder / file).read_bytes())
            except InputError as error:
                print(f"error: {args.list}: {error}; {run} is kept in {folder}", file=sys.stderr)
                result = 2
                break
        elif code == 0 or signalled and code in (130, -signal.SIGINT, -signal.SIGTERM):
            break  # stopped, in time or by a signal, or before there was anything to save
        elif code != 3:  # 3: another process trains its teacher
            print(f"error: {args.list}: {run} ended with {code}", file=sys.stderr)
            result = code
            break
        if signalled:
            break
    else:
        if not failed:
            print("all runs of the list are finished, or other processes are working on the rest")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return result or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
