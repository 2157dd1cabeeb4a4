"""Generation with a cache: examples/model.py, generate.py and serve.py against forwards over everything."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import serve
from generate import stream
from model import Decoder, ModelConfig, Reader
from sampling import Sampler

NSA = {
    "compress_block_size": 16,
    "compress_stride": 8,
    "block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 16,
}
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 48}
VOCAB = 40
PROMPTS = [[1, 2, 3], list(range(30)) * 3, [7] * 17, list(range(39))]


def make_model(attention: str = "nsa", **nsa) -> Decoder:
    torch.manual_seed(1)
    model = Decoder(
        ModelConfig(VOCAB, attention=attention, nsa=(NSA | nsa) if attention == "nsa" else {}, **SHAPE)
    )
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)  # it starts at zero
    return model.double().eval()


def follow(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, the whole forward for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.read_again([tokens])[0].argmax()))
    return tokens[len(prompt) :]


def collect(model: Decoder, *args, **kwargs) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in model.generate(PROMPTS, *args, **kwargs):
        tokens[number].append(token)
    return tokens


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("nsa", {}),
        ("nsa", {"chunk": 13}),
        ("nsa", {"page_block_size": 32}),
        ("nsa", {"page_block_size": 16, "chunk": 31, "num_pages": 30}),
        ("full", {}),
        ("full", {"chunk": 20}),
    ],
)
def test_greedy_generation_of_a_batch_equals_whole_forwards(attention, options):
    model = make_model(attention)
    assert collect(model, 25, **options) == [follow(model, prompt, 25) for prompt in PROMPTS]


def model_on(device: str) -> Decoder:
    """What GPUs have kernels for; every block is selected, so that no near-tie of the selection decides."""
    torch.manual_seed(1)
    shape = SHAPE | {"hidden_size": 128, "head_dim": 64}
    model = Decoder(ModelConfig(VOCAB, nsa=NSA | {"block_size": 32}, **shape))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.to(device).eval()


def assert_greedy(model: Decoder, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the best one behind the whole forward of those before it, but for rounding to 16 bits."""
    for i, token in enumerate(tokens):
        logits = model.read_again([prompt + tokens[:i]])[0].float()
        assert logits[token] >= logits.max() - 0.02 * (logits.max() - logits.min()), i


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"page_block_size": 64, "chunk": 31}], ids=["contiguous", "paged"])
def test_generation_under_autocast(device, options):
    model = model_on(device)
    with torch.autocast(device, torch.bfloat16):
        for prompt, tokens in zip(PROMPTS, collect(model, 25, **options), strict=True):
            assert len(tokens) == 25
            assert_greedy(model, prompt, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"page_block_size": 64}], ids=["contiguous", "paged"])
def test_the_graph_reads_what_eager_steps_read(options, precision):
    model, choose = model_on("cuda"), random.Random(0)
    if precision == "bfloat16":
        model = model.bfloat16()

    def context():
        return torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast")

    with context():
        readers = [Reader(model, model.new_cache(3, 256, **options)) for _ in range(2)]
    eager, graphed = readers
    eager.EAGER_STEPS = 1000
    for step in range(70):
        new = [[choose.randrange(VOCAB)] if choose.random() < 0.7 else [] for _ in range(3)]
        if step in (0, 40):
            new = [list(range(30)), [5], [7] * 90] if step == 0 else [[], [3] * 50, [1]]
            for reader in readers:
                reader.cache.reset([1])
        if not any(new):
            continue
        with context():  # what autocast keeps does not outlive it
            expected, actual = eager(new).float(), graphed(new).float()
        assert (actual - expected).abs().max() <= 0.02 * (expected.max() - expected.min()), step
    assert graphed.graph is not None and eager.graph is None


def test_shared_keys():
    model = make_model(share_kv=True)
    assert collect(model, 12) == [follow(model, prompt, 12) for prompt in PROMPTS]


