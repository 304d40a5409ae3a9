"""The student's optimizer, the connectors', their settings, and their learning rates as functions of the epoch."""

import math
from dataclasses import dataclass

import torch

from utils.config import setting
from utils.errors import InputError


@dataclass
class OptimizerSettings:
    name: str = setting("sgd", "the student's optimizer", choices=["sgd", "adamw"])
    lr: float = setting(0.05, "learning rate, for the batch_size beside it", above=0)
    momentum: float = setting(0.9, "sgd: momentum", low=0)
    nesterov: bool = setting(False, "sgd: Nesterov's momentum")
    betas: list[float] = setting([0.9, 0.999], "adamw: betas", low=0)
    weight_decay: float = setting(5e-4, "weight decay of the student", low=0)
    schedule: str = setting("step", "learning rate over the epochs", choices=["step", "cosine"])
    milestones: list[int] = setting([150, 180, 210], "step: epochs at which it is multiplied by gamma", low=0)
    gamma: float = setting(0.1, "step: the factor", above=0, high=1)
    warmup_epochs: int = setting(0, "epochs of linear warm-up", low=0)


@dataclass
class ConnectorSettings:
    """The distiller's own modules: regressors, projectors, DPK's transformers."""
    optimizer: str = setting("student", "student: in the student's optimizer, at its lr, as a group of its own; "
                             "adamw: an optimizer of their own, cosine", choices=["student", "adamw"])
    weight_decay: float = setting(5e-4, "weight decay of the connectors", low=0)
    lr: float = setting(1e-4, "adamw: learning rate", above=0)
    betas: list[float] = setting([0.9, 0.95], "adamw: betas", low=0)
    warmup_epochs: int = setting(20, "adamw: epochs of linear warm-up", low=0)
    min_lr: float = setting(1e-5, "adamw: learning rate at the end of the cosine", low=0)


def learning_rate(epoch, *, lr, epochs, schedule="step", milestones=(), gamma=0.1, warmup_epochs=0, min_lr=0.0):
    """The learning rate of `epoch` (from 0), a float: nothing to save, nothing to resume wrongly.

    A linear warm-up reaches `lr` at epoch `warmup_epochs`. Then "step": times `gamma` at each of `milestones`; or
    "cosine": from `lr` down towards `min_lr` at epoch `epochs` (Loshchilov and Hutter, ICLR 2017, eq. 5).
    """
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / (warmup_epochs + 1)
    if schedule == "step":
        return lr * gamma ** sum(epoch >= milestone for milestone in milestones)
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def check_optimizers(student, connectors):
    """Raise InputError for settings `optimizer` and `connectors` that the optimizers would refuse."""
    if student.name == "sgd" and student.nesterov and not student.momentum:
        raise InputError("optimizer.nesterov", "needs a momentum; valid: false, or optimizer.momentum above 0")
    for key, betas in ("optimizer", student.betas), ("connectors", connectors.betas):
        if len(betas) != 2 or max(betas) >= 1:
            raise InputError(f"{key}.betas", f"{betas} is not valid; valid: two numbers below 1")


def build_optimizers(distiller, student, connectors):
    """{"student": SGD or AdamW} and, where the settings `connectors` ask for it, {"connectors": AdamW}.

    `student` and `connectors` are the settings of those names. Otherwise the connectors are a group of their own in the
    student's optimizer, with a weight decay of their own. Every parameter of the distiller is in exactly one group.
    """
    own = {id(parameter) for parameter in distiller.student.parameters()}
    groups = [{"params": list(distiller.student.parameters()), "weight_decay": student.weight_decay}]
    rest = [parameter for parameter in distiller.parameters() if id(parameter) not in own]
    optimizers = {}
    if rest and connectors.optimizer == "adamw":
        optimizers["connectors"] = torch.optim.AdamW(
            rest, lr=connectors.lr, betas=tuple(connectors.betas), weight_decay=connectors.weight_decay, fused=True)
    elif rest:
        groups.append({"params": rest, "weight_decay": connectors.weight_decay})
    if student.name == "adamw":
        first = torch.optim.AdamW(groups, lr=student.lr, betas=tuple(student.betas), fused=True)
    else:
        first = torch.optim.SGD(groups, lr=student.lr, momentum=student.momentum, nesterov=student.nesterov, fused=True)
        for parameter in [p for group in groups for p in group["params"]] if student.momentum else ():
            # Left to itself the fused kernel makes it in the first step, and without values where GradScaler skips it.
            first.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return {"student": first} | optimizers


def set_learning_rates(optimizers, student, connectors, epoch, epochs):
    """Set the learning rates of `epoch`; return them as {"lr": …} and, with an AdamW, {"lr_connectors": …}."""
    rates = {
        "student": learning_rate(epoch, lr=student.lr, epochs=epochs, schedule=student.schedule,
                                 milestones=student.milestones, gamma=student.gamma,
                                 warmup_epochs=student.warmup_epochs),
        "connectors": learning_rate(epoch, lr=connectors.lr, epochs=epochs, schedule="cosine",
                                    warmup_epochs=connectors.warmup_epochs, min_lr=connectors.min_lr),
    }
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name]
    return {"lr" if name == "student" else "lr_connectors": rates[name] for name in optimizers}
