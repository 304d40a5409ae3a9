import argparse
import contextlib
import errno
import io
import os
import pickle
import re
import resource
import sys
import types

import numpy as np
import pytest
import torch

from models import MODELS
from utils import checkpoint
from utils.errors import InputError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    model = MODELS["resnet8"]()
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.tensor(7) if name.endswith("tracked") else torch.rand(buffer.shape))
    return model.state_dict()


def file(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def load(path, name="resnet8"):
    torch.manual_seed(2)
    content = checkpoint.load(path, "teacher.checkpoint")
    return checkpoint.fill_network(MODELS[name](), content, path, name, "teacher.checkpoint").state_dict()


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fails(*words, key="teacher.checkpoint"):
    """A context in which an InputError of one line, about `key`, that holds all the words must be raised."""
    pattern = re.escape(f"{key}: ") + "".join(f"(?=.*{re.escape(str(word))})" for word in words) + ".*$"
    return pytest.raises(InputError, match=rf"\A{pattern}(?!\n)")


# Layouts of published files


def beside(weights):
    """What a distiller's file holds beside the student: the teacher, of the same names, and connectors."""
    teacher = {name: tensor + 1 for name, tensor in weights.items()}
    return prefixed("module.teacher.", teacher) | {"module.regressor.0.weight": torch.ones(3)}


LAYOUTS = {
    "model": lambda sd: {"epoch": 240, "model": sd, "accuracy": 79.42},
    "bare": lambda sd: sd,
    "state_dict": lambda sd: {"state_dict": sd},
    "module": lambda sd: {"model": prefixed("module.", sd)},
    "student": lambda sd: prefixed("student.", sd),
    "student beside a teacher": lambda sd: {"model": beside(sd) | prefixed("student.", sd)},
    "module.student": lambda sd: {"model": beside(sd) | prefixed("module.student.", sd)},
    "_orig_mod": lambda sd: prefixed("_orig_mod.", sd),
    "student._orig_mod": lambda sd: {"model": prefixed("student._orig_mod.", sd)},
    "_orig_mod.module": lambda sd: prefixed("_orig_mod.module.", sd),
    "module.student._orig_mod": lambda sd: beside(sd) | prefixed("module.student._orig_mod.", sd),
    "our latest.pth": lambda sd: {"config": {"name": "run"}, "distiller": prefixed("student.", sd), "epoch": 3},
    "bare with an epoch": lambda sd: sd | {"epoch": 240, "arch": "resnet8"},
}


@FORMATS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads_to_the_same_weights(tmp_path, weights, layout, zipped):
    assert same(load(file(tmp_path / "t.pth", LAYOUTS[layout](weights), zipped)), weights)


def test_counts_of_batches_may_be_missing(tmp_path, weights):
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    loaded = load(file(tmp_path / "t.pth", {"model": old}))
    assert same({name: loaded[name] for name in old}, old)
    assert all(loaded[name] == 0 for name in weights.keys() - old.keys())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, weights, dtype):
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    loaded = load(file(tmp_path / "t.pth", half))
    assert all(loaded[name].dtype == weights[name].dtype for name in weights)
    assert same(loaded, {name: tensor.to(weights[name].dtype) for name, tensor in half.items()})


@FORMATS
def test_options_numpy_scalars_and_an_optimizer_may_lie_beside_the_weights(tmp_path, weights, zipped):
    model = MODELS["resnet8"]()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), np.float64(0.05), momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    path = file(tmp_path / "t.pth", {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": np.int64(240),
        "accuracy": np.float64(79.42), "best": np.float32(79.5), "done": np.bool_(True),
        "opt": argparse.Namespace(lr=np.float64(0.05), epochs=240, name="x", milestones=[150, 180])}, zipped)
    assert same(load(path), weights)
    content = checkpoint.load(path, "--eval")
    assert content["opt"] == argparse.Namespace(lr=0.05, epochs=240, name="x", milestones=[150, 180])
    assert (content["epoch"], content["accuracy"], content["best"], content["done"]) == (240, 79.42, 79.5, True)
    assert content["optimizer"]["param_groups"][0]["lr"] == 0.05


