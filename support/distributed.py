"""Processes that work together, as torchrun starts them: join, leave, choose a device, share, gather, stop.

A run is distributed exactly when torchrun's variables are there. Alone, a process does all of this by itself.
"""

import datetime
import os
import signal
import socket

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.script import InputError, first_line, one_line, require

JOIN = datetime.timedelta(seconds=50)  # how long processes wait for each other at the start


def choose_device(name: str | None = None) -> str:
    """The device `name`, or else the first there is of cuda, mps, cpu. Raises InputError if absent."""
    if not name:
        gpu = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else gpu
    try:
        torch.zeros(1, device=name).item()  # read back: meta makes tensors, but holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)})") from None
    return name


def join_processes(device: str | None = None) -> tuple[int, int, str]:
    """Join the other processes under torchrun, each with a GPU of its own: (rank, processes, device)."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, choose_device(device)
    local = int(os.environ["LOCAL_RANK"])
    if (device or "cuda") == "cuda" and torch.cuda.is_available():
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
        require(wanted <= there,
                f"{wanted} processes, but GPUs: {there}; lower --nproc_per_node or give --device cpu")
        torch.cuda.set_device(local)  # before the first tensor, or every process takes memory on GPU 0
        device = f"cuda:{local}"
    device = choose_device(device)
    try:
        store, rank, processes = next(dist.rendezvous("env://", timeout=JOIN))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store through its restarts. Addresses of processes that died are still in
            # it (pytorch/pytorch#135712). On several nodes the counts of restarts can differ: see docs.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(processes)], JOIN)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot meet ({first_line(error)}); start them with torchrun, "
                         "with --standalone or a free --master_port") from None
    return rank, processes, device


def leave_processes() -> None:
    """End the group that join_processes joined, once its last exchange is over everywhere."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def print_once(line: str) -> None:
    """Print a line, once for all processes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(line)


def gather(own: dict) -> dict:
    """Merge the dicts of all processes: each gets the whole."""
    if not dist.is_initialized():
        return own
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def all_or_none(make):
    """Call `make()` in every process: its result. If any raises InputError all do, one line a machine."""
    result, text = None, None
    try:
        result = make()
    except (InputError, OSError) as error:
        text = one_line(error)
    rank = dist.get_rank() if dist.is_initialized() else 0
    machine = os.environ.get("GROUP_RANK", "0")
    failed = gather({rank: (text, machine)} if text else {})
    if failed:
        first = min(failed)
        here = [other for other, (_, where) in failed.items() if where == machine]
        reported = rank != min(here) if here else os.environ.get("LOCAL_RANK", "0") != "0"
        raise InputError(text or f"process {first} has given up: {failed[first][0]}", reported)
    return result


def from_first(make):
    """Call `make()` in the first process, and give its result to all. Its InputError is raised in all."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    result = [all_or_none(lambda: None if rank else make())]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def share_weights(model: torch.nn.Module) -> None:
    """Give every process the first one's weights and batch-norm statistics of a model."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def launch_id() -> str | None:
    """Name this start of torchrun: the same in its restarts, another in the next. None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}/{socket.gethostname()}/{os.getppid()}"


class StopFlag:
    """Catches Ctrl-C and SIGTERM, and lets all processes stop at the same step whichever of them was told."""

    def __init__(self):
        self.number = 0
        self.ends_at_once = False
        # A group of its own, on the CPU: asking the others must not wait for a GPU.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._caught)

    def _caught(self, number, _):
        self.number = self.number or number
        if self.ends_at_once:
            raise SystemExit(self.code)

    def at_once(self, ends: bool) -> None:
        """Let a signal, also one that has come, end this process now; or be remembered until all agree."""
        self.ends_at_once = ends
        if ends and self.number:
            raise SystemExit(self.code)

    @property
    def code(self) -> int:
        """The exit code that shells expect of a process that a signal ended; 0 if there was none."""
        return 128 + self.number if self.number else 0

    def agreed(self) -> bool:
        """Whether any process was told to stop. All processes must ask at the same moment."""
        if self.group is not None:
            told = torch.tensor(self.number)
            dist.all_reduce(told, dist.ReduceOp.MAX, self.group)
            self.number = told.item()
        if self.number:  # this process ends by itself; torchrun sends more signals once another has left
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        return self.number > 0

    def check(self) -> None:
        """Exit if any process was told to stop. All processes must ask at the same moment."""
        if self.agreed():
            raise SystemExit(self.code)
