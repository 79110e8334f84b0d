"""Processes that work together, as torchrun starts them: join, leave, choose a device, share and gather.

A run is distributed exactly when torchrun's variables are there.
"""
import os

import torch
import torch.distributed as dist

from script import InputError


def choose_device(name: str | None = None) -> str:
    """Check that the device `name` is there (else InputError). Without a name: cuda, mps or cpu, the first there is."""
    name = name or (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    try:
        torch.zeros(1, device=name).item()  # read back: meta makes tensors, but holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0][:160]
        raise InputError(f"--device {name}: not available here ({reason})") from None
    return name


def join_processes(device: str | None = None) -> tuple[int, int, str]:
    """Join the other processes under torchrun, each with a GPU of its own: (rank, processes, device)."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, choose_device(device)
    local = int(os.environ["LOCAL_RANK"])
    if (device or "cuda") == "cuda" and torch.cuda.is_available():
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
        if wanted > there:
            raise InputError(
                f"{wanted} processes, but GPUs: {there}; lower --nproc_per_node or give --device cpu"
            )
        torch.cuda.set_device(local)  # before the first tensor, or every process takes memory on GPU 0
        device = f"cuda:{local}"
    device = choose_device(device)
    if not dist.is_initialized():
        try:
            store, rank, processes = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps one store through its restarts. Addresses of processes that died are still in it
                # (pytorch/pytorch#135712). On several nodes the counts of restarts can differ: see docs.
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:160]
            raise InputError(f"the processes cannot meet ({reason}); start them with torchrun, "
                             "with --standalone or a free --master_port") from None
    return dist.get_rank(), dist.get_world_size(), device


def leave_processes() -> None:
    """End the group that join_processes joined, once its last exchange is over everywhere."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(own: dict) -> dict:
    """Merge the dicts of all processes: each gets the whole. Alone, a process keeps its own."""
    if not dist.is_initialized():
        return own
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the first one's buffers: each has batch-norm statistics of its own, the first's are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
