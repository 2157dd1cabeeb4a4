"""Pretrains a decoder-only language model, with Native Sparse Attention or full attention, on any text.

    python examples/pretrain.py --attention nsa --run-dir runs/nsa           one process, CPU
    python examples/pretrain.py --device cuda --compile                      one GPU, bf16 autocast
    torchrun --nproc-per-node 2 examples/pretrain.py                         DDP: gloo on the CPU, NCCL with
    --device cuda python examples/pretrain.py --attention nsa --run-dir runs/nsa --resume  after Ctrl-C, bit
    for bit where it stopped

The run folder holds checkpoint.pt, run.json (options and machine), metrics.jsonl (one JSON object per line)
and sample.txt.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from data import VOCAB_SIZE, Batch, PackedText, prepare
from generate import generate
from model import Decoder, ModelConfig, Packing
from options import FREE_ON_RESUME, NSA_OPTIONS, parse_options
from runtime import (
    Metrics,
    Processes,
    StopRequest,
    autocast,
    configure_torch,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

GATE_RATE = 0.1  # see rate_scale


def model_config(options: Namespace) -> ModelConfig:
    """The model that the options describe."""
    shape = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "rope_theta")
    nsa = {name: getattr(options, name) for name in (*NSA_OPTIONS, "compress_kind")}
    sizes = {name: getattr(options, name) for name in shape}
    return ModelConfig(VOCAB_SIZE, **sizes, attention=options.attention, nsa=nsa)


def learning_rate(step: int, options: Namespace) -> float:
    """Linear warm-up to options.lr, then a cosine down to its min_lr_ratio share at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(options.steps - 1 - options.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine)


def rate_scale(name: str, parameter: nn.Parameter, hidden_size: int) -> float:
    """Learning rate of a parameter of NSA relative to that of the other layers.

    Adam moves all weights by about as much, and thereby a sum over n inputs by n times as much. At the rate
    of the other layers, a gate is closed before its branch has learnt anything, and the compression with its
    block_size * head_dim inputs never settles.
    """
    if ".gate_proj." in name:
        return GATE_RATE
    if name.endswith(".w1"):
        return min(1.0, hidden_size / parameter.shape[-2])
    return 1.0