@FORMATS
def test_tensors_saved_on_cuda_load_on_the_cpu(tmp_path, weights, zipped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = file(tmp_path / "t.pth", {"model": weights}, zipped)
    assert b"cuda:0" in path.read_bytes()
    loaded = load(path)
    assert same(loaded, weights) and {tensor.device.type for tensor in loaded.values()} == {"cpu"}


# Files that are refused


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize("function", [os.system, exec])
def test_a_file_that_would_execute_something_is_refused_before_it_does(tmp_path, weights, zipped, function):
    marker = tmp_path / "marker"
    command = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w').close()"
    path = file(tmp_path / "t.pth", {"model": weights, "opt": Evil(function, command)}, zipped)
    with fails(path, "not a file of weights alone", function.__name__, "allowed" if function is exec else "blocked"):
        load(path)
    path.write_bytes(pickle.dumps(Evil(function, command), protocol=2))
    with fails(path):
        load(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # so it would have


@FORMATS
def test_a_class_that_only_has_the_name_of_an_allowed_one_is_refused(tmp_path, weights, zipped, monkeypatch):
    module = types.ModuleType("lookalike")
    exec("class Namespace:\n    def __setstate__(self, state): raise AssertionError('executed')", module.__dict__)
    monkeypatch.setitem(sys.modules, "lookalike", module)
    options = module.Namespace()
    options.lr = 0.05
    path = file(tmp_path / "t.pth", {"model": weights, "opt": options}, zipped)
    with fails(path, "lookalike.Namespace"):
        load(path)


@FORMATS
def test_a_whole_model_instead_of_its_weights_is_refused(tmp_path, zipped):
    path = file(tmp_path / "t.pth", MODELS["resnet8"](), zipped)
    with fails(path, "not a file of weights alone, such as a state_dict", "ResNet") as caught:
        load(path)
    assert "Please" not in str(caught.value)  # torch's advice to trust the file


def test_a_text_file_is_no_torch_file(tmp_path):
    (tmp_path / "t.pth").write_text("error: not found\n")
    with fails(tmp_path / "t.pth", "damaged or not a torch file: IndexError"):
        checkpoint.load(tmp_path / "t.pth", "teacher.checkpoint")


@FORMATS
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, weights, zipped):
    small = {name: weights[name] for name in list(weights)[:6]}
    whole = file(tmp_path / "t.pth", {"model": small, "accuracy": np.float64(1)}, zipped).read_bytes()
    cuts = {*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), *range(len(whole) - 40, len(whole), 3)}
    for cut in sorted(cuts):
        (tmp_path / "t.pth").write_bytes(whole[:cut])
        with fails(tmp_path / "t.pth", "damaged"):
            checkpoint.load(tmp_path / "t.pth", "teacher.checkpoint")


@FORMATS
def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path, weights, zipped):
    small = {name: weights[name] for name in list(weights)[:6]}
    whole = file(tmp_path / "t.pth", {"model": small, "lr": np.float64(1)}, zipped).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[random.integers(1500 if zipped else len(whole))] = random.integers(256)
        (tmp_path / "t.pth").write_bytes(damaged)
        try:
            checkpoint.load(tmp_path / "t.pth", "teacher.checkpoint")
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"just a line of text\n", b"<html>404</html>", b"\x80\x02", b"PK\x03\x04",
                                     bytes(1000), pickle.dumps({"model": 3}, protocol=2), b"version https://git-lfs.github.com/"])
def test_what_is_no_torch_file_is_refused(tmp_path, content):
    (tmp_path / "t.pth").write_bytes(content)
    with fails(tmp_path / "t.pth"):
        load(tmp_path / "t.pth")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with fails(tmp_path / "t.pth", "is missing"):
        load(tmp_path / "t.pth")
    with fails(tmp_path, "directory"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path, weights):
    bias = torch.where(torch.arange(100) == 3, torch.nan, weights["fc.bias"])
    with fails(file(tmp_path / "t.pth", {"model": weights | {"fc.bias": bias}}), "fc.bias is not finite"):
        load(tmp_path / "t.pth")


