"""Trainings of a fused ViT, each in one process and spread over those of torchrun, for test_distributed.py.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py FILE

writes to FILE, as JSON, the losses of each training, or what it raised, and what the first process called.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fused_blocks import called
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from vitriton.kernels import use_backend
from vitriton.vit import ViT, fuse, unfuse
from vitriton.vit.parallel import leave

STEPS, BATCH = 4, 16


def vit(fused=True):
    torch.manual_seed(0)
    model = ViT(
        **{"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10, "dim": 64, "depth": 2},
        **{"heads": 4, "dim_head": 16, "mlp_dim": 128},
    )
    if fused:
        fuse(model)
    return model


def losses(model, parts=1, accumulate=False, dtype=None):
    """The global losses of STEPS steps on BATCH images, of which this process takes its part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    result = []
    for _ in range(STEPS):
        x, labels = torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(10, (BATCH,), generator=generator)
        part = slice(dist.get_rank() if parts > 1 else 0, None, parts)
        optimizer.zero_grad()
        total = torch.zeros(())
        pieces = list(zip(x[part].chunk(1 + accumulate), labels[part].chunk(1 + accumulate), strict=True))
        for i, (images, targets) in enumerate(pieces):
            if accumulate and parts > 1:
                model.require_backward_grad_sync = i == len(pieces) - 1
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets) / len(pieces)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.step(optimizer)
        scaler.update()
        if parts > 1:
            dist.all_reduce(total)
        result.append(total.item() / parts)
    return result


def sharded(mesh, choose, fused=True):
    """The ViT with what `choose` chooses of each PreNorm sharded on its own, and the rest as a whole."""
    model = vit(fused)
    for layer in model.transformer.layers:
        for block in layer:
            fully_shard(choose(block), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def first_linear(block):
    return block.fn.net[0] if hasattr(block.fn, "net") else block.fn.to_qkv


def last_linear(block):
    return block.fn.net[3] if hasattr(block.fn, "net") else block.fn.to_out[0]


LEVELS = {
    "block": lambda block: block,
    "fn": lambda block: block.fn,
    "norm": lambda block: block.norm,
    "first Linear": first_linear,
    "last Linear": last_linear,
    "norm and first Linear": lambda block: [block.norm, first_linear(block)],
}


def operators(model):
    """How often the first process calls each operator in a forward pass; all processes take part in it."""
    return called(model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)))


def distributed_tensors(mesh, fused):
    """Every parameter a DTensor, and the images too, with no hook that would tell of it."""
    model = distribute_module(vit(fused), mesh)
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = model(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
    return logits.flatten().tolist()


def main(path):
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # its Linears do, fused or not
    results = {
        "one": losses(vit()),
        "ddp": losses(DistributedDataParallel(vit()), 2),
        "ddp, accumulated": losses(DistributedDataParallel(vit()), 2, accumulate=True),
        "ddp, compiled": losses(torch.compile(DistributedDataParallel(vit()), backend="aot_eager"), 2),
        "one, fp16": losses(vit(), dtype=torch.float16),
        "ddp, fp16": losses(DistributedDataParallel(vit()), 2, dtype=torch.float16),
        "fsdp, fp16": losses(sharded(mesh, LEVELS["block"]), 2, dtype=torch.float16),
        "DTensors": [distributed_tensors(mesh, fused) for fused in (False, True)],
    }
    for level, choose in LEVELS.items():
        model = sharded(mesh, choose)
        results[f"fsdp, {level}"] = losses(model, 2)
        results[f"operators, {level}"] = operators(model)
    results["fused too late"] = str(fuse(sharded(mesh, LEVELS["block"], fused=False), dry_run=True))
    results["unfused too late"] = str(unfuse(sharded(mesh, LEVELS["block"])))
    if dist.get_rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    with use_backend("native"):
        main(sys.argv[1])
    leave(0)
