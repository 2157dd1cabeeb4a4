"""Options of pretrain.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

# What may differ between a run and its resumption; anything else would make it another run. The corpus and
# the sequences per step, over all processes, are compared separately.
FREE_ON_RESUME = {
    "run_dir", "cache_dir", "resume", "overwrite", "device", "threads", "compile", "data", "log_every",
    "checkpoint_every", "stop_after", "sample_tokens", "prompt", "temperature", "top_p", "batch_size",
    "accumulation",
}  # fmt: skip
NSA_OPTIONS = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "block_size": 64,
    "num_selected_blocks": 16,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 512,
}


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace of plain values."""
    parser = argparse.ArgumentParser(
        description="Pretrains a decoder-only byte-level language model with NSA or full attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run_options(parser.add_argument_group("run"))
    _add_model_options(parser.add_argument_group("model"))
    _add_training_options(parser.add_argument_group("training"))
    _add_sample_options(parser.add_argument_group("sample after training"))
    options = parser.parse_args(argv)
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    for name in ("steps", "batch_size", "accumulation", "context", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    return options


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--run-dir", default="runs/pretrain", help="checkpoint.pt, metrics.jsonl, sample.txt go here"
    )
    group.add_argument("--cache-dir", default="runs/data", help="token files of the corpora")
    group.add_argument(
        "--data", nargs="*", default=[], help="files or folders of text (none: Python's standard library)"
    )
    group.add_argument(
        "--document-bytes",
        type=int,
        default=0,
        help="join files that follow each other into documents of at least this size",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --run-dir, if there is one"
    )
    group.add_argument("--overwrite", action="store_true", help="start anew although --run-dir holds a run")
    group.add_argument("--device", default="cpu", help="cpu or cuda")
    group.add_argument("--threads", type=int, help="threads of CPU operators")
    group.add_argument(
        "--autocast", choices=("auto", "bf16", "off"), default="auto", help="auto: bf16 on CUDA only"
    )
    group.add_argument("--compile", action="store_true", help="train through torch.compile")
    group.add_argument("--deterministic", action="store_true", help="needed for a bit-exact resume on CUDA")
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    group.add_argument(
        "--checkpoint-every", type=int, default=500, help="steps between checkpoints (0: at the end)"
    )
    group.add_argument("--stop-after", type=int, help="stop at this step as if interrupted")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--attention", choices=("nsa", "full"), default="nsa")
    group.add_argument("--hidden-size", type=int, default=256)
    group.add_argument("--num-layers", type=int, default=4)
    group.add_argument("--num-heads", type=int, default=4)
    group.add_argument("--num-kv-heads", type=int, default=1)
    group.add_argument("--head-dim", type=int, default=64)
    group.add_argument("--ffn-size", type=int, default=704)
    group.add_argument("--rope-theta", type=float, default=10000.0, help="base of the rotary embedding")
    for name, default in NSA_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="NSA")
    group.add_argument("--compress-kind", choices=("mlp", "linear", "mean"), default="mlp", help="NSA")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--context", type=int, default=4096, help="tokens per sequence")
    group.add_argument("--batch-size", type=int, default=2, help="sequences per process and micro-batch")
    group.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    group.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument(
        "--min-lr-ratio", type=float, default=0.1, help="last learning rate as a share of the peak"
    )
    group.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up before the cosine")
    group.add_argument("--weight-decay", type=float, default=0.1, help="on matrices only")
    group.add_argument("--beta2", type=float, default=0.95, help="of AdamW")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--val-every", type=int, default=250, help="steps between validations (0: first and last only)"
    )
    group.add_argument(
        "--val-sequences", type=int, default=64, help="sequences per validation, over all processes"
    )


def _add_sample_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", default="def ")
    group.add_argument("--sample-tokens", type=int, default=300, help="bytes to generate (0: none)")
    group.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    group.add_argument("--top-p", type=float, default=0.95)
