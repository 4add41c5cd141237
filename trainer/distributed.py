"""Several processes that train one adapter: started by torchrun or `accelerate launch`, a single one otherwise.

Every process runs the same program on the same numbers; what costs is shared out. Each samples its part of the replies, passes its
part of them through the model and sums its part of the gradient, and all of them then hold the whole. So every decision falls the
same way everywhere, and the number of processes changes results by rounding only.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

Item = TypeVar("Item")

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for the others: longer than the others may work alone, so that only a dead one is given up."""


def start() -> None:
    """Join the others, where a launcher said that there are any. Each takes the GPU of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """Of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def turns(items: Sequence[Item]) -> list[tuple[Item, bool]]:
    """This process's part, and whether it counts: neighbours stay together, and all parts together are the whole, in order.

    Everybody gets equally many, some that do not count among them: a sharded backbone takes every pass on all processes at once.
    """
    n, r, k = len(items), rank(), size()
    part = [(item, True) for item in items[n * r // k : n * (r + 1) // k]]
    return part + [(items[0], False)] * (-(-n // k) - len(part))


def gather(part: list[Item]) -> list[Item]:
    """Everybody's parts as one list, the inverse of `turns` for those that count."""
    if size() == 1:
        return part
    parts: list[list[Item]] = [[] for _ in range(size())]
    dist.all_gather_object(parts, part)
    return [item for some in parts for item in some]


def total(*tensors: Tensor) -> None:
    """Replace each by its sum over the processes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients; a process whose part did not reach a parameter adds 0. An adapter is small, so this is one message."""
    if size() == 1:
        return
    reached = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in reached])
    dist.all_reduce(flat)
    for p, grad in zip(reached, torch.split(flat, [p.numel() for p in reached]), strict=True):
        p.grad = grad.view_as(p).clone()


def from_first(value: Item) -> Item:
    """What rank 0 holds: for what only it may decide or can know."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard(base: Any, device: torch.device, adapters: Iterable[torch.nn.Parameter]) -> None:
    """Leave each process its part of the frozen layers (FSDP); embeddings, head and adapters stay whole everywhere.

    A layer's weights are together only while it computes. It moves to the device layer by layer, so no device ever holds all.
    """
    mesh = init_device_mesh(device.type, (size(),))
    whole = {*adapters, *base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()}
    for module in list(base.base_model.modules()):
        if type(module).__name__ in (base._no_split_modules or ()):
            fully_shard(module, mesh=mesh, ignored_params=whole)
    # The trunk on top makes them one group, which knows its layers' order.
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)
    base.to(device)


def all_agree(flag: bool) -> bool:
    """Whether it is true everywhere."""
    if size() == 1:
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return int(count) == size()
