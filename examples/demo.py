"""Trains NSA and full attention side by side on two CPU cores, and shows what both learned: `make demo`.

Same size, data, seed, steps and learning rate; one process of one thread each. Leaves in runs/demo: demo.png,
and the run folders `nsa` and `full` with everything that `pretrain.py` writes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from data import PackedText, prepare
from demo_report import Run, print_report, save_figure
from model import Decoder
from options import parse_options
from pretrain import model_config
from tqdm import tqdm

ATTENTIONS = ("nsa", "full")
STEPS = 1000
TRAINING_SECONDS = 220  # a slower machine gets fewer steps, so that the whole demo stays under five minutes
CALIBRATION_STEPS = 16
OPTIONS = {
    "context": 1024,
    "batch_size": 1,
    "lr": 3e-3,
    "beta2": 0.99,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 32,
    "ffn_size": 352,
    "rope_theta": 100.0,  # the slowest of 16 angles turns once in 470 tokens: enough for this context
    # 32 selection blocks, of which a query reads 6: from the seventh on, it has to choose.
    "compress_block_size": 32,
    "compress_stride": 16,
    "block_size": 32,
    "num_selected_blocks": 6,
    "window_size": 128,
    "val_sequences": 32,
    "checkpoint_every": 0,
    "threads": 1,
    "prompt": "def read_file(path):\n",
    "sample_tokens": 200,
}


def command_line(attention: str, folder: Path, **more: object) -> list[str]:
    """Arguments of pretrain.py for one of the two runs."""
    options = OPTIONS | {"attention": attention, "run_dir": folder / attention} | more
    named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*named, "--overwrite"]


def count_parameters(attention: str, ffn_size: int) -> int:
    options = parse_options(command_line(attention, Path(), ffn_size=ffn_size))
    with torch.device("meta"):
        return Decoder(model_config(options)).num_parameters()


def matching_ffn_size() -> int:
    """The width of full attention's SwiGLU that gives both models the same number of parameters (to 1 %).

    NSA's layer has more of them: three pairs of K and V projections, phi and the gate.
    """
    target = count_parameters("nsa", OPTIONS["ffn_size"])
    widths = range(OPTIONS["ffn_size"], 3 * OPTIONS["ffn_size"], 8)
    return min(widths, key=lambda width: abs(count_parameters("full", width) - target))


class Job:
    """One pretrain.py in its own process; its terminal output goes to a file."""

    def __init__(self, attention: str, folder: Path, data: list[str], **more: object) -> None:
        self.folder = folder / attention
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"
        self.metrics.unlink(missing_ok=True)
        script = Path(__file__).with_name("pretrain.py")
        arguments = [*command_line(attention, folder, **more), *(["--data", *data] if data else [])]
        with (self.folder / "output.txt").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(OPTIONS["threads"])},
            )

    def records(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def check(self) -> bool:
        """Whether the process has finished; a failure ends the demo with its output."""
        code = self.process.poll()
        if code:
            sys.exit(f"{' '.join(map(str, self.process.args))}\n{(self.folder / 'output.txt').read_text()}")
        return code == 0

    def finish(self) -> None:
        """Waits for the end; after Ctrl-C or a failure of the other process, for its checkpoint."""
        try:
            self.process.wait(
                10
            )  # Ctrl-C in a terminal reaches it without us, and a second one would kill it
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()


def run_both(
    folder: Path, data: list[str], steps: int, ffn_sizes: dict[str, int], **more: object
) -> list[Job]:
    """Trains both models at the same time, with a progress bar for each."""
    jobs = [
        Job(a, folder, data, steps=steps, ffn_size=ffn_sizes[a], warmup=max(steps // 20, 1), **more)
        for a in ATTENTIONS
    ]
    bars = [tqdm(total=steps, desc=f"{a:>5}", unit="step", position=i) for i, a in enumerate(ATTENTIONS)]
    try:
        running = True
        while running:
            time.sleep(0.5)
            running = not all([job.check() for job in jobs])
            for job, bar in zip(jobs, bars, strict=True):
                show_progress(bar, job.records())
    finally:
        for job in jobs:
            job.finish()
        for bar in bars:
            bar.close()
    return jobs


def show_progress(bar: tqdm, records: list[dict[str, float]]) -> None:
    latest = {name: value for record in records for name, value in record.items()}
    shown = {"loss": "loss", "val": "val_loss"}
    postfix = {label: f"{latest[name]:.3f}" for label, name in shown.items() if name in latest}
    if "tokens_per_s" in latest:
        postfix["tok/s"] = f"{latest['tokens_per_s']:,.0f}"
    bar.set_postfix(postfix, refresh=False)
    bar.update(int(latest.get("step", 0)) - bar.n)


def affordable_steps(folder: Path, data: list[str], ffn_sizes: dict[str, int], most: int) -> int:
    """Steps that both runs, started together, finish in TRAINING_SECONDS on this machine, at most `most`."""
    short = {"log_every": 4, "val_sequences": 1, "sample_tokens": 0}
    jobs = run_both(folder / "calibration", data, CALIBRATION_STEPS, ffn_sizes, **short)
    # The best of several intervals: the first one warms up, and others may use the machine for a moment.
    speeds = [[r["tokens_per_s"] for r in job.records() if "tokens_per_s" in r] for job in jobs]
    return min(most, int(TRAINING_SECONDS * min(max(s) for s in speeds) / OPTIONS["context"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", default="runs/demo")
    parser.add_argument(
        "--data", nargs="*", default=[], help="files or folders (none: Python's standard library)"
    )
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, or what {TRAINING_SECONDS} s allow")
    args = parser.parse_args()
    begin, folder = time.perf_counter(), Path(args.run_dir)
    corpus = prepare(args.data, parse_options([]).cache_dir)
    text = PackedText(corpus, "val", OPTIONS["context"])
    ffn_sizes = {"nsa": OPTIONS["ffn_size"], "full": matching_ffn_size()}
    steps = args.steps or affordable_steps(folder, args.data, ffn_sizes, STEPS)
    print(f"{steps} steps of {OPTIONS['batch_size'] * OPTIONS['context']:,} tokens each")
    jobs = run_both(folder, args.data, steps, ffn_sizes, val_every=max(steps // 6, 1))
    runs = [Run.load(job.folder, job.records()) for job in jobs]
    reports = save_figure(runs, text, folder / "demo.png")
    print_report(runs, reports)
    seconds = time.perf_counter() - begin
    print(f"\n{folder / 'demo.png'}: losses, gates, selected blocks. {seconds:.0f} s in all.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
