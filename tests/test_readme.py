"""The README keeps its word."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from distillers import DISTILLERS
from train_cifar import read_settings
from utils.run_list import in_turn, load_list

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
METHODS = re.findall(r"^\| `(\w+)` \|", README, re.M)


def test_the_example_of_a_copied_distiller_runs(tmp_path):
    example, _ = EXAMPLES
    (tmp_path / "example.py").write_text(example + "print(loss.item(), prior_ratio)\n")
    shutil.copy(ROOT / "distillers/dpk.py", tmp_path)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loss, ratio = map(float, result.stdout.split())
    assert loss > 0 and 0.15 <= ratio <= 0.9


def test_the_example_of_one_s_own_network_trains(tmp_path):
    _, example = EXAMPLES
    checks = ["not teacher.training", "losses['dpk_3'] > 0", "all(p.grad.any() for p in distiller.parameters())",
              "len(set(map(id, distiller.parameters()))) == sum(len(o.state) for o in optimizers)"]
    (tmp_path / "example.py").write_text(example + "".join(f"assert {check}\n" for check in checks))
    shutil.copy(ROOT / "distillers/dpk.py", tmp_path)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_file_it_names_is_there():
    text = "".join((ROOT / folder / "README.md").read_text() for folder in ("", "yaml", "yaml/imagenet"))
    folders = "yaml|checkpoints|tests|distillers|assets|models|results|utils"
    named = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w./]+\.\w+", text))
    assert {"yaml/quickstart.yaml", "assets/method.svg"} <= named
    assert all((ROOT / name).exists() for name in named), named


def test_its_example_of_a_list_is_one(tmp_path):
    example, = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "runs.yaml").write_text(example)
    for _, arguments in in_turn(load_list(tmp_path / "runs.yaml")):
        read_settings(arguments[1], arguments[2:])


def test_every_method_of_the_table_is_there():
    assert len(METHODS) == len(set(METHODS)) == 17 and set(METHODS) < set(DISTILLERS)


GAP = [f"plaincnn{depth}" for depth in (4, 6, 8, 10)]
TABLES = [  # those of our runs, in order: for each cell of a row, run@section of results/runs.yaml, - for none
    ["ce@short - fitnet@short ofd@short_methods reviewkd@short_methods no_kl@short_ablations", "kd@short - - - - -",
     "logits_k1@short ickd@short fitnet@short_kl ofd@short_kl reviewkd@short_kl dpk_small_k1@short"],
    [f"kd_{teacher}@gap ickd_{teacher}@gap logits_{teacher}@gap dpk_{teacher}@gap" for teacher in GAP],
    [f"kd_{teacher}@gap_long logits_{teacher}@gap_long dpk_{teacher}@gap_long logits_{teacher}@gap_longer "
     f"dpk_{teacher}@gap_longer" for teacher in (GAP[0], GAP[-1])],
    ["dpk_small_k1@short fixed_0.15@short_ablations fixed_0.5@short_ablations - no_teacher_tokens@short_ablations "
     "fixed_0@short_ablations",
     "dpk_plaincnn10@gap fixed_0.15@ablations fixed_0.5@ablations fixed_0.95@ablations no_teacher_tokens@ablations "
     "fixed_0@ablations"],
]


def test_its_figures_are_those_of_the_results():
    sections = yaml.safe_load((ROOT / "results/runs.yaml").read_text())
    names = {section["title"]: name for name, section in sections.items()}
    results, top1 = (ROOT / "results/README.md").read_text(), {}
    for section in results.split("\n## ")[1:]:
        for run, figure in re.findall(r"^\| (\S+) \| ([^|]+) \| \d+ \|", section, re.M):
            top1[f"{run}@{names[section.splitlines()[0]]}"] = figure
    part = README.split("## Results\n")[1].split("## Which teacher?")[0]
    for table, cells in zip(re.findall(r"(?:^\|.*\n)+", part, re.M), TABLES, strict=True):
        for row, runs in zip(table.splitlines()[2:], map(str.split, cells), strict=True):
            figures = [cell.strip(" °*") for cell in row.split("|")[-len(runs) - 1:-1]]
            assert all(run == "-" or figure == top1[run] for figure, run in zip(figures, runs, strict=True)), row
    assert all(figure in results for figure in re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", " ".join(part.split())))


def test_yaml_is_not_a_package():
    assert not list((ROOT / "yaml").glob("*.py"))
    assert Path(yaml.__file__).parent != ROOT / "yaml"


def test_every_pair_has_a_file_of_every_method():
    pairs = ["wrn40_2_wrn16_2", "wrn40_2_wrn40_1", "res56_res20", "res110_res20", "res110_res32", "res32x4_res8x4",
             "vgg13_vgg8", "vgg13_mv2", "res50_mv2", "res50_vgg8", "res32x4_sv1", "res32x4_sv2", "wrn40_2_sv1"]
    for pair in pairs:
        for method in METHODS:
            assert (ROOT / f"yaml/{method}_{pair}.yaml").exists()
    table = (ROOT / "yaml/README.md").read_text().split("## Published figures")[1]
    assert len(re.findall(r"^\| .* → ", table, re.M)) == len(pairs)
