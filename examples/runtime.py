"""What a training process needs around its model: other processes, stop requests, metrics and checkpoints."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


@dataclass
class Processes:
    """This process among those that torchrun started (alone without torchrun)."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None  # a gloo group for decisions on the host, which never wait for a GPU

    @staticmethod
    def start(device: str) -> Processes:
        """Joins torchrun's group if there is one: gloo on the CPU, NCCL with one GPU per process on CUDA."""
        if "WORLD_SIZE" not in os.environ:
            return Processes(0, 1, torch.device(device))
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return Processes(dist.get_rank(), dist.get_world_size(), chosen, dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.control is not None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all get the same answer."""
        if not self.is_distributed:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The object of every process, by rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier(group=self.control)

    def finish(self) -> None:
        if self.is_distributed:
            self.barrier()
            dist.destroy_process_group()


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step in progress is finished; a second one
    acts as usual.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Metrics:
    """metrics.jsonl, and TensorBoard if it is installed; only the main process writes."""

    def __init__(self, run_dir: Path, first_step: int, active: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.active = active
        self.board = SummaryWriter(str(run_dir)) if active and SummaryWriter else None
        if active:
            # Lines that a killed run wrote behind its last checkpoint are about to be written again.
            kept = [line for line in self._lines() if first_step and json.loads(line)["step"] <= first_step]
            self.path.write_text("".join(kept))

    def _lines(self) -> list[str]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [line for line in lines if line.endswith("}\n")]

    def write(self, step: int, **values: float) -> None:
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board:
            self.board.close()


def configure_torch(threads: int | None, deterministic: bool) -> None:
    """Threads of CPU operators; deterministic algorithms (only CUDA needs them for a bit-exact resume)."""
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def autocast(device: torch.device, mode: str) -> Any:
    """The context of a forward pass; mode 'auto' is bf16 on CUDA and off on the CPU."""
    if mode == "bf16" or (mode == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes the file whole or not at all: whoever opens `path` sees the old checkpoint or the new one."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; only tensors and plain values are accepted."""
    return torch.load(path, map_location="cpu", weights_only=True)
