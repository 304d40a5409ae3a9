"""Torchvision's classification networks by their names, with feature maps.

The maps are taken by torchvision's own feature extraction; tensors keep torchvision's names.
"""

import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

# All but those with auxiliary classifiers, which put out more than logits, and one whose tensors torch.fx renames.
TORCHVISION_NAMES = [name for name in torchvision.models.list_models(module=torchvision.models)
                     if name not in ("googlenet", "inception_v3", "maxvit_t")]


@torch.no_grad()
def map_nodes(model):
    """[(name, channels_last), …] of the modules whose outputs are the maps, from shallow to deep.

    Those that are the last at their size, among the network's children (but its head) and theirs, on a 224×224 image:
    of a ResNet relu, layer1, …, layer4; of an EfficientNet features.1, .2, .3, .5 and features. Of a Vision
    Transformer, whose blocks are all of one size, the blocks that end each quarter. channels_last: (B, H, W, C), as in
    a Swin Transformer.
    """
    if isinstance(model, torchvision.models.VisionTransformer):
        depth = len(model.encoder.layers)
        return [(f"encoder.layers.encoder_layer_{depth * quarter // 4 - 1}", False) for quarter in (1, 2, 3, 4)]
    *body, _ = model.named_children()
    children = dict(body)
    for name, child in body:
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            children |= {f"{name}.{key}": grandchild for key, grandchild in child.named_children()}
    last = {}

    def remember(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4:
                channels_last = output.shape[2] != output.shape[3]  # the image being square
                if output.shape[2] > 1:
                    last[output.shape[2]] = name, channels_last
        return hook

    handles = [child.register_forward_hook(remember(name)) for name, child in children.items()]
    training = model.training
    model.eval()(torch.zeros(1, 3, 224, 224))  # in eval mode: BatchNorm statistics stay as they are
    model.train(training)
    for handle in handles:
        handle.remove()
    return list(last.values())


def as_map(output, channels_last):
    """(B, C, H, W) of a module's output: that, (B, H, W, C), or tokens (B, 1 + H·W, C) behind a class token."""
    if output.dim() == 3:
        tokens = output[:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    return output.permute(0, 3, 1, 2) if channels_last else output


def add_preacts(body):
    """Let the extractor `body` return the input of each map's ReLU as well, "pre0" beside "map0".

    False, and nothing is changed, where a map is not the output of an nn.ReLU.
    """
    graphs = [body.train_graph, body.eval_graph]
    modules = dict(body.named_modules())
    for graph in graphs:
        [output] = [node for node in graph.nodes if node.op == "output"]
        maps = {key: node for key, node in output.args[0].items() if key.startswith("map")}
        if not all(node.op == "call_module" and type(modules[node.target]) is nn.ReLU for node in maps.values()):
            return False
        preacts = {key.replace("map", "pre"): node.args[0] for key, node in maps.items()}
        output.args = ({**output.args[0], **preacts},)
    for module in modules.values():
        if type(module) is nn.ReLU:
            module.inplace = False  # or the pre-activations would be overwritten
    body.recompile()
    return True


class TorchvisionNetwork(nn.Module):
    """Classification network `name` of torchvision with the features of this project.

    forward(x (B, 3, H, W)) -> logits (B, num_classes). With return_features, (logits, features): `maps`, the tensors
    named by map_nodes as (B, C, H, W), for a Vision Transformer its tokens without the class token; `pooled` (B, C),
    the mean of the last map over its positions; where all maps come out of a ReLU, as those of a ResNet do, `preacts`,
    the same before it.
    state_dict() has torchvision's names. image_size: side of the images, which a Vision Transformer has to know.
    """

    def __init__(self, name, num_classes=1000, image_size=224):
        super().__init__()
        arguments = {"image_size": image_size} if name.startswith("vit_") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
        maps = map_nodes(model)
        head = [key for key, _ in model.named_children()][-1]
        nodes = {node: f"map{i}" for i, (node, _) in enumerate(maps)} | {head: "logits"}
        self.body = create_feature_extractor(model, nodes)
        self.has_preacts = add_preacts(self.body)
        self.channels_last = [channels_last for _, channels_last in maps]
        self.register_state_dict_post_hook(self._without_prefix)
        self.register_load_state_dict_pre_hook(self._with_prefix)

    @staticmethod
    def _without_prefix(module, state_dict, prefix, metadata):
        for key in [key for key in state_dict if key.startswith(f"{prefix}body.")]:
            state_dict[prefix + key.removeprefix(f"{prefix}body.")] = state_dict.pop(key)

    @staticmethod
    def _with_prefix(module, state_dict, prefix, *_):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}body." + key.removeprefix(prefix)] = state_dict.pop(key)

    def forward(self, x, return_features=False):
        outputs = self.body(x)
        logits = outputs["logits"].flatten(1)
        if not return_features:
            return logits
        maps = [as_map(outputs[f"map{i}"], channels_last) for i, channels_last in enumerate(self.channels_last)]
        features = {"maps": maps, "pooled": maps[-1].mean((2, 3))}
        if self.has_preacts:
            features["preacts"] = [outputs[f"pre{i}"] for i in range(len(maps))]
        return logits, features
