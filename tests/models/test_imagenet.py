"""Torchvision's networks with maps, and MobileNetV1."""

import copy

import pytest
import torch
import torchvision

from models import IMAGENET_MODELS
from models.imagenet import map_nodes

MAPS = {  # channels and side of the maps of a 224×224 image
    "resnet18": [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)],
    "resnet34": [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)],
    "resnet50": [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "resnet101": [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "resnet152": [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "mobilenet_v2": [(16, 112), (24, 56), (32, 28), (96, 14), (1280, 7)],
    "mobilenet_v3_large": [(16, 112), (24, 56), (40, 28), (112, 14), (960, 7)],
    "efficientnet_b0": [(16, 112), (24, 56), (40, 28), (112, 14), (1280, 7)],
    "convnext_tiny": [(96, 56), (192, 28), (384, 14), (768, 7)],
    "vit_b_16": [(768, 14)] * 4,
    "swin_t": [(96, 56), (192, 28), (384, 14), (768, 7)],
    "regnet_y_400mf": [(32, 112), (48, 56), (104, 28), (208, 14), (440, 7)],
    "squeezenet1_1": [(64, 111), (128, 55), (256, 27), (512, 13)],
    "shufflenet_v2_x0_5": [(24, 112), (24, 56), (48, 28), (96, 14), (1024, 7)],
}


@pytest.mark.parametrize("name", MAPS)
def test_logits_names_and_maps_are_torchvisions(name):
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, num_classes=10).eval()
    model = IMAGENET_MODELS[name](num_classes=10).eval()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    model.load_state_dict(original.state_dict())
    images, seen = torch.randn(2, 3, 224, 224), []
    modules = dict(original.named_modules())
    for node, _ in map_nodes(original):
        modules[node].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        expected = original(images)
        logits, features = model(images, return_features=True)
        assert torch.equal(model(images), logits)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert [(m.shape[1], m.shape[2]) for m in features["maps"]] == MAPS[name]
    for own, theirs in zip(features["maps"], seen[-len(MAPS[name]):]):
        if name == "vit_b_16":
            theirs = theirs[:, 1:].transpose(1, 2).reshape(2, 768, 14, 14)
        elif theirs.shape != own.shape:  # Swin's blocks: (B, H, W, C)
            theirs = theirs.permute(0, 3, 1, 2)
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(features["pooled"], features["maps"][-1].mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenetv1"])
def test_one_forward_updates_batch_norm_once_and_all_parameters_train(name):
    model = IMAGENET_MODELS[name](num_classes=10).train()
    logits, features = model(torch.randn(4, 3, 64, 64), return_features=True)
    (logits.sum() + sum(m.sum() for m in features["maps"])).backward()
    assert all(p.grad is not None for p in model.parameters())
    counts = [value.item() for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts and set(counts) == {1}
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name, present", [("resnet18", True), ("resnet50", True), ("resnet34", True),
                                           ("mobilenet_v2", False), ("vit_b_32", False), ("densenet121", False)])
def test_preacts_are_the_maps_before_the_relu(name, present):
    model = IMAGENET_MODELS[name](num_classes=10, **({"image_size": 64} if name.startswith("vit") else {}))
    for mode in True, False:
        model.train(mode)
        logits, features = model(torch.randn(2, 3, 64, 64), return_features=True)
        assert ("preacts" in features) == present
        for value, preact in zip(features["maps"], features.get("preacts", ())):
            assert torch.equal(value, preact.relu()) and (preact < 0).any()
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_names_hold_under_a_prefix_too():
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = IMAGENET_MODELS["shufflenet_v2_x0_5"](num_classes=10)

    around = Around()
    state = around.state_dict()
    assert "student.conv1.0.weight" in state and not any("body" in key for key in state)
    other = Around()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(around.parameters(), other.parameters()))
    state["student.conv1.0.wieght"] = state.pop("student.conv1.0.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_mobilenetv1():
    model = IMAGENET_MODELS["mobilenetv1"]().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    assert {"model.0.0.weight", "model.1.0.weight", "model.13.4.running_var", "fc.bias"} <= set(model.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        logits, features = model(images, return_features=True)
        plain = model.fc(model.model(images).mean((2, 3)))  # by the modules alone
    torch.testing.assert_close(logits, plain)
    assert [tuple(m.shape[1:]) for m in features["maps"]] == [
        (64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7)]
    for value, preact in zip(features["maps"], features["preacts"]):
        assert torch.equal(value, preact.relu())
    assert torch.equal(features["pooled"], features["maps"][-1].mean((2, 3)))


def test_a_vision_transformer_of_another_image_size():
    model = IMAGENET_MODELS["vit_b_32"](num_classes=10, image_size=64).eval()
    with torch.no_grad():
        _, features = model(torch.randn(1, 3, 64, 64), return_features=True)
    assert [tuple(m.shape) for m in features["maps"]] == [(1, 768, 2, 2)] * 4


def test_compile_sees_one_graph():
    model = IMAGENET_MODELS["resnet18"](num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, _ = model(images, return_features=True)
        model.compile(backend="eager", fullgraph=True)
        logits, features = model(images, return_features=True)
    torch.testing.assert_close(logits, expected)
    assert len(features["maps"]) == 5
