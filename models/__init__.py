"""The networks by name. To add one: a file beside these, and a line here."""

from functools import partial

from .imagenet import TORCHVISION_NAMES, TorchvisionNetwork
from .mobilenetv1 import mobilenetv1
from .mobilenetv2 import mobilenetv2
from .plaincnn import plaincnn2, plaincnn4, plaincnn6, plaincnn8, plaincnn10
from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110
from .resnetv2 import resnet50
from .shufflenetv1 import shufflenetv1
from .shufflenetv2 import shufflenetv2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

MODELS = {  # CIFAR's
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "resnet50": resnet50,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
    "plaincnn2": plaincnn2,
    "plaincnn4": plaincnn4,
    "plaincnn6": plaincnn6,
    "plaincnn8": plaincnn8,
    "plaincnn10": plaincnn10,
}

IMAGENET_MODELS = {"mobilenetv1": mobilenetv1} | {name: partial(TorchvisionNetwork, name) for name in TORCHVISION_NAMES}
