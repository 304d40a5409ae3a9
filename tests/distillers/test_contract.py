"""What holds for every distiller, and every network under it: a new one is tested by being in its dict."""

import ast
import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distillers import DISTILLERS
from models import MODELS

ROOT = Path(__file__).parents[2]
SMALL = {"encoder": (8, 1, 2), "decoder": (8, 1, 2)}
ARGUMENTS = {"dpk": {"stages": [{"student": -2, "teacher": -2, **SMALL}, SMALL]},
             "crd": {"num_samples": 32, "negatives": 64}}


def build(name, student="resnet8", teacher="resnet14", **arguments):
    torch.manual_seed(0)
    return DISTILLERS[name](MODELS[student](), MODELS[teacher](), **ARGUMENTS.get(name, {}), **arguments).train()


def batch(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n)


def call(distiller, images, targets):
    index = (3 * torch.arange(len(images)),) if getattr(distiller, "needs_index", False) else ()
    return distiller(images, targets, *index)


@pytest.mark.parametrize("name", DISTILLERS)
def test_logits_and_weighted_scalars(name):
    distiller, (images, targets) = build(name), batch()
    logits, losses = call(distiller, images, targets)
    assert logits.shape == (8, 100)
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    distiller.eval()
    assert torch.allclose(call(distiller, images, targets)[0], distiller.student(images), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in DISTILLERS if name != "ce"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_teacher_that_was_set_to_train_is_set_back(name, mode):
    """By deepcopy, say: torch.fx has copies of its graphs in train mode. Or by assigning one, which registers it."""
    distiller = build(name)
    distiller.teacher.train()
    assert distiller.train(mode) is distiller
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(module.training == mode for module in distiller.modules())
    distiller.teacher = copy.deepcopy(distiller.teacher).train()
    assert not any(module.training for module in distiller.train(mode).teacher.modules())


@pytest.mark.parametrize("name", DISTILLERS)
def test_all_of_it_in_float64(name):
    distiller, (images, targets) = build(name).double(), batch(4)
    logits, losses = call(distiller, images.double(), targets)
    sum(losses.values()).backward()
    assert logits.dtype == torch.float64
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


@pytest.mark.parametrize("name", ["at", "nst", "vid", "ofd", "reviewkd"])
def test_a_network_of_a_single_map_is_refused(name):
    class Single(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, images, return_features=False):
            feature_map = self.conv(images)
            pooled = feature_map.mean((2, 3))
            return pooled, {"maps": [feature_map], "pooled": pooled}

    with pytest.raises(ValueError, match="the stem's"):
        DISTILLERS[name](Single(), Single())(*batch(4))


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_cross_entropy_has_its_weight_and_its_smoothing(name):
    weight = 1.0 if name == "ce" else 3.0
    distiller = build(name, label_smoothing=0.2, **({} if name == "ce" else {"ce_weight": weight}))
    images, targets = batch()
    logits, losses = call(distiller, images, targets)
    log_p = logits.double().log_softmax(1)  # 80 % of the target on its class, 20 % on all
    expected = -0.8 * log_p[range(8), targets].mean() - 0.2 * log_p.mean()
    assert losses["ce"].item() == pytest.approx(weight * expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_weight_may_be_zero_and_not_negative(name):
    parameters = inspect.signature(DISTILLERS[name]).parameters
    for key in [key for key in parameters if key.endswith("_weight") or key in ("alpha", "beta")]:
        present, without = [{term for term, loss in call(distiller, *batch())[1].items() if loss > 0}
                            for distiller in (build(name, **{key: parameters[key].default or 1.0}),
                                              build(name, **{key: 0.0}))]
        assert without < present
        with pytest.raises(ValueError, match=key):
            build(name, **{key: -0.1})
    for smoothing in -0.1, 1.1:
        with pytest.raises(ValueError, match=f"label_smoothing: {smoothing}"):
            build(name, label_smoothing=smoothing)


BESIDE_KL = [name for name, distiller in DISTILLERS.items()
             if "kd_weight" in inspect.signature(distiller).parameters and name not in ("kd", "mlkd")]


@pytest.mark.parametrize("name", BESIDE_KL)
def test_kl_beside_features_is_that_of_kd(name):
    temperature = "kd_temperature" if name == "crd" else "temperature"  # CRD has another one of its own
    images, targets = batch()
    logits, expected = build("kd", kd_weight=3.0, temperature=2.0).eval()(images, targets)
    expected, [slope] = expected["kd"], torch.autograd.grad(expected["kd"], logits)
    with_kl, without = build(name, kd_weight=3.0, **{temperature: 2.0}).eval(), build(name, kd_weight=0.0).eval()
    losses = []
    for distiller in with_kl, without:
        torch.manual_seed(1)  # of DPK's positions and CRD's negatives
        logits, terms = call(distiller, images, targets)
        losses.append(terms)
        if distiller is with_kl:
            kd = terms.pop("kd")
            torch.testing.assert_close(torch.autograd.grad(kd, logits)[0], slope)
    assert kd.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0
    assert sum(losses[0].values()).item() == pytest.approx(sum(losses[1].values()).item(), rel=1e-5)
    with pytest.raises(ValueError, match=f"^{temperature}: 0 "):
        build(name, **{temperature: 0})


def test_all_methods_that_compare_features_take_kl_beside_them():
    assert set(DISTILLERS) - set(BESIDE_KL) == {"ce", "kd", "dkd", "dist", "mlkd"}


@pytest.mark.parametrize("name", [name for name in DISTILLERS if name != "ce"])
def test_the_teacher_is_never_touched(name):
    torch.manual_seed(0)
    teacher = MODELS["resnet14"]().train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = DISTILLERS[name](MODELS["resnet8"](), teacher, **ARGUMENTS.get(name, {}))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())  # by construction
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        distiller.train()
        assert not any(module.training for module in distiller.teacher.modules())
        sum(call(distiller, *batch())[1].values()).backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())  # nor by training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    owned = {id(p) for p in distiller.parameters()} | {id(b) for b in distiller.buffers()}
    assert not owned & {id(p) for p in [*teacher.parameters(), *teacher.buffers()]}
    size = sum(value.numel() for value in distiller.state_dict().values())
    assert size == sum(value.numel() for value in [*distiller.parameters(), *distiller.buffers()])
    moved = distiller.to(torch.float64)
    assert next(moved.teacher.parameters()).dtype == torch.float64  # yet .to() and .cuda() take it along


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_and_every_leaf_is_a_parameter(name, dtype):
    distiller = build(name)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = sum(call(distiller, *batch())[1].values())
    leaves, stack, seen = set(), [total.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [function for function, _ in node.next_functions]
    assert leaves == {id(p) for p in distiller.parameters()}
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    connectors = [p for key, p in distiller.named_parameters() if not key.startswith("student.")]
    assert all(p.grad.abs().sum() > 0 for p in connectors if p.dim() > 1)


class Switch(torch.nn.Module):
    """Does something in train() itself, as torchvision's feature extractors do; its network is always in eval mode."""

    def __init__(self, network):
        super().__init__()
        self.network, self.mode = network, True

    def train(self, mode=True):
        super().train(mode)
        self.mode = mode
        self.network.eval()
        return self

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_probe_of_the_shapes_gives_each_module_its_mode_back(name):
    student = Switch(MODELS["resnet8"]()).train()
    DISTILLERS[name](student, MODELS["resnet14"](), **ARGUMENTS.get(name, {}))
    assert student.training and student.mode and not any(m.training for m in student.network.modules())


@pytest.mark.parametrize("name", DISTILLERS)
def test_batchnorm_statistics_move_once_a_step(name):
    distiller = build(name)
    call(distiller, *batch())
    assert all(value == 1 for key, value in distiller.state_dict().items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", DISTILLERS)
def test_connectors_are_trained_saved_and_restored(name):
    distiller = build(name)
    before = copy.deepcopy(distiller.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    sum(call(distiller, *batch())[1].values()).backward()
    optimizer.step()
    trained = distiller.state_dict()
    weights = [key for key, value in distiller.named_parameters() if value.dim() > 1]
    assert all(not torch.equal(trained[key], before[key]) for key in weights)
    other = build(name)
    other.load_state_dict(trained)
    assert all(torch.equal(value, trained[key]) for key, value in other.state_dict().items())
    distiller.eval(), other.eval()
    losses = []
    for module in distiller, other:
        torch.manual_seed(1)
        losses.append({key: value.item() for key, value in call(module, *batch())[1].items()})
    assert losses[0] == losses[1]


PAIRS = [("plaincnn2", name) for name in MODELS if name not in ("resnet110", "vgg19", "vgg16")] + [
    (name, "resnet8x4") for name in ("wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_any_pair_of_networks(student, teacher):
    """Forward and backward of each distiller with its defaults for the stages; sizes and channels all differ."""
    students, teachers = MODELS[student](), MODELS[teacher]()
    for name, distiller in DISTILLERS.items():
        arguments = ARGUMENTS.get(name, {})
        try:
            module = distiller(copy.deepcopy(students), teachers, **arguments)
        except ValueError as error:  # FitNet has no regressor for this; the message has both shapes
            assert name == "fitnet" and str(error).count("(") == 2
            continue
        total = sum(call(module, *batch(4))[1].values())
        total.backward()
        assert total.isfinite() and all(p.grad is not None for p in module.parameters()), name


@pytest.mark.parametrize("function", ["kd_loss", "standardize", "map_shapes", "pooled_width", "_apply", "train"])
def test_what_several_files_repeat_is_the_same_in_all(function):
    copies = set()
    for name in DISTILLERS:
        for node in ast.walk(ast.parse((ROOT / "distillers" / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                node.body = node.body[ast.get_docstring(node) is not None:]
                copies.add(ast.unparse(node))
    assert len(copies) == 1


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_copied_file_works_alone(name, tmp_path):
    source = (ROOT / "distillers" / f"{name}.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == {"torch"}
    (tmp_path / f"{name}.py").write_text(source)
    code = f'''
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from torch import nn
import {name} as component

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, width, 3, 4, 1), nn.Conv2d(width, width, 3, 1, 1),
                                     nn.Conv2d(width, width, 3, 1, 1)])
        self.fc = nn.Linear(width, 10)
    def forward(self, x, return_features=False):
        maps = []
        for layer in self.layers:
            x = layer(x).relu()
            maps.append(x)
        logits = self.fc(x.mean((2, 3)))
        return (logits, {{"maps": maps, "pooled": x.mean((2, 3))}}) if return_features else logits

distiller = [value for value in vars(component).values() if isinstance(value, type)
             and value.__name__.lower() == {name!r}][0](Net(8), Net(12))
index = (torch.arange(4),) if getattr(distiller, "needs_index", False) else ()
logits, losses = distiller(torch.randn(4, 3, 32, 32), torch.arange(4), *index)
sum(losses.values()).backward()
print(sorted(losses))
'''
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "ce" in result.stdout, result.stderr
