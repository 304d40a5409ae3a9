"""The published weights and hyper-parameters: in the constructors, in the files for CIFAR-100 and for ImageNet; and
what the files say of accuracies."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from distillers import DISTILLERS
from train_cifar import Settings
from train_imagenet import read_settings
from utils.config import flatten, load_config
from utils.log import read_log
from utils.report import spread
from utils.run_list import finished, load_list, runs_of

ROOT = Path(__file__).parents[1]
IMAGENET_FILES = sorted(ROOT.glob("yaml/imagenet/*.yaml"))
FILES = [path for path in sorted(ROOT.glob("yaml/*.yaml")) if not path.stem.startswith("quickstart")]

PUBLISHED = {  # RepDistiller's and mdistiller's scripts, or the authors' own
    "ce": {},
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4, "logit_standardization": False},
    "fitnet": {"ce_weight": 1, "hint_weight": 100, "student_stage": 2, "teacher_stage": 2, "kd_weight": 0,
               "temperature": 4},
    "at": {"ce_weight": 1, "at_weight": 1000, "kd_weight": 0, "temperature": 4},
    "sp": {"ce_weight": 1, "sp_weight": 3000, "kd_weight": 0, "temperature": 4},
    "pkt": {"ce_weight": 1, "pkt_weight": 30000, "kd_weight": 0, "temperature": 4},
    "rkd": {"ce_weight": 1, "distance_weight": 25, "angle_weight": 50, "kd_weight": 0, "temperature": 4},
    "vid": {"ce_weight": 1, "vid_weight": 1, "init_variance": 5, "kd_weight": 0, "temperature": 4},
    "cc": {"ce_weight": 1, "cc_weight": 0.02, "dim": 128, "kd_weight": 0, "temperature": 4},
    "nst": {"ce_weight": 1, "nst_weight": 50, "kd_weight": 0, "temperature": 4},
    "ofd": {"ce_weight": 1, "ofd_weight": 0.001, "kd_weight": 0, "temperature": 4},
    "crd": {"ce_weight": 1, "crd_weight": 0.8, "dim": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5,
            "kd_weight": 0, "kd_temperature": 4},
    "reviewkd": {"ce_weight": 1, "review_weight": 1, "warmup_epochs": 20, "mid_channels": None,
                 "teacher_preacts": True, "student_preacts": False, "kd_weight": 0, "temperature": 4},
    "ickd": {"ce_weight": 1, "kd_weight": 1, "icc_weight": 2.5, "temperature": 4, "projector_kernel": 1},
    "dkd": {"ce_weight": 1, "alpha": 1, "beta": 8, "temperature": 4, "warmup_epochs": 20,
            "logit_standardization": False},
    "dist": {"ce_weight": 1, "inter_weight": 2, "intra_weight": 2, "temperature": 4},
    "mlkd": {"ce_weight": 0.2, "kd_weight": 0.9, "temperatures": [2, 3, 4, 5, 6]},  # 0.1 for each of two views
    "dpk": {"ce_weight": 1, "kd_weight": 1, "temperature": 1, "feature_weight": 0.3, "ratio": "dynamic",
            "min_ratio": 0.15, "fallback_ratio": 0.9, "teacher_tokens": True},
}
OF_A_PAIR = {  # the authors' where they have the pair; else the YAML file says whose
    "dkd": {"beta": {
        "res56_res20": 2, "res110_res20": 2, "res110_res32": 2, "vgg13_vgg8": 6, "vgg13_mv2": 6, "wrn40_2_wrn16_2": 6,
        "wrn40_2_wrn40_1": 6, "res32x4_res8x4": 8, "res32x4_sv1": 8, "res32x4_sv2": 8, "res50_mv2": 8, "res50_vgg8": 8,
        "wrn40_2_sv1": 8}},
    "reviewkd": {"review_weight": {
        "res56_res20": 0.6, "res110_res20": 0.6, "res110_res32": 1, "vgg13_vgg8": 5, "vgg13_mv2": 5,
        "wrn40_2_wrn16_2": 5, "wrn40_2_wrn40_1": 5, "res32x4_res8x4": 5, "res32x4_sv1": 5, "res32x4_sv2": 8,
        "res50_mv2": 30, "res50_vgg8": 5, "wrn40_2_sv1": 5}},
}

ON_IMAGENET = {  # mdistiller's, or the authors' own; FitNet's is CIFAR's, none being published
    "ce": {},
    "kd": {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 1},
    "fitnet": {"hint_weight": 100, "student_stage": 2, "teacher_stage": 2},
    "at": {"at_weight": 1000},
    "crd": {"crd_weight": 0.8, "negatives": 16384},
    "reviewkd": {"r34_r18": {"review_weight": 1, "warmup_epochs": 0, "teacher_preacts": False,
                             "student_preacts": False},
                 "r50_mobilenetv1": {"review_weight": 8, "warmup_epochs": 0, "teacher_preacts": False,
                                     "student_preacts": True, "mid_channels": 256}},
    "ickd": {"ce_weight": 0.5, "kd_weight": 0.5, "icc_weight": 2, "temperature": 1, "projector_kernel": 3},
    "dkd": {"r34_r18": {"alpha": 1, "beta": 0.5, "temperature": 1, "warmup_epochs": 1},
            "r50_mobilenetv1": {"alpha": 1, "beta": 2, "temperature": 1, "warmup_epochs": 1}},
    "dist": {"inter_weight": 2, "intra_weight": 2, "temperature": 1},
    "ofd": {"ofd_weight": 0.0001},
    "mlkd": {"ce_weight": 1, "kd_weight": 0.5, "temperatures": [1, 2, 3, 5, 6]},
    "dpk": {"ce_weight": 0.8, "kd_weight": 0.8, "temperature": 1, "feature_weight": 0.2, "min_ratio": 0.1,
            "fallback_ratio": 0.8, "min_tokens": 4},
}

DPK_MODULES = {  # second-last stage: encoder, decoder; last stage: encoder, decoder; each dim/depth/heads
    "res56_res20": "64/6/8 48/6/8 128/6/8 80/4/8",
    "res110_res32": "64/6/8 64/6/8 128/6/8 128/4/8",
    "res110_res20": "64/6/8 128/4/8 64/6/8 128/4/8",
    "res32x4_res8x4": "160/6/4 128/4/8 180/6/4 256/4/8",
    "wrn40_2_wrn16_2": "128/6/8 128/4/8 256/6/8 256/4/8",
    "wrn40_2_wrn40_1": "64/6/4 80/4/4 80/6/8 128/4/8",
    "vgg13_vgg8": "160/6/8 256/6/8 320/6/8 512/4/8",
    "res32x4_sv1": "256/6/8 128/4/8 512/6/8 256/4/8",
    "res32x4_sv2": "128/6/8 128/4/8 256/6/8 256/4/8",
    "wrn40_2_sv1": "256/6/8 128/4/8 320/6/8 128/4/8",
    "vgg13_mv2": "128/6/4 256/4/4 320/6/8 512/4/8",
    "res50_mv2": "512/6/8 640/4/8 640/6/8 1536/4/8",
    "res50_vgg8": "512/6/8 1024/4/8 640/6/8 1536/4/8",
    "r34_r18": "256/6/8 256/4/8 512/6/8 512/4/8",
    "r50_r18": "512/4/8 1024/4/16 640/6/8 1024/4/8",
    "r101_r18": "512/4/8 1024/4/16 640/6/8 1024/4/16",
    "r152_r18": "512/6/8 1024/4/16 640/6/8 1024/4/16",
    "r50_mobilenetv1": "512/4/8 640/4/8 640/4/8 1536/4/16",
}


def defaults(name):
    return {key: list(p.default) if isinstance(p.default, tuple) else p.default
            for key, p in inspect.signature(DISTILLERS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_every_published_method_is_there():
    assert len(PUBLISHED) == 18 and set(PUBLISHED) <= set(DISTILLERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_constructor_has_the_published_numbers(name):
    assert defaults(name) | PUBLISHED[name] | {"label_smoothing": 0} == defaults(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_has_them_too(path):
    cfg, (name, _, pair) = load_config(Settings, path), path.stem.partition("_")
    assert (cfg.optimizer.name, cfg.optimizer.momentum, cfg.optimizer.nesterov) == ("sgd", 0.9, False)
    if path.stem == "dpk_plaincnn10_plaincnn2":
        return  # of no paper: what our grid found
    # the field's temperature and our grid's weight, in place of the code's 1 and 0.3
    ours = {"temperature": 4, "feature_weight": 9} if name == "dpk" else {}
    expected = PUBLISHED[name] | ours | {key: weights[pair] for key, weights in OF_A_PAIR.get(name, {}).items()}
    used = defaults(name) | cfg.distiller
    assert used | expected == used
    if name == "dpk":
        assert [stage["weight"] for stage in cfg.distiller["stages"]] == [0.6, 1]
        connectors = cfg.connectors  # the authors' but for our grid's learning rate, 1e-4 in theirs
        assert (connectors.optimizer, connectors.lr, connectors.betas) == ("adamw", 1e-3, [0.9, 0.95])
        assert (connectors.weight_decay, connectors.warmup_epochs, connectors.min_lr) == (1e-4, 20, 1e-5)
    elif name != "ce":  # every connector in the student's optimizer, as in the field's code
        assert (cfg.connectors.optimizer, cfg.connectors.weight_decay) == ("student", 5e-4)


DPK_FILES = [path for path in (*FILES, *IMAGENET_FILES)
             if path.stem.startswith("dpk_") and "plaincnn" not in path.stem and not path.stem.endswith("_small")]


def test_every_pair_has_its_modules():
    assert len(DPK_FILES) == 20 and {path.stem[4:].removesuffix("_authors") for path in DPK_FILES} == set(DPK_MODULES)


@pytest.mark.parametrize("path", DPK_FILES, ids=lambda path: path.stem)
def test_dpks_modules_have_the_published_sizes(path):
    stages = (read_settings(path) if path in IMAGENET_FILES else load_config(Settings, path)).distiller["stages"]
    sizes = ["/".join(map(str, stage[part])) for stage in stages for part in ("encoder", "decoder")]
    assert " ".join(sizes) == DPK_MODULES[path.stem[4:].removesuffix("_authors")]
    assert all(stage.get("patch", 1) == 1 for stage in stages)


@pytest.mark.parametrize("path", IMAGENET_FILES, ids=lambda path: path.stem)
def test_the_file_for_imagenet_has_its_own(path):
    cfg, (name, _, pair) = read_settings(path), path.stem.partition("_")
    expected = ON_IMAGENET[name].get(pair, ON_IMAGENET[name])
    used = defaults(name) | cfg.distiller
    assert used | expected == used
    optimizer, connectors = cfg.optimizer, cfg.connectors
    if name == "dpk":
        assert (connectors.optimizer, connectors.lr, connectors.betas) == ("adamw", 1e-4, [0.9, 0.95])
        assert (connectors.weight_decay, connectors.warmup_epochs, connectors.min_lr) == (1e-4, 20, 1e-5)
    if pair.endswith("authors"):
        return
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.1, 0.9, False)
    assert (optimizer.weight_decay, optimizer.milestones, optimizer.gamma) == (1e-4, [30, 60, 90], 0.1)
    if name in ("fitnet", "crd", "reviewkd", "ickd", "ofd"):
        assert (connectors.optimizer, connectors.weight_decay) == ("student", 1e-4)


# The first lines of a file: what is published, and what we measured

NOT_OF_THE_FILE = {"name", "seed", "epochs", "optimizer.milestones", "teacher.checkpoint",
                   "connectors.warmup_epochs", "distiller.warmup_epochs"}


def head(path):
    return " ".join(line.strip("# ") for line in path.read_text().split("\n\n")[0].splitlines())


def measured():
    """{file: "in 10 epochs: mean ± deviation (n = …); in 40 epochs: …" of its runs, changed in their length alone}."""
    runs = {}
    for name, section in load_list(ROOT / "results/runs.yaml").items():
        for run, _, _, (_, cfg, *overrides) in runs_of(name, section):
            own, ran = (flatten(dataclasses.asdict(load_config(Settings, ROOT / cfg, o))) for o in ([], overrides))
            changed = {key for key in own.keys() | ran.keys() if own.get(key) != ran.get(key)}
            if changed <= NOT_OF_THE_FILE and finished(ROOT / "results" / run):
                last = read_log(ROOT / "results" / run / "log.jsonl")[-1]
                runs.setdefault(ROOT / cfg, {}).setdefault(last["epoch"], []).append(last["top1"])
    return {path: "; ".join(f"in {epochs} epochs: {spread(tops)} (n = {len(tops)})"
                            for epochs, tops in sorted(of.items())) for path, of in runs.items()}


def test_each_file_says_what_we_measured():
    ours = measured()
    assert len(ours) > 15
    for path in (*FILES, *IMAGENET_FILES):
        expected = f"Ours, {ours[path]}; in 240: not run." if path in ours else "Ours: not run."
        assert expected in head(path), path


def test_the_best_that_is_published_is_the_best_of_all_files():
    for path in (path for path in DPK_FILES if path in FILES):
        published = {}
        for other in ROOT.glob(f"yaml/*_{path.stem[4:]}.yaml"):
            top1 = re.search(r"Published: ([\d.]+)[, ]", head(other))
            if top1 and not other.stem.startswith("mlkd_"):
                published.setdefault(float(top1[1]), set()).add(head(other).split(",")[0])
        best = max(published)
        top1, names = re.search(r"with one view, ([\d.]+), (.*?) \(student", head(path)).groups()
        assert (float(top1), set(names.split(" and "))) == (best, published[best])
        pair = re.search(r", (.*) teaches (.*) on CIFAR-100", head(path))
        row, = (line for line in (ROOT / "yaml/README.md").read_text().splitlines()
                if line.startswith(f"| {pair[1]} → {pair[2]} "))
        cell = row.strip("| ").split(" | ")[-1]
        assert (cell.split(", ")[0], set(cell.split(", ")[1].split(" and "))) == (top1, set(names.split(" and ")))
