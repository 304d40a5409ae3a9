"""One step of training up to its gradients: as it is written, or as one CUDA graph."""

import torch

from utils.errors import InputError, one_line
from utils.log import Table


def forward_backward(run, images, targets, table, row, accumulate=1):
    """Losses of a batch into `row` of the table, their gradients, divided by `accumulate`, into the parameters."""
    index = (run.train_loader.indices,) if getattr(run.distiller, "needs_index", False) else ()
    with run.autocast():
        logits, losses = run.model(images, targets, *index)
    run.scaler.scale(sum(losses.values()) / accumulate).backward()
    metrics = getattr(run.distiller, "metrics", {})
    table.write(row, losses, metrics, (logits.argmax(1) == targets).sum(), len(targets))


class WaitsForDevice(Exception):
    """The step waits for the device, so that it cannot be captured as a CUDA graph."""


def out_of_memory(error):
    """Whether a GPU was full: cuBLAS and the driver say so in a plain RuntimeError, and the end of a capture that this
    broke off may raise another in its place.
    """
    return ("out of memory" in str(error) or "ALLOC_FAILED" in str(error)
            or error.__context__ is not None and out_of_memory(error.__context__))


def warm_up(body):
    """body() three times before its capture: cuDNN and others choose their kernels.

    Raises WaitsForDevice where the last time it waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            body()
            body()
            torch.cuda.set_sync_debug_mode("error")
            try:
                body()
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise WaitsForDevice(one_line(error)) from None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)


def plain_values(distiller):
    """What its modules hold as numbers, strings, lists and tuples, as the weight of a loss that set_epoch changes."""
    return [(key, repr(value)) for module in distiller.modules() for key, value in vars(module).items()
            if isinstance(value, (int, float, str, list, tuple))]


class GraphedStep:
    """A step from the indices of its images to its gradients as one CUDA graph.

    One launch takes the place of hundreds: at 64 small images a GPU waits for the launches most of the time. For one
    process and one batch a step; the optimizers stay outside. prepare(run, indices) before each epoch, then
    step(indices, table, row).
    """

    def __init__(self, device):
        self.graph, self.table, self.captured = None, Table(1, device), None

    def _body(self, run):
        run.distiller.zero_grad()  # to None: the backward pass makes new ones, in the graph's own memory
        self.table.clear()
        forward_backward(run, *run.train_loader.load(self.indices), self.table, 0)

    def prepare(self, run, indices):
        """Capture, with `indices` (B,) of a batch of the usual size; weights and buffers stay as they are.

        Again where set_epoch has changed one of the distiller's plain_values: a graph keeps those it was made with.
        Raises WaitsForDevice for a step that does, and leaves nothing of it behind; InputError where the capture itself
        fails: too late to go on without.
        """
        if plain_values(run.distiller) == self.captured:
            return
        buffers = {name: buffer.clone() for name, buffer in run.distiller.named_buffers()}
        self.indices = indices.clone()
        try:
            if self.graph is None:
                warm_up(lambda: self._body(run))
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self._body(run)
            except RuntimeError as error:
                if out_of_memory(error):  # of this GPU at this moment, and no setting's fault
                    raise
                raise InputError("cuda_graph", f"{one_line(error)}; valid: false") from None
            self.gradients = [(parameter, parameter.grad) for parameter in run.distiller.parameters()]
            self.captured = plain_values(run.distiller)
        finally:
            run.distiller.zero_grad()  # nothing is in them yet
            for name, buffer in run.distiller.named_buffers():
                buffer.copy_(buffers[name])

    def __call__(self, indices, table, row):
        """Gradients of the images `indices` (B,), losses into `row`. False, and nothing done, for another B than
        that captured.
        """
        if len(indices) != len(self.indices):
            return False
        self.indices.copy_(indices)
        self.graph.replay()
        table.add(row, self.table)
        for parameter, gradient in self.gradients:  # zero_grad() took them away
            parameter.grad = gradient
        return True
