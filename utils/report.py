"""Write the tables and figures of a list of runs from their logs: README.md beside the list, nothing by hand.

    python -m utils.report [results/runs.yaml]

Figures are drawn where matplotlib is installed.
"""

import argparse
import io
import json
import shlex
import statistics
import sys
from pathlib import Path

from utils import checkpoint
from utils.log import read_log
from utils.run_list import check_results, finished, load_list, runs_of

HEAD = """# Results

Written by `python -m utils.report` from the logs in the folders beside this file; its argument is the list of the runs,
`runs.yaml`.
Top-1 is that of the last epoch, in per cent, mean ± standard deviation over n seeds; the best epoch stands beside it.
Runs may have shared their machine with other work: do not read their times as speeds. In brackets behind a CPU are the
vector instructions that PyTorch uses there, which older logs do not say.
"""


def spread(values):
    """Mean ± sample standard deviation of numbers, as text."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def duration(seconds):
    """Seconds as text."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def commit(git):
    """A commit of the log, shortened; one with changes that were not committed stays marked."""
    return git[:7] + "-dirty" * git.endswith("-dirty") if git else "unknown"


def logs_of(results, name, section):
    """{key: [log of each finished seed]}, the keys in the order of the list. ValueError: one is of other settings."""
    logs = {key: [] for key in section["runs"]}
    for run, key, _, arguments in runs_of(name, section):
        if finished(results / run):
            check_results(results / run, arguments, Path(__file__).parents[1])
            logs[key].append(read_log(results / run / "log.jsonl"))
    return logs