def test_stop_tokens_end_a_sequence_and_not_the_others():
    model = make_model()
    free = collect(model, 20)
    stop = free[1][5]
    expected = [t[: t.index(stop) + 1] if stop in t else t for t in free]
    assert collect(model, 20, stop=(stop,)) == expected
    assert len(expected[1]) <= 6


def test_sampling_is_reproducible_and_independent_of_the_batch():
    model = make_model()
    batch = collect(model, 10, Sampler(1.0, 0.9, seed=3))
    assert (
        batch
        == collect(model, 10, Sampler(1.0, 0.9, seed=3))
        != collect(model, 10, Sampler(1.0, 0.9, seed=4))
    )
    assert batch[0] == [token for _, token in model.generate(PROMPTS[:1], 10, Sampler(1.0, 0.9, seed=3))]


def test_tokens_come_as_they_are_made():
    tokens = make_model().generate(PROMPTS, 1000)
    assert [next(tokens)[0] for _ in range(4)] == [0, 1, 2, 3]
    assert next(iter(make_model().generate([[], [3]], 2)))[0] == 1
    assert list(make_model().generate(PROMPTS, 0)) == []
    with pytest.raises(ValueError, match="the cache is full"):
        list(make_model().generate(PROMPTS, 30, page_block_size=16, num_pages=14))


def test_text_goes_on_beyond_the_context():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(264, nsa=NSA, **SHAPE)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    numbers = [number for number, _ in stream(model, ["x" * 20, "y" * 50], 90, 64, Sampler(1.0, 1.0, 0))]
    assert 0 < numbers.count(0) <= 90 and 0 < numbers.count(1) <= 90


# --- serving


def make_server(**options) -> serve.Server:
    defaults = {"slots": 3, "max_seqlen": 128, "page_block_size": 32, "chunk": 24}
    return serve.Server(make_model(), Sampler(temperature=0), **(defaults | options))


def make_requests(count: int = 7) -> list[serve.Request]:
    return [serve.Request(i, [(5 * i + j) % VOCAB for j in range(4 + 13 * i)], 6 + i) for i in range(count)]


@pytest.mark.parametrize("num_pages", [None, 5])
def test_requests_get_what_they_would_get_alone(num_pages):
    server, requests = make_server(num_pages=num_pages), make_requests()
    seconds = serve.run(server, requests)
    for request in requests:
        assert request.tokens == follow(server.model, request.prompt, request.count)
        assert len(request.times) == len(request.tokens)
    assert server.cache.num_free_pages == server.cache.allocator.num_pages
    assert server.cache.lengths == (0, 0, 0)
    text = serve.report(requests, seconds, server.steps)
    assert "7 requests, 301 prompt and 63 new tokens" in text and "first token" in text


@pytest.mark.parametrize("device", DEVICES)
def test_requests_under_autocast(device):
    model, requests = model_on(device), make_requests()
    with torch.autocast(device, torch.bfloat16):
        server = serve.Server(model, Sampler(0), slots=3, max_seqlen=128, page_block_size=32, chunk=24)
        serve.run(server, requests)
        for request in requests:
            assert len(request.tokens) == request.count
            assert_greedy(model, request.prompt, request.tokens)
    assert server.cache.num_free_pages == server.cache.allocator.num_pages


def test_a_request_that_never_fits_is_refused():
    with pytest.raises(ValueError, match=r"request 0 has 100 \+ 29 tokens"):
        make_server().submit(serve.Request(0, [1] * 100, 29))
    with pytest.raises(ValueError, match="at most 128 and 3 pages"):
        make_server(num_pages=3).submit(serve.Request(0, [1] * 100, 20))


def test_the_command_line(capsys):
    serve.main(
        ["--requests", "3", "--prompt-tokens", "40", "--new-tokens", "3", "--slots", "2", "--rate", "200"]
    )
    assert "3 requests" in capsys.readouterr().out
