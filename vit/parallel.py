"""The processes that share a training: one, or as many as torchrun started, with DistributedDataParallel or FSDP2."""

import os
import sys
import warnings
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from .console import Problem
from .measure import pick_device
from .reference import PreNorm

__all__ = ["Processes", "leave", "processes"]

MODES = ("ddp", "fsdp")
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}  # in the environment of the processes that it starts


class Processes:
    """What one of `count` processes needs of the others. `mode` is None, for one process alone, or one of MODES."""

    def __init__(self, device, mode=None, rank=0, count=1):
        self.device, self.mode, self.rank, self.count = device, mode, rank, count
        self.first = rank == 0

    def share(self, model):
        """`model`, fused already, so that each backward pass averages the gradients of all processes."""
        if self.mode == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.mode == "fsdp":
            from torch.distributed.fsdp import fully_shard

            # of the blocks' last Linear, fused or not, which nobody changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            mesh = torch.distributed.init_device_mesh(self.device.type, (self.count,))
            for block in blocks(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def without_exchange(self, model):
        """A context in which backward passes add up gradients in each process by itself."""
        if self.mode == "ddp":
            return model.no_sync()
        return _without_reduction(model) if self.mode == "fsdp" else nullcontext()

    def sum(self, tensor):
        """The sum over all processes, in place."""
        if self.mode is not None:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """The values of all processes, in order."""
        if self.mode is None:
            return [value]
        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def _without_reduction(model):
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def blocks(model):
    """The blocks to shard by themselves: those that are fused are read as a whole. Raises Problem if there are none."""
    found = [module for module in model.modules() if isinstance(module, PreNorm)]
    found = found or list(getattr(model, "blocks", ()))  # timm's
    if not found:
        raise Problem(f"--parallel fsdp knows no blocks of {type(model).__name__} to shard: give --parallel ddp")
    return found


@contextmanager
def processes(mode, device):
    """Join the processes that torchrun started, if it did. `mode` is None ("ddp" under torchrun) or one of MODES;
    `device` as in pick_device, and each process of a machine takes a GPU of its own. Raises Problem."""
    if not os.environ.keys() >= TORCHRUN:
        if mode is not None:
            raise Problem(
                f"--parallel {mode} is for several processes, and torchrun has not started this one: "
                "torchrun --nproc_per_node 2 -m vitriton.vit.cli train ..."
            )
        yield Processes(pick_device(device))
        return
    dist = torch.distributed
    if not dist.is_available():
        raise Problem("this PyTorch was built without torch.distributed: run it without torchrun")
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    found = pick_device(device)
    if found.type != "cpu":
        if ":" in device:
            raise Problem(f"--device {device} is one GPU, and torchrun started {count} processes: give {found.type}")
        found = pick_device(f"{found.type}:{local}")
        torch.accelerator.set_device_index(local)
    dist.init_process_group(dist.get_default_backend_for_device(found))
    try:
        yield Processes(found, mode or "ddp", rank, count)
    finally:
        dist.destroy_process_group()


def leave(code):
    """End this process with an exit code. One that torchrun started ends without finalizing Python: a thread of gloo's
    may still be letting go of the last tensors, and one that asks for the GIL of an interpreter that is being finalized
    is ended by C++ with SIGABRT, now and then."""
    if os.environ.keys() >= TORCHRUN:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
