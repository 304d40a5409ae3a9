"""The ranking of teachers: what is measured, the order, and the whole command."""

import json
import shutil

import pytest
import torch

import rank_teachers
from models import MODELS
from utils import checkpoint, engine

SETTINGS = ["data.name=synthetic", "data.samples=300", "device=cpu", "precision=fp32"]


@pytest.fixture
def files(tmp_path):
    paths = []
    for name in "plaincnn4", "resnet8":
        torch.manual_seed(0)
        paths.append(str(tmp_path / f"{name}.pth"))
        checkpoint.save(paths[-1], {"model": MODELS[name]().state_dict()})
    return paths


def entry(teacher, top1, speed):
    return {"teacher": teacher, "top1": top1, "images_per_s": speed, "parameters": 1000, "cka_before": [0.1, 0.2],
            "cka_after": [0.3, 0.4], "probe_top1": 5.0}


def test_the_most_accurate_first_and_the_faster_of_those_that_cannot_be_told_apart():
    # the error of the difference of two accuracies of 70 per cent on 10,000 images is 0.65
    entries = [entry("slow", 70.0, 10.0), entry("weak", 60.0, 99.0), entry("fast", 69.5, 30.0)]
    ranked = rank_teachers.rank(entries, 10000)
    assert [(e["teacher"], e["rank"]) for e in ranked] == [("fast", 1), ("slow", 2), ("weak", 3)]
    assert ranked[0]["reason"] == "0.50 below slow, within the error of 0.65, and 3.0 times as fast"
    assert ranked[1]["reason"] == "0.50 above the first, within the error, but slower"
    ranked = rank_teachers.rank([entry("b", 69.0, 30.0), entry("a", 70.0, 10.0)], 10000)
    assert [e["teacher"] for e in ranked] == ["a", "b"]
    assert [e["reason"] for e in ranked] == ["the most accurate", "1.00 less accurate than the first"]
    lines = rank_teachers.table(ranked).splitlines()
    assert lines[1].split()[:3] == ["1", "a", "70.00"] and "0.10 to 0.30, 0.20 to 0.40" in lines[1]


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_40_2", "vgg8", "mobilenetv2", "shufflenetv2", "plaincnn6"])
def test_a_file_says_of_which_network_it_is(name, tmp_path):
    checkpoint.save(tmp_path / "a.pth", {"model": MODELS[name](num_classes=7).state_dict()})
    assert rank_teachers.identify(tmp_path / "a.pth", 7)[0] == name
    with pytest.raises(ValueError, match="fits no network with 8 classes"):
        rank_teachers.identify(tmp_path / "a.pth", 8)


def test_a_file_of_ours_says_its_network(monkeypatch, tmp_path):
    """Another may have tensors of the same names and shapes."""
    monkeypatch.setitem(MODELS, "my_resnet8", MODELS["resnet8"])
    content = {"model": MODELS["resnet8"]().state_dict()}
    for said, name in ("my_resnet8", "my_resnet8"), ("resnet8", "resnet8"), ("vgg8", "resnet8"), (["odd"], "resnet8"):
        checkpoint.save(tmp_path / "a.pth", content | {"network": said})
        assert rank_teachers.identify(tmp_path / "a.pth", 100)[0] == name


def test_a_probe_that_diverges_has_no_rank(files, tmp_path, capsys):
    out = tmp_path / "ranking.jsonl"
    arguments = ["--student", "plaincnn2", *files, *SETTINGS, "optimizer.lr=1e30", "--out", str(out)]
    assert rank_teachers.main(arguments) == 1 and not out.exists()
    assert f"error: {files[0]}: probe: loss " in capsys.readouterr().err


def test_stages_are_paired_from_the_last():
    assert rank_teachers.stage_pairs([0] * 4, [0] * 4) == [(1, 1), (2, 2), (3, 3)]
    assert rank_teachers.stage_pairs([0] * 3, [0] * 5) == [(1, 3), (2, 4)]


def test_the_whole_command(files, tmp_path, capsys):
    out = tmp_path / "ranking.jsonl"
    arguments = ["--student", "plaincnn2", *files, *SETTINGS, "--out", str(out)]
    assert rank_teachers.main(arguments) == 0
    text, entries = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    assert [e["rank"] for e in entries] == [1, 2] and {e["teacher"] for e in entries} == {"plaincnn4", "resnet8"}
    for e in entries:
        model = MODELS[e["teacher"]]()
        assert e["parameters"] == sum(p.numel() for p in model.parameters())
        assert e["teacher"] in text and e["reason"] in text and e["images_per_s"] > 0
        assert len(e["cka_before"]) == len(e["cka_after"]) == 2 and e["cka_before"] != e["cka_after"]
        assert all(-1 <= cka <= 1 for cka in e["cka_before"] + e["cka_after"])
    assert rank_teachers.main([*arguments, "--steps", "2"]) == 0  # another probe, the same all else
    again = {e["teacher"]: e for e in map(json.loads, out.read_text().splitlines())}
    for e in entries:
        assert again[e["teacher"]]["cka_before"] == e["cka_before"] and again[e["teacher"]]["top1"] == e["top1"]


