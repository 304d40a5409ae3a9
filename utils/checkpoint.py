"""Files that survive: written under a temporary name and renamed; read without executing anything."""

import argparse
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from numpy._core.multiarray import scalar

from utils.errors import InputError

# What published teacher files hold beside tensors: the options of the run, and numpy's scalars (RepDistiller's learning
# rate is an np.float64). Allowed by name; a file that asks for anything else is refused before it does anything.
ALLOWED = [argparse.Namespace, np.dtype, (scalar, "numpy.core.multiarray.scalar"),
           (scalar, "numpy._core.multiarray.scalar"),
           *{type(np.dtype(t)) for t in (np.bool_, np.int32, np.int64, np.float16, np.float32, np.float64)}]


def write(path, data, key="runs"):
    """Write text or bytes to `path`: whole, or not at all. Raises InputError on `key` where the disk refuses."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if os.path.isfile(partial):  # Path.is_file raises where the name is too long
            partial.unlink()
        raise InputError(key, f"cannot write {path}: {error.strerror}; what was there before is kept") from None


def append(path, entry):
    """Add a dict to a file of JSON lines. Raises InputError where the disk refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())  # on the disk before a checkpoint that is ahead of it
    except OSError as error:
        raise InputError("runs", f"cannot write {path}: {error.strerror}") from None


def save(path, content):
    """torch.save, atomic. By way of memory, since torch's own writer hides why a disk refuses."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load(path, key):
    """The content of a torch file, a dict with its tensors on the CPU; nothing executed. Raises InputError on `key`."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(key, f"{path} is missing") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(key, f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        # The reason follows torch's advice to load the file unsafely.
        reason = re.split(r"WeightsUnpickler error:|\n\n", str(error), maxsplit=1)[-1].strip().split("\n")[0]
        raise InputError(key, f"{path} is not a file of weights alone, such as a state_dict, or damaged: "
                         f"{reason.split(' Please use')[0]}") from None
    except Exception as error:  # a damaged file raises all sorts, struct.error and AssertionError among them
        said = "" if isinstance(error, LookupError) else str(error)  # of the unpickler's own stack, or a bare key
        reason = [*said.splitlines(), type(error).__name__][0]
        raise InputError(key, f"{path} is damaged or not a torch file: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(key, f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _bare(name):
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name


def network_weights(content):
    """The state dict of one network in what RepDistiller, mdistiller, ReviewKD or this project saved.

    Known: {"model": state dict}, {"state_dict": …}, {"distiller": …} (our latest.pth), a bare state dict; names under
    module., student. (beside a teacher and connectors, which are left out) and _orig_mod., in any order.
    """
    for key in "model", "state_dict", "distiller":
        if isinstance(content.get(key), dict):
            content = content[key]
    weights = {_bare(name): value for name, value in content.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if any(name.startswith("student.") for name in weights):
        weights = {_bare(name.removeprefix("student.")): value
                   for name, value in weights.items() if name.startswith("student.")}
    return weights


def fill_network(model, content, path, name, key):
    """Load the content of a file into `model`, strictly; returns the model. Raises InputError on `key`.

    `path` and `name`, the network's, are for the message. Half precision is widened; num_batches_tracked, which old
    files lack, stays as it is.
    """
    weights, own = network_weights(content), model.state_dict()
    if not any(tensor in own for tensor in weights if not tensor.endswith("num_batches_tracked")):
        found = f"; it begins with {', '.join(list(weights)[:3])}, {name} with {', '.join(list(own)[:3])}"
        raise InputError(key, f"{path} holds no weights of {name}{found if weights else ''}")
    for tensor in own:
        if tensor.endswith("num_batches_tracked"):
            weights.setdefault(tensor, own[tensor])
        if tensor not in weights:
            raise InputError(key, f"{path} does not fit {name}: {tensor} is not in the file")
        if weights[tensor].shape != own[tensor].shape:
            raise InputError(key, f"{path} does not fit {name}, or its number of classes: "
                             f"{tensor} is {tuple(weights[tensor].shape)} in the file, {tuple(own[tensor].shape)} here")
        if own[tensor].is_floating_point() and not weights[tensor].is_floating_point():
            raise InputError(key, f"{path} does not fit {name}: {tensor} is {weights[tensor].dtype} in the file")
        if not weights[tensor].isfinite().all():
            raise InputError(key, f"{path}: {tensor} is not finite")
    for tensor in weights:
        if tensor not in own:
            raise InputError(key, f"{path} does not fit {name}: {name} has no {tensor}")
    model.load_state_dict(weights)
    return model
