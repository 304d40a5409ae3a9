"""Every network of the dict against facts about it: a new one is tested by being there."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import MODELS

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared" / "cifar_models.json"

FACTS = {  # parameters with 100 classes; maps of a 32×32 image; pooled features
    "resnet8": (83892, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet14": (181108, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet20": (278324, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet32": (472756, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet44": (667188, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet56": (861620, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet110": (1736564, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet8x4": (1233540, [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    "resnet32x4": (7433860, [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    "wrn_16_1": (180916, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "wrn_16_2": (703284, [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
    "wrn_40_1": (569780, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "wrn_40_2": (2255156, [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
    "vgg8": (3965028, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512),
    "vgg11": (9277284, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512),
    "vgg13": (9462180, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512),
    "vgg16": (14774436, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512),
    "vgg19": (20086692, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)], 512),
    "mobilenetv2": (812836, [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)], 1280),
    "shufflenetv1": (949258, [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4)], 960),
    "shufflenetv2": (1355528, [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4)], 1024),
    "resnet50": (23705252, [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)], 2048),
    "plaincnn2": (30196, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "plaincnn4": (76468, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "plaincnn6": (122740, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "plaincnn8": (169012, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "plaincnn10": (215284, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
}

# Logits [0, 0] and [1, 99] and the maximum of each map, of RepDistiller's own networks (b13aecc, eedab9d) under
# `settled` weights in float64: what shapes and names do not show, such as a ReLU, a shortcut, a stride's place.
PUBLISHED_OUTPUTS = {
    "resnet20": (1.21095, -3.77674, 1.39907, 7.03291, 7.42024, 8.06157),
    "resnet8x4": (0.88004, -0.35768, 2.15090, 5.81671, 5.87916, 6.12775),
    "resnet50": (-1.57581, 0.37381, 3.64159, 9.28311, 10.06616, 12.76611, 9.79381),
    "wrn_16_1": (1.71478, 0.25005, 1.70174, 3.53864, 4.90593, 3.43438),
    "wrn_16_2": (0.35802, 0.75296, 1.70174, 4.01707, 3.42705, 3.18839),
    "vgg8": (0.62556, -0.43170, 4.14752, 4.33323, 4.08868, 3.18916, 3.36992),
    "vgg13": (-0.22276, 0.87509, 4.14163, 4.60367, 4.21366, 3.66532, 3.33397),
    "mobilenetv2": (-0.10448, -0.03392, 1.32615, 4.82769, 5.57983, 5.48525, 2.66313),
    "shufflenetv1": (-1.41516, -11.43026, 1.39652, 8.82442, 14.08309, 13.03556),
    "shufflenetv2": (0.84813, -0.04464, 1.39652, 4.52023, 3.59028, 3.87949),
}


def images(n=2, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(name, **arguments):
    """A network with BatchNorm statistics and affine parameters that matter, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name](**arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def spread(n, offset=0):
    """n numbers in [0, 1) that look random and are the same in every version of torch: squares modulo a prime."""
    return (torch.arange(n) + offset) ** 2 % 10007 / torch.tensor(10007, dtype=torch.float64)


@torch.no_grad()
def settled(name):
    """The network in float64 and train mode, where BatchNorm keeps any depth in range, its weights set by `spread`."""
    model = MODELS[name]().double().train()
    for i, p in enumerate(model.parameters()):
        values = spread(p.numel(), 31 * i).view(p.shape)
        p.copy_((values - 0.5) * (12 / p[0].numel()) ** 0.5 if p.dim() > 1 else values)  # variance 1 / fan_in
    return model


def test_there_are_facts_about_each_of_ours():
    assert len(FACTS) == 27 and FACTS.keys() <= MODELS.keys()


@pytest.mark.parametrize("name", FACTS)
@torch.no_grad()
def test_facts(name):
    parameters, maps, pooled = FACTS[name]
    model = MODELS[name]().eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    logits, features = model(images(), return_features=True)
    assert logits.shape == (2, 100)
    assert [tuple(m.shape[1:]) for m in features["maps"]] == maps
    assert features["pooled"].shape == (2, pooled)
    assert torch.equal(model(images()), logits)
    assert MODELS[name](num_classes=7)(images()).shape == (2, 7)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the list of published tensors is not here")
def test_tensors_are_named_and_shaped_as_in_the_published_files():
    for name, facts in json.loads(REFERENCE.read_text()).items():
        assert {k: list(v.shape) for k, v in MODELS[name]().state_dict().items()} == facts["state_dict"], name


def test_a_few_published_names():
    """What the reference list says, as far as it fits here: the traps of each family."""
    names = {name: set(MODELS[name]().state_dict()) for name in MODELS}
    assert {"layer2.0.downsample.1.running_var", "fc.bias"} <= names["resnet20"]
    assert not any("layer1.0.downsample" in key for key in names["resnet20"])
    assert "layer1.0.downsample.0.weight" in names["resnet8x4"]
    assert {"layer1.0.shortcut.0.weight", "linear.weight"} <= names["resnet50"]
    assert {"block1.layer.0.convShortcut.weight", "bn1.weight"} <= names["wrn_16_2"]
    assert "block1.layer.0.convShortcut.weight" not in names["wrn_16_1"]
    assert {"block2.3.bias", "block2.4.running_mean", "classifier.weight"} <= names["vgg13"]
    assert {"blocks.0.0.conv.0.weight", "blocks.0.0.conv.7.bias", "classifier.0.weight"} <= names["mobilenetv2"]
    assert {"layer1.0.conv5.weight", "layer1.1.conv3.weight", "conv2.weight", "bn2.bias"} <= names["shufflenetv2"]


@pytest.mark.parametrize("name", PUBLISHED_OUTPUTS)
@torch.no_grad()
def test_outputs_are_those_of_the_published_networks(name):
    logits, features = settled(name)(spread(2 * 3 * 32 * 32).view(2, 3, 32, 32) - 0.5, return_features=True)
    figures = [logits[0, 0], logits[1, 99], *(m.max() for m in features["maps"])]
    assert [figure.item() for figure in figures] == pytest.approx(PUBLISHED_OUTPUTS[name], abs=2e-5)


@torch.no_grad()
def test_plaincnn_skips_where_the_shape_is_kept():
    model, x = settled("plaincnn4"), spread(2 * 3 * 32 * 32).view(2, 3, 32, 32)
    expected = []
    for stage in model.stem, model.stage1, model.stage2:
        x = F.relu(stage[0].bn(stage[0].conv(x)))  # which widens and halves
        if len(stage) == 2:
            x = F.relu(x + stage[1].bn(stage[1].conv(x)))
        expected.append(x)
    maps = settled("plaincnn4")(spread(2 * 3 * 32 * 32).view(2, 3, 32, 32), return_features=True)[1]["maps"]
    assert all(torch.allclose(m, e) for m, e in zip(maps, expected))


@pytest.mark.parametrize("name", [*PUBLISHED_OUTPUTS, "plaincnn6"])
def test_initial_weights_are_spread_as_published(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in, fan_out = module.weight[0].numel(), module.weight[0, 0].numel() * module.out_channels
            # the ShuffleNets keep PyTorch's uniform; the others draw from N(0, 2 / (k² · channels out))
            std = (1 / (3 * fan_in) if name.startswith("shuffle") else 2 / fan_out) ** 0.5
            error = 1 / (2 * module.weight.numel()) ** 0.5  # of the sample's std; six of them, for some 400 tensors
            assert module.weight.std().item() == pytest.approx(std, rel=6 * error)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            small, zero = name.startswith(("vgg", "mobilenet")), name.startswith(("vgg", "mobilenet", "wrn"))
            std = 0.01 if small else (1 / (3 * module.in_features)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)
            assert (module.bias == 0).all() == zero


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv2", "plaincnn4"])
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    compiled = torch.compile(trained(name), backend="eager", fullgraph=True)  # an error where the graph would break
    with torch.no_grad():
        logits, features = compiled(images(), return_features=True)
        assert torch.allclose(logits, trained(name)(images()), atol=1e-5)
    assert len(features["maps"]) == len(FACTS[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_preacts_are_the_maps_before_the_relu(name):
    with torch.no_grad():
        features = trained(name)(images(), return_features=True)[1]
    if name == "mobilenetv2":  # linear bottlenecks: no ReLU, no preacts
        assert "preacts" not in features and all((m < 0).any() for m in features["maps"][1:])
    if "preacts" not in features:
        return
    assert [p.shape for p in features["preacts"]] == [m.shape for m in features["maps"]]
    assert all((preact < 0).any() for preact in features["preacts"])
    if name.startswith("wrn"):
        return  # whose maps come before the BatchNorm: below
    for preact, feature_map in zip(features["preacts"], features["maps"]):
        if name == "shufflenetv2" and preact.shape[1] != 24:  # half passes by, and then the channels are shuffled
            kept, out = preact.chunk(2, 1)
            expected = torch.stack([kept, F.relu(out)], 2).flatten(1, 2)  # channels 0, half, 1, half + 1, ...
        else:
            expected = F.relu(preact)
        assert torch.equal(expected, feature_map)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("wrn")])
def test_wrn_maps_are_raw_sums_and_preacts_their_next_batchnorm(name):
    model = trained(name)
    with torch.no_grad():
        features = model(images(), return_features=True)[1]
        norms = [model.block1.layer[0].bn1, model.block2.layer[0].bn1, model.block3.layer[0].bn1, model.bn1]
        assert torch.equal(features["maps"][0], model.conv1(images()))
        for norm, feature_map, preact in zip(norms, features["maps"], features["preacts"]):
            assert torch.allclose(norm(feature_map), preact, atol=1e-6)
        assert torch.allclose(features["pooled"], F.relu(features["preacts"][3]).mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_one_forward_is_one_batchnorm_pass_and_reaches_every_parameter(name):
    model = MODELS[name]().train()
    logits, features = model(images(4), return_features=True)
    assert all(m.num_batches_tracked == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    # a map that a later in-place operation had overwritten would fail here, or get no gradient
    gradients = torch.autograd.grad(logits.sum(), features["maps"], retain_graph=True)
    assert all(g.abs().sum() > 0 for g in gradients)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_are_what_the_forward_passes_on(name):
    """The logits follow from the last map alone, so the maps are tensors of the forward, not copies changed later."""
    model = trained(name)
    logits, features = model(images(), return_features=True)
    last = features["maps"][-1]
    if name.startswith("wrn"):
        last = F.relu(model.bn1(last))
    if name == "mobilenetv2":
        last = model.conv2(last)
    if name == "shufflenetv2":
        last = F.relu(model.bn2(model.conv2(last)))
    head = next(getattr(model, head) for head in ("fc", "linear", "classifier") if hasattr(model, head))
    assert torch.allclose(last.mean((2, 3)), features["pooled"], atol=1e-5)
    assert torch.allclose(head(features["pooled"]), logits, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_memory_format_precision_and_other_sizes(name):
    model = trained(name)
    logits = model(images())
    other = model.to(memory_format=torch.channels_last)(images().contiguous(memory_format=torch.channels_last))
    assert (other - logits).norm() <= 1e-4 * logits.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).isfinite().all()
    for size in 40, 64:
        assert model(images(size=size)).shape == (2, 100)


def test_vgg_pools_a_fourth_time_for_64_pixels_alone():
    model = trained("vgg8")
    for size, last in (32, 4), (64, 4), (48, 6), (96, 12):
        maps = model(images(1, size), return_features=True)[1]["maps"]
        assert maps[4].shape[2] == last and maps[3].shape[2] == size // 8


def test_shufflenets_concatenate_and_shuffle_as_published():
    """The order of channels, which no shape shows: an input that lights one channel comes out where it should."""
    from models.shufflenetv1 import channel_shuffle as shuffle1
    from models.shufflenetv2 import channel_shuffle as shuffle2

    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle1(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert shuffle1(x, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert shuffle2(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    model = trained("shufflenetv1")
    with torch.no_grad():  # the first block of a stage appends the pooled input to its own channels
        features = model(images(), return_features=True)[1]
        first = model.layer1[0](features["maps"][0])
    assert torch.equal(first[:, 216:], F.avg_pool2d(features["maps"][0], 3, 2, 1))


def test_a_copied_file_works_alone(tmp_path):
    code = "import sys, torch\n"
    for path in sorted((ROOT / "models").glob("*.py")):
        if path.stem == "__init__":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        allowed = {"torch", "torchvision"} if path.stem == "imagenet" else {"torch"}
        assert {module.split(".")[0] for module in modules} == allowed
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / f"{path.stem}_copied.py").write_text(path.read_text())
        call = {"imagenet": "TorchvisionNetwork('shufflenet_v2_x0_5', ", "mobilenetv1": "mobilenetv1("}.get(path.stem)
        call = call or next(name for name in MODELS if MODELS[name].__module__ == f"models.{path.stem}") + "("
        code += (f"sys.path[:0] = [{str(tmp_path / path.stem)!r}]\nimport {path.stem}_copied\n"
                 f"print({path.stem}_copied.{call}num_classes=3).eval()(torch.randn(1, 3, 32, 32)).shape)\n")
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.count("torch.Size([1, 3])") == 10, result.stderr
