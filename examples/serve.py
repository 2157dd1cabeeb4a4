"""Continuous batching over a paged cache: `python examples/serve.py runs/NAME --requests 32`.

Requests arrive over time. A loop admits those for which the pages suffice, reads their prompts a chunk at a
time, gives every running sequence one token per step, and retires the finished ones, whose pages serve the
next. Without a checkpoint a small untrained model shows the mechanics.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from data import EOS, VOCAB_SIZE, encode, standard_library_files
from generate import load_model
from model import Decoder, ModelConfig, Reader
from runtime import autocast
from sampling import Sampler


@dataclass
class Request:
    """A prompt, and what has become of it. Times in seconds since the server's start."""

    number: int
    prompt: list[int]
    count: int  # most tokens to generate
    arrival: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the tokens
    read: int = 0  # tokens of the prompt that the cache has

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.count or (bool(self.tokens) and self.tokens[-1] == EOS)


class Server:
    """Requests on the sequences ("slots") of one cache. A request is admitted when the pages that it can ever
    need are free of other claims, so no running request is ever turned out.
    """

    def __init__(
        self,
        model: Decoder,
        sampler: Sampler,
        slots: int = 8,
        max_seqlen: int = 1024,
        page_block_size: int = 64,
        num_pages: int | None = None,
        chunk: int = 256,
    ) -> None:
        self.model, self.sampler, self.chunk = model, sampler, chunk
        self.cache = model.new_cache(slots, max_seqlen, page_block_size=page_block_size, num_pages=num_pages)
        self.read = Reader(model, self.cache)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by slot
        self.steps = 0

    def submit(self, request: Request) -> None:
        """Puts a request in the queue; ValueError if the cache could never hold it."""
        length, cache = len(request.prompt) + request.count, self.cache
        if (
            length > cache.max_seqlen
            or self._pages(request) > cache.allocator.num_pages
            or not request.prompt
        ):
            raise ValueError(
                f"request {request.number} has {len(request.prompt)} + {request.count} tokens; expected a "
                f"prompt, and in all at most {cache.max_seqlen} and {cache.allocator.num_pages} pages"
            )
        self.waiting.append(request)

    def step(self) -> list[tuple[Request, int]]:
        """Admits, reads one chunk of one prompt or else decodes, and retires; the requests that got a
        token.
        """
        self._admit()
        if not self.running:
            return []
        prompts = {slot: r for slot, r in self.running.items() if r.read < len(r.prompt)}
        decoding = {slot: r for slot, r in self.running.items() if slot not in prompts}
        new: list[list[int]] = [[] for _ in range(self.cache.batch_size)]
        # Prompts and decoding take turns: a long prompt delays the others by a chunk at a time.
        if prompts and (self.steps % 2 == 0 or not decoding):
            slot, request = next(iter(prompts.items()))
            new[slot] = request.prompt[request.read : request.read + self.chunk]
            request.read += len(new[slot])
        else:
            for slot, request in decoding.items():
                new[slot] = request.tokens[-1:]
        self.steps += 1
        logits = self.read(new).cpu()
        given = []
        for slot, row in zip((slot for slot, tokens in enumerate(new) if tokens), logits, strict=True):
            request = self.running[slot]
            if request.read == len(request.prompt):
                request.tokens.append(self.sampler(request.number, row))
                given.append((request, request.tokens[-1]))
                if request.finished:
                    del self.running[slot]
                    self.cache.reset([slot])
        return given

    def _admit(self) -> None:
        free = [slot for slot in range(self.cache.batch_size) if slot not in self.running]
        claimed = sum(self._pages(request) for request in self.running.values())
        while free and self.waiting:
            claimed += self._pages(self.waiting[0])
            if claimed > self.cache.allocator.num_pages:
                break
            self.running[free.pop(0)] = self.waiting.popleft()

    def _pages(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.count) // self.cache.page_block_size)


def run(server: Server, requests: Iterable[Request]) -> float:
    """Serves requests as they arrive; seconds until the last one is finished."""
    arriving = deque(sorted(requests, key=lambda request: request.arrival))
    begin = time.perf_counter()
    while arriving or server.waiting or server.running:
        now = time.perf_counter() - begin
        while arriving and arriving[0].arrival <= now:
            server.submit(arriving.popleft())
        if not (server.waiting or server.running):
            time.sleep(arriving[0].arrival - now)
            continue
        given = server.step()
        now = time.perf_counter() - begin
        for request, _ in given:
            request.times.append(now)
    return time.perf_counter() - begin


def report(requests: list[Request], seconds: float, steps: int) -> str:
    """Throughput, and the latencies that a user sees."""
    first = sorted(r.times[0] - r.arrival for r in requests)
    between = sorted(b - a for r in requests for a, b in zip(r.times, r.times[1:], strict=False))
    prompt, new = sum(len(r.prompt) for r in requests), sum(len(r.tokens) for r in requests)

    def quantiles(values: list[float]) -> str:
        if not values:
            return "-"
        middle, high = values[len(values) // 2], values[min(len(values) - 1, len(values) * 95 // 100)]
        return f"{1000 * middle:.1f} ms median, {1000 * high:.1f} ms at 95 %"

    return (
        f"{len(requests)} requests, {prompt} prompt and {new} new tokens in {seconds:.2f} s, {steps} steps\n"
        f"throughput      {new / seconds:.1f} new tokens/s, {(prompt + new) / seconds:.1f} with prompts\n"
        f"first token     {quantiles(first)}\n"
        f"between tokens  {quantiles(between)}"
    )


def random_requests(args: argparse.Namespace) -> list[Request]:
    """Beginnings of files of the standard library, arriving at random."""
    choose = random.Random(args.seed)
    files = choose.sample(standard_library_files(), args.requests)
    arrival, requests = 0.0, []
    for number, file in enumerate(files):
        length = choose.randint(args.prompt_tokens // 4, args.prompt_tokens)
        requests.append(Request(number, encode(file.read_bytes()[: length - 1]), args.new_tokens, arrival))
        arrival += choose.expovariate(args.rate) if args.rate else 0.0
    return requests


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", nargs="?", help="a run of pretrain.py with --attention nsa")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.0, help="arrivals per second (0: all at once)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="per request, unless it ends by itself")
    parser.add_argument("--slots", type=int, default=8, help="sequences that run together")
    parser.add_argument("--page-tokens", type=int, help="a multiple of the selection block (default: that)")
    parser.add_argument("--pages", type=int, help="pages in all (default: enough for every slot)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt that are read in one step")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.run_dir is None:
        model, precision = Decoder(ModelConfig(VOCAB_SIZE)).to(device).eval(), "auto"
    else:
        model, options = load_model(args.run_dir, device)
        precision = options["autocast"]
    if model.config.attention != "nsa":
        parser.error(f"{args.run_dir} is a run of --attention {model.config.attention}; expected nsa")
    requests = random_requests(args)
    with autocast(device, precision):
        server = Server(
            model,
            Sampler(args.temperature, args.top_p, args.seed),
            args.slots,
            args.prompt_tokens + args.new_tokens,
            args.page_tokens or model.config.nsa_config().block_size,
            args.pages,
            args.chunk,
        )
        seconds = run(server, requests)
    print(report(requests, seconds, server.steps))


if __name__ == "__main__":
    main()
