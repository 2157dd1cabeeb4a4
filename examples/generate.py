"""Text from a trained model: `python examples/generate.py runs/NAME --prompt "def "`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import EOS, decode, encode
from model import Decoder, ModelConfig
from runtime import autocast, load_checkpoint
from sampling import Sampler


def load_model(run_dir: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, dict]:
    """The model of a run's checkpoint, in evaluation mode, and the run's options."""
    state = load_checkpoint(Path(run_dir) / "checkpoint.pt")
    model = Decoder(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["options"]


def stream(
    model: Decoder, prompts: list[str], count: int, context: int, sampler: Sampler
) -> Iterator[tuple[int, int]]:
    """(prompt's number, token) of up to `count` tokens behind each prompt, until EOS.

    Positions stay below `context`, what the model was trained for: a text that reaches it is read again from
    its last three quarters.
    """
    texts = [encode(prompt) for prompt in prompts]
    left = dict.fromkeys(range(len(prompts)), count)
    while any(left.values()):
        going = [number for number, n in left.items() if n]
        visible = [texts[i] if len(texts[i]) < context else texts[i][-(context * 3 // 4) :] for i in going]
        room = max(1, context - max(map(len, visible)))
        round_count = min(room, max(left.values()))
        for row, token in model.generate(visible, round_count, sampler, stop=(EOS,)):
            number = going[row]
            if left[number] == 0:
                continue
            texts[number].append(token)
            left[number] = 0 if token == EOS else left[number] - 1
            yield number, token


def generate(
    model: Decoder,
    prompt: str,
    count: int,
    context: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Up to `count` bytes that follow the prompt."""
    sampler = Sampler(temperature, top_p, seed)
    return decode(token for _, token in stream(model, [prompt], count, context, sampler))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--prompt", nargs="+", default=["def "], help="several go as one batch")
    parser.add_argument("--count", type=int, default=300, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model, options = load_model(args.run_dir, device)
    sampler = Sampler(args.temperature, args.top_p, args.seed)
    tokens: list[list[int]] = [[] for _ in args.prompt]
    begin = time.perf_counter()
    with autocast(device, options["autocast"]):
        if len(args.prompt) == 1:
            print(args.prompt[0], end="")
        for number, token in stream(model, args.prompt, args.count, options["context"], sampler):
            tokens[number].append(token)
            if len(args.prompt) == 1 and token < 256:
                sys.stdout.buffer.write(bytes([token]))
                sys.stdout.flush()
    seconds = time.perf_counter() - begin
    if len(args.prompt) > 1:
        for prompt, text in zip(args.prompt, tokens, strict=True):
            print(f"--- {prompt}{decode(text)}")
    count = sum(map(len, tokens))
    print(f"\n{count} tokens in {seconds:.1f} s, {count / seconds:.0f} per second", file=sys.stderr)


if __name__ == "__main__":
    main()
