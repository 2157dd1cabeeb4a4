"""Text from a trained model: `python examples/generate.py runs/NAME --prompt "def "`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import EOS, decode, encode
from model import Decoder, ModelConfig, Packing
from runtime import autocast, load_checkpoint
from torch import Tensor


def load_model(run_dir: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, dict]:
    """The model of a run's checkpoint, in evaluation mode, and the run's options."""
    state = load_checkpoint(Path(run_dir) / "checkpoint.pt")
    model = Decoder(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["options"]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocab]: the best one at temperature 0, else drawn from the nucleus of mass
    top_p.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double().cpu() / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the token that crosses top_p stays
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: str,
    count: int,
    context: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Up to `count` bytes that follow the prompt. The whole forward pass runs again for each token, over the
    last `context`.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = encode(prompt)
    for _ in range(count):
        visible = torch.tensor(tokens[-context:], device=device)
        length = len(visible)
        packing = Packing(torch.tensor([0, length], dtype=torch.int32, device=device), length, (length,))
        logits = model(visible, torch.arange(length, device=device), packing)
        tokens.append(choose(logits[-1], temperature, top_p, generator))
        if tokens[-1] == EOS:
            break
    return decode(tokens[len(encode(prompt)) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--count", type=int, default=300, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, options = load_model(args.run_dir, device)
    with autocast(device, options["autocast"]):
        text = generate(
            model, args.prompt, args.count, options["context"], args.temperature, args.top_p, args.seed
        )
    print(args.prompt + text)


if __name__ == "__main__":
    main()