def test_another_network_is_refused_with_the_names_and_nothing_is_loaded(tmp_path, weights):
    path = file(tmp_path / "t.pth", {"model": weights})
    with fails(path, "does not fit resnet14", "layer1.1.conv1.weight is not in the file"):
        load(path, "resnet14")
    with fails(path, "no weights of vgg8; it begins with conv1.weight, bn1.weight, bn1.bias, vgg8 with "):
        load(path, "vgg8")
    with fails(path, "does not fit resnet8x4", "conv1.weight", "(16, 3, 3, 3) in the file", "(32, 3, 3, 3)"):
        load(path, "resnet8x4")
    path = file(tmp_path / "t.pth", MODELS["resnet14"]().state_dict())
    model = MODELS["resnet8"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fails(path, "does not fit resnet8", "resnet8 has no layer1.1.conv1.weight"):
        checkpoint.fill_network(model, checkpoint.load(path, "teacher.checkpoint"), path, "resnet8",
                                "teacher.checkpoint")
    assert same(model.state_dict(), before)


def test_weights_that_are_no_fractions_are_refused(tmp_path, weights):
    path = file(tmp_path / "t.pth", {name: tensor.int() for name, tensor in weights.items()})
    with fails(path, "does not fit resnet8", "conv1.weight is torch.int32 in the file"):
        load(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with fails(tmp_path / "t.pth", "cannot be read: Permission denied"):
        load(tmp_path / "t.pth")


def test_another_number_of_classes_is_refused_with_both_shapes(tmp_path):
    path = file(tmp_path / "t.pth", MODELS["resnet8"](num_classes=10).state_dict())
    with fails(path, "resnet8", "number of classes", "fc.weight", "(10, 64) in the file", "(100, 64) here"):
        load(path)


@pytest.mark.parametrize("content", [
    {}, {"model": {}}, {"model": 3}, {"epoch": 3}, {0: torch.ones(2)},
    {"model": {0: torch.ones(2), (1, 2): torch.ones(2)}}, {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    {"conv1.weight": 3, "fc.bias": "text"}, {"other": torch.ones(2)}, {"bn1.num_batches_tracked": torch.tensor(1)},
    {"student.other": torch.ones(2)}])
def test_a_file_without_weights_of_the_network_is_refused(tmp_path, content):
    path = file(tmp_path / "t.pth", content)
    with fails(path, "no weights of resnet8") as raised:
        load(path)
    assert ("it begins with" in str(raised.value)) == bool(checkpoint.network_weights(content))


@pytest.mark.parametrize("content", [[], 3, None, "text", torch.ones(3), [torch.ones(2)]])
def test_a_file_that_holds_no_dict_is_refused(tmp_path, content):
    path = file(tmp_path / "t.pth", content)
    with fails(path, f"holds a {type(content).__name__}, not a dict"):
        checkpoint.load(path, "teacher.checkpoint")


def test_a_number_in_the_place_of_a_tensor_is_refused(tmp_path, weights):
    path = file(tmp_path / "t.pth", weights | {"fc.bias": 3})
    with fails(path, "does not fit resnet8", "fc.bias is not in the file"):
        load(path)


# Writing


@contextlib.contextmanager
def no_more_than(size):
    """No file of this process may grow beyond `size` bytes: a real failure of the operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_written_is_read_again_and_nothing_lies_beside_it(tmp_path, weights):
    path = tmp_path / "new" / "folder" / "a.pth"
    checkpoint.save(path, {"model": weights, "table": None, "rows": torch.arange(3.0)})
    checkpoint.save(path, {"model": weights, "table": [1, 2.5], "rows": torch.arange(4.0)})
    content = checkpoint.load(path, "name")
    assert same(content["model"], weights) and content["table"] == [1, 2.5] and len(content["rows"]) == 4
    checkpoint.write(path.with_name("config.yaml"), "größe: 1\n")
    checkpoint.write(path.with_name("bytes"), b"\x00\xff")
    assert path.with_name("config.yaml").read_text(encoding="utf-8") == "größe: 1\n"
    assert path.with_name("bytes").read_bytes() == b"\x00\xff"
    assert {p.name for p in path.parent.iterdir()} == {"a.pth", "config.yaml", "bytes"}


@pytest.mark.parametrize("failing", ["fsync", "replace", "limit"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, weights, failing, monkeypatch):
    path = tmp_path / "latest.pth"
    checkpoint.write(path, "old")
    with monkeypatch.context() as patch, no_more_than(4096) if failing == "limit" else contextlib.nullcontext():
        if failing != "limit":
            patch.setattr(os, failing, full)
        reason = "File too large" if failing == "limit" else "No space left on device"
        with fails(path, reason, "is kept", key="runs"):
            checkpoint.write(path, 10000 * "new")
        with fails(path, reason, "is kept", key="runs"):
            checkpoint.save(path, {"model": weights})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    checkpoint.write(path, "new")
    assert path.read_text() == "new"


def test_a_partial_file_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / "a.partial").write_bytes(bytes(100))
    checkpoint.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("place", ["/proc/x/y", "file/below", "folder", "n" * 300])
def test_a_place_where_one_cannot_write_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    path = tmp_path / place
    with fails("cannot write", path, key="runs"):
        checkpoint.write(path, "text")
    with fails("cannot write", path, key="--out"):
        checkpoint.write(path, "text", "--out")
    with fails("cannot write", path, key="runs"):
        checkpoint.save(path, {"epoch": 1})
    with fails("cannot write", path, key="runs"):
        checkpoint.append(path, {"epoch": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_lines_are_appended_and_a_full_disk_is_named(tmp_path):
    for epoch in 1, 2:
        checkpoint.append(tmp_path / "log", {"epoch": epoch, "loss": None})
    assert (tmp_path / "log").read_text() == '{"epoch": 1, "loss": null}\n{"epoch": 2, "loss": null}\n'
    with fails("/dev/full", "No space left", key="runs"):
        checkpoint.append("/dev/full", {"epoch": 1})


def test_an_error_of_input_survives_pickling():
    error = pickle.load(io.BytesIO(pickle.dumps(InputError("key", "message"))))
    assert (error.key, error.message, str(error)) == ("key", "message", "key: message")