def table(name, section, logs):
    """The lines of a section's table; a run without a log is 'not run'."""
    commands = {}
    for _, key, _, arguments in runs_of(name, section):
        commands.setdefault(key, ["train_cifar.py", *arguments])
    published = section.get("published", {})
    heads = ["run", "top-1", "n", "best epoch", *["published"] * bool(published), "time a run", "machine", "commit"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, seeds in logs.items():
        beside = [str(published.get(key, "–"))] * bool(published)
        cells = ["not run", "0", "", *beside, "", "", ""]
        if seeds:
            last = [log[-1] for log in seeds]
            parts = [part for log in seeds for part in (log[0], *log[0].get("resumed", []))]
            cells = [spread([entry["top1"] for entry in last]), str(len(seeds)),
                     spread([entry["best_top1"] for entry in last]), *beside,
                     duration(statistics.mean(sum(entry["seconds"] for entry in log[1:]) for log in seeds)),
                     "; ".join(dict.fromkeys(part["hardware"] for part in parts if "hardware" in part)),
                     ", ".join(dict.fromkeys(commit(part["git"]) for part in parts if "git" in part))]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    commands = [f"python {shlex.join(command)}    # {key}" for key, command in commands.items()]
    return [*lines, "", "<details><summary>Commands</summary>", "", "```bash", *commands, "```", "", "</details>"]


def method_and_teacher(key, teachers):
    """The two parts of <method>_<teacher>; (None, None) where the run's name is not of this form."""
    teacher = max((teacher for teacher in teachers if key.endswith(f"_{teacher}")), key=len, default=None)
    return (None, None) if teacher is None else (key.removesuffix(f"_{teacher}"), teacher)


def by_teacher(results, section, logs):
    """The lines of a table of teachers by methods, where a section has `teachers`; its runs are <method>_<teacher>.

    In the order of rank_teachers.py and with its CKA, where the section names what it wrote, `ranking`.
    """
    teachers = section.get("teachers", {})
    path = results / section.get("ranking", "")
    try:
        ranks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        ranks = {entry["teacher"]: [f"{entry['cka_before'][-1]:.2f} to {entry['cka_after'][-1]:.2f}",
                                    f"{entry['probe_top1']:.2f}"] for entry in ranks if entry["teacher"] in teachers}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not what rank_teachers.py writes ({error!r})") from None
    if path.is_file() and not ranks:
        raise ValueError(f"{path}: ranks none of the section's teachers, {', '.join(teachers)}")
    methods = [m for m in dict.fromkeys(method_and_teacher(key, teachers)[0] for key in logs) if m is not None]
    probe = ["CKA, last stage, before and after a probe", "probe's top-1"] if ranks else []
    heads = ["teacher", "top-1", *probe, *methods]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for teacher in dict.fromkeys([*ranks, *teachers]):
        top1 = teachers[teacher]
        cells = [teacher, "not run" if top1 is None else f"{top1:.2f}"]
        if ranks:
            cells += ranks.get(teacher, ["–", "–"])
        for method in methods:
            seeds = [log[-1]["top1"] for log in logs.get(f"{method}_{teacher}", ())]
            cells.append(spread(seeds) if seeds else "not run" if f"{method}_{teacher}" in logs else "–")
        lines.append(f"| {' | '.join(cells)} |")
    order = ", in the order of `rank_teachers.py`" if ranks else ""
    return [f"Top-1 of the student under each teacher{order}:", "", *lines, ""] if teachers else []


def curves(section, logs):
    """{kind of figure: (axes' labels, {panel: {label: [line, …]}})}, a line = (x, y, style).

    Of the first seed of each run, accuracy over epochs, and CKA (solid) and ratio (dashed), a panel a stage; the mean
    of all seeds, with a bar from the worst to the best, over the accuracy of the teacher.
    """
    accuracy, stages, teachers = {}, {}, {}
    for key, seeds in logs.items():
        if not seeds:
            continue
        entries = seeds[0][1:]
        epochs = [entry["epoch"] for entry in entries]
        accuracy[key] = [(epochs, [entry["top1"] for entry in entries], "-")]
        for column in entries[0]:
            if column.startswith("cka_"):
                stage = column.removeprefix("cka_")
                stages.setdefault(f"stage {stage}", {})[key] = [
                    (epochs, [entry[metric] for entry in entries], style)
                    for metric, style in ((column, "-"), (f"ratio_{stage}", "--")) if metric in entries[0]]
        method, teacher = method_and_teacher(key, section.get("teachers", {}))
        if teacher is not None and section["teachers"][teacher] is not None:
            teachers.setdefault(method, []).append((section["teachers"][teacher], [log[-1]["top1"] for log in seeds]))
    for method in teachers:
        points = sorted(teachers[method])
        means = [(x, statistics.mean(tops)) for x, tops in points]
        bars = [((x, x), (min(tops), max(tops)), "-") for x, tops in points if len(tops) > 1]
        teachers[method] = [(*zip(*means), "o-"), *bars]
    return {"accuracy": (("epoch", "top-1 in per cent"), {"": accuracy}),
            "ratio": (("epoch", "CKA (solid) and ratio (dashed)"), dict(sorted(stages.items()))),
            "teachers": (("teacher's top-1 in per cent", "student's top-1 in per cent"), {"": teachers})}


def draw(results, name, title, figures):
    """What `curves` gave for a section as PNG files, where matplotlib is installed; none of fewer than two lines."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return
    shades = colormaps["tab20"].colors  # in pairs of a dark and a light one
    colors = shades[::2] + shades[1::2]
    for kind, ((x_label, y_label), panels) in figures.items():
        path = results / f"{name}_{kind}.png"
        labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
        if sum(len(lines) for panel in panels.values() for lines in panel.values()) > 1:
            figure = Figure(figsize=(5 * len(panels) + 1, 4))
            axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
            for axis, (panel, lines) in zip(axes[0], panels.items()):
                for label, parts in lines.items():
                    for i, (x, y, style) in enumerate(parts):
                        axis.plot(x, y, style, color=colors[labels.index(label) % 20], label=None if i else label)
                axis.set(xlabel=x_label, title=panel)
            axes[0, 0].set_ylabel(y_label)
            figure.suptitle(title)
            handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
            axis.legend(handles.values(), handles, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            checkpoint.write(path, buffer.getbuffer(), str(path))
        else:
            path.unlink(missing_ok=True)


def report(path, drawn=True):
    """The text of README.md for the list `path`; draws the figures beside it, unless not `drawn`."""
    results, lines = Path(path).parent, [HEAD]
    for name, section in load_list(path).items():
        logs = logs_of(results, name, section)
        for key, run in section.get("teachers", {}).items():  # its accuracy in place of its name, once it is trained
            done = finished(results / run)
            section["teachers"][key] = read_log(results / run / "log.jsonl")[-1]["top1"] if done else None
        lines += [f"## {section['title']}", "", section.get("text", ""), "", *by_teacher(results, section, logs),
                  *table(name, section, logs), ""]
        figures = curves(section, logs)
        if drawn:
            draw(results, name, section["title"], figures)
        files = [f"{name}_{kind}.png" for kind in figures]
        lines += [f"![{Path(file).stem}]({file})\n" for file in files if (results / file).exists()]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="?", default="results/runs.yaml")
    path = Path(parser.parse_args(argv).list)
    page = path.parent / "README.md"
    try:
        load_list(path)
        if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(HEAD[:60]):
            raise ValueError(f"{page} is not of utils.report; move it, or put the list into a folder of its own")
        checkpoint.write(page, report(path), str(path))
        print(f"{page}: written")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