def make_optimizer(model: Decoder, options: Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases and position encodings."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # phi's pe, b1 and b2 have a head dimension in front.
        is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in ("pe", "b1", "b2")
        scale = rate_scale(name, parameter, model.config.hidden_size)
        groups.setdefault((options.weight_decay * is_matrix, scale), []).append(parameter)
    described = [
        {"params": parameters, "weight_decay": decay, "rate_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    on_cuda = next(model.parameters()).is_cuda  # there, one kernel instead of a dozen passes over the weights
    return torch.optim.AdamW(described, lr=options.lr, betas=(0.9, options.beta2), fused=on_cuda)


class Trainer:
    """One training run: model, optimiser, data and the number of finished steps."""

    def __init__(self, options: Namespace, processes: Processes) -> None:
        self.options, self.processes = options, processes
        self.run_dir = Path(options.run_dir)
        self.checkpoint_path = self.run_dir / "checkpoint.pt"
        self.step, self.seconds = 0, 0.0  # finished steps; time spent in them, without validation
        if processes.is_main:
            self._claim_run_dir()
            prepare(options.data, options.cache_dir, options.document_bytes)
        processes.barrier()
        corpus = prepare(options.data, options.cache_dir, options.document_bytes)
        self.train_text = PackedText(corpus, "train", options.context)
        self.val_text = PackedText(corpus, "val", options.context)
        torch.manual_seed(options.seed)
        self.model = Decoder(model_config(options)).to(processes.device)
        self.optimizer = make_optimizer(self.model, options)
        if options.resume and self.checkpoint_path.exists():
            self._restore(load_checkpoint(self.checkpoint_path))
        self.runner = self._wrap()
        self.metrics = Metrics(self.run_dir, self.step, processes.is_main)
        if processes.is_main:
            self._describe()

    def _claim_run_dir(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists() and not self.options.resume:
            if not self.options.overwrite:
                raise SystemExit(
                    f"{self.run_dir} holds a run: give --resume, --overwrite or another --run-dir"
                )
            self.checkpoint_path.unlink()

    def _describe(self) -> None:
        """run.json, for whoever reads the metrics without the checkpoint."""
        device = self.processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        description = {
            "options": vars(self.options),
            "parameters": self.model.num_parameters(),
            "corpus_tokens": {"train": len(self.train_text.tokens), "val": len(self.val_text.tokens)},
            "machine": {"device": name, "torch": torch.__version__},
        }
        (self.run_dir / "run.json").write_text(json.dumps(description, indent=1) + "\n")

    def _wrap(self) -> nn.Module:
        if self.options.compile:
            for layer in self.model.layers:  # one graph serves them all
                layer.compile(fullgraph=True)
        runner = self.model
        if self.processes.is_distributed:
            device_ids = [self.processes.device] if self.processes.device.type == "cuda" else None
            runner = DistributedDataParallel(runner, device_ids=device_ids)
        return runner

    @property
    def sequences_per_step(self) -> int:
        return self.options.batch_size * self.options.accumulation * self.processes.world_size

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        fixed = {name: value for name, value in vars(self.options).items() if name not in FREE_ON_RESUME}
        tokens = [len(self.train_text.tokens), len(self.val_text.tokens)]
        return fixed | {"sequences_per_step": self.sequences_per_step, "tokens in the corpus": tokens}

    def save(self) -> None:
        """Everything that the next step depends on. Learning rate and data order follow from the step and the
        options.
        """
        random_states = self.processes.gather(random_state(self.processes.device))
        if self.processes.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "random_states": random_states,
                "identity": self._identity(),
                "options": vars(self.options),
                "model_config": self.model.config.to_dict(),
            }
            save_checkpoint(state, self.checkpoint_path)
        self.processes.barrier()

    def _restore(self, state: dict[str, Any]) -> None:
        ours, theirs = self._identity(), state["identity"]
        changed = [name for name in ours if ours[name] != theirs.get(name)]
        if changed:
            differences = "; ".join(f"{name}: {theirs.get(name)} -> {ours[name]}" for name in changed)
            raise SystemExit(f"--resume: {self.checkpoint_path} is of another run ({differences})")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        states = state["random_states"]
        set_random_state(states[self.processes.rank % len(states)], self.processes.device)

    def loss(self, runner: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy per token of a batch, in nats."""
        batch = batch.to(self.processes.device)
        # Each tuple of lengths would be compiled into a graph of its own.
        lengths = None if self.options.compile else batch.lengths
        packing = Packing(batch.cu_seqlens, batch.max_seqlen, lengths)
        with autocast(self.processes.device, self.options.autocast):
            return runner(batch.tokens, batch.positions, packing, batch.targets)

    def compile(self) -> None:
        """Compiles forward and backward on the next batch, so that no step's time contains it; trains
        nothing.
        """
        started = time.perf_counter()
        number = self.step * self.options.accumulation * self.processes.world_size + self.processes.rank
        batch = self.train_text.micro_batch(number, self.options.batch_size, self.options.seed)
        loss = self.loss(self.runner, batch)
        loss.backward()
        self.optimizer.zero_grad()
        loss.item()
        self.metrics.write(self.step, compile_seconds=time.perf_counter() - started)

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """One optimiser step; returns this process's mean loss, the gradient norm before clipping, and the
        learning rate.
        """
        options, processes = self.options, self.processes
        lr = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate_scale"]
        total = torch.zeros((), device=processes.device)
        for micro in range(options.accumulation):
            number = (self.step * options.accumulation + micro) * processes.world_size + processes.rank
            batch = self.train_text.micro_batch(number, options.batch_size, options.seed)
            is_last = micro == options.accumulation - 1
            with nullcontext() if is_last or not processes.is_distributed else self.runner.no_sync():
                loss = self.loss(self.runner, batch) / options.accumulation
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total, norm, lr

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # few batches do not pay for graphs of their own
    def validate(self) -> float:
        """Mean loss per token over the same part of the validation documents each time."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        batches = self.val_text.evenly(self.options.val_sequences, self.options.batch_size)
        for batch in itertools.islice(batches, self.processes.rank, None, self.processes.world_size):
            counted = (batch.targets >= 0).sum().item()
            sums += torch.stack((self.loss(self.model, batch).double() * counted, sums.new_tensor(counted)))
        self.model.train()
        loss_sum, count = self.processes.sum(sums).tolist()
        loss = loss_sum / count
        self.metrics.write(self.step, val_loss=loss, seconds=self.seconds)
        return loss

    def run(self) -> bool:
        """Trains to the last step, or to a stop request; returns whether the run is complete."""
        options, stop = self.options, StopRequest()
        last = min(options.steps, options.stop_after or options.steps)
        bar = tqdm(total=options.steps, initial=self.step, unit="step", disable=not self.processes.is_main)
        shown: dict[str, str] = {}
        if self.step == 0:
            shown["val"] = f"{self.validate():.3f}"
        if options.compile:
            self.compile()
        started, logged = time.perf_counter(), self.step
        while self.step < last:
            loss, norm, lr = self.train_step()
            bar.update()
            if self.step % options.log_every == 0 or self.step == options.steps:
                mean_loss = self.processes.sum(loss).item() / self.processes.world_size
                elapsed = time.perf_counter() - started
                speed = (self.step - logged) * self.sequences_per_step * options.context / elapsed
                self.seconds += elapsed
                tokens = self.step * self.sequences_per_step * options.context
                values = {"loss": mean_loss, "lr": lr, "grad_norm": norm.item(), "tokens": tokens}
                if self.processes.device.type == "cuda":
                    values["peak_bytes"] = torch.cuda.max_memory_allocated(self.processes.device)
                self.metrics.write(self.step, **values, tokens_per_s=speed, seconds=self.seconds)
                shown |= {"loss": f"{mean_loss:.3f}", "tok/s": f"{speed:,.0f}"}
                bar.set_postfix(shown)
                started, logged = time.perf_counter(), self.step
            pause = time.perf_counter()
            if self.step == options.steps or (options.val_every and self.step % options.val_every == 0):
                shown["val"] = f"{self.validate():.3f}"
            if self.processes.any(stop.requested):
                break
            if options.checkpoint_every and self.step % options.checkpoint_every == 0 and self.step < last:
                self.save()
            started += time.perf_counter() - pause
        bar.close()
        self.save()
        stop.restore()
        self.metrics.close()
        return self.step == options.steps


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    configure_torch(options.threads, options.deterministic)
    processes = Processes.start(options.device)
    trainer = Trainer(options, processes)
    if processes.is_main:
        tokens = f"{len(trainer.train_text.tokens):,} tokens of text"
        print(f"{options.attention}: {trainer.model.num_parameters():,} parameters, {tokens}")
    complete = trainer.run()
    if processes.is_main and not complete:
        print(f"stopped after step {trainer.step}; continue with --resume")
    if processes.is_main and complete and options.sample_tokens:
        with autocast(processes.device, options.autocast), torch.compiler.set_stance("force_eager"):
            text = generate(
                trainer.model.eval(), options.prompt, options.sample_tokens, options.context,
                options.temperature, options.top_p, options.seed,
            )  # fmt: skip
        (trainer.run_dir / "sample.txt").write_text(options.prompt + text)
        print(f"--- sample\n{options.prompt}{text}\n---")
    processes.finish()


if __name__ == "__main__":
    main()