def test_weights_that_are_not_finite_are_noticed_before_the_first_is_examined(files, tmp_path, monkeypatch, capsys):
    content = checkpoint.load(files[1], "")
    content["model"]["fc.bias"].fill_(torch.nan)
    checkpoint.save(tmp_path / "nan.pth", content)
    monkeypatch.setattr(rank_teachers, "examine", None)
    assert rank_teachers.main(["--student", "plaincnn2", files[0], str(tmp_path / "nan.pth"), *SETTINGS]) == 2
    assert "fc.bias is not finite" in capsys.readouterr().err


def test_two_files_of_one_network_are_told_apart(files, capsys):
    assert rank_teachers.main(["--student", "plaincnn2", files[0], "nowhere.pth", *SETTINGS]) == 2
    printed = capsys.readouterr()
    assert "is missing" in printed.err and not printed.out  # all files are looked at before the first is examined
    second = files[0].replace("plaincnn4", "again")
    shutil.copy(files[0], second)
    assert rank_teachers.main(["--student", "plaincnn2", files[0], second, *SETTINGS, "--steps", "1"]) == 0
    text = capsys.readouterr().out
    assert f"plaincnn4 ({files[0]})" in text and f"plaincnn4 ({second})" in text


class Batches(list):
    """Of images, as a loader."""

    def batch(self, epoch, step):
        return self[step], None


def test_cka_is_of_four_batches_in_eval_mode_its_terms_averaged_first():
    torch.manual_seed(0)
    student, teacher = MODELS["plaincnn2"]().train(), MODELS["plaincnn4"]().eval()
    batches = Batches(torch.randn(8, 3, 32, 32) for _ in range(5))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = rank_teachers.measure_cka(student, teacher, batches, engine.build_autocast("fp32", torch.device("cpu")))
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())
    terms = 0
    with torch.no_grad():
        for images in batches[:4]:
            a, b = (network.eval()(images, return_features=True)[1]["maps"][-1] for network in (student, teacher))
            grams = [(x.flatten(1) @ x.flatten(1).T).double().fill_diagonal_(0) for x in (a, b)]
            terms += torch.tensor([((K @ L).trace() + K.sum() * L.sum() / 42 - 2 * (K @ L).sum() / 6) / 40
                                   for K, L in (grams, grams[:1] * 2, grams[1:] * 2)])  # n = 8
    assert found[-1] == pytest.approx(float(terms[0] / (terms[1] * terms[2]) ** 0.5), abs=2e-3)


def test_cka_leaves_out_a_rest_of_fewer_than_four_images():
    torch.manual_seed(0)
    student, teacher, images = MODELS["plaincnn2"](), MODELS["plaincnn4"]().eval(), torch.randn(8, 3, 32, 32)
    autocast = engine.build_autocast("fp32", images.device)
    expected = rank_teachers.measure_cka(student, teacher, Batches([images]), autocast)
    assert rank_teachers.measure_cka(student, teacher, Batches([images, images[:2]]), autocast) == expected


def test_the_figure_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    rank_teachers.draw([entry("a", 70.0, 1.0) | {"rank": 1}], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_patch_divides_the_map():
    assert [rank_teachers.patch_for(side) for side in (4, 8, 16, 28, 31, 50, 64)] == [1, 1, 2, 2, 1, 5, 8]


def test_maps_that_eight_does_not_divide(files, capsys):
    arguments = ["--student", "plaincnn2", files[0], *SETTINGS, "data.samples=100", "data.size=56", "--steps=1"]
    assert rank_teachers.main(arguments) == 0 and "plaincnn4" in capsys.readouterr().out  # maps of 28×28 and 14×14


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.pth"], ["CHECKPOINT", "nowhere.pth is missing"]),
    (["nowhere.pth", "--data", "2024"], ["CHECKPOINT", "nowhere.pth is missing"]),
    (["data.name=cifar10"], ["CHECKPOINT", "none was given"]),
    (["--student", "resnet21", "a.pth"], ["student.name", "resnet20"]),
    (["a.pth", "data.size=x"], ["data.size"]),
    (["a.pth", "data.root=" + 300 * "x"], ["File name too long"]),
    (["a.pth", "--out", "nowhere/a.jsonl"], ["--out", "nowhere/a.jsonl"]),
    (["a.pth", "--out", "."], ["--out", ". is a folder"]),
    (["a.pth", "--figure", "a.foo"], ["--figure", "a.foo", ".png, .pdf, .svg"]),
    (["a.pth", "optimizer.nesterov=true", "optimizer.momentum=0"], ["optimizer.nesterov"]),
    (["a.pth", "distiller.name=kd"], ["distiller.name=kd", "no effect", "optimizer, precision"]),
    (["a.pth", "optimizer.gamma=0.5"], ["optimizer.gamma=0.5", "no effect"]),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert rank_teachers.main([*arguments, *SETTINGS] if "nowhere.pth" in arguments else arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_probes(monkeypatch, capsys):
    monkeypatch.setattr(rank_teachers.os, "access", lambda path, mode: False)  # root may write anywhere
    assert rank_teachers.main(["a.pth", "--figure", "a.png"]) == 2
    assert "--figure: a.png" in capsys.readouterr().err
