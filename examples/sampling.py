"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor


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


class Sampler:
    """choose() with a random stream for each sequence: what one gets does not depend on the others."""

    def __init__(self, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0) -> None:
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, sequence: int, logits: Tensor) -> int:
        """A token for the sequence of this number from its logits [vocab]."""
        if sequence not in self._generators:
            self._generators[sequence] = torch.Generator().manual_seed(self.seed + sequence)
        return choose(logits, self.temperature, self.top_p, self._generators[sequence])


def greedy(sequence: int, logits: Tensor) -> int:
    """The likeliest token."""
    return int(logits.argmax())
