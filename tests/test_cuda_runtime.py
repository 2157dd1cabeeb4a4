"""What CUDA promises beside its numbers, on both paths: streams, graphs, no synchronisation."""

from collections.abc import Callable, Iterator

import pytest
import torch
from attention_case import attention_tensors
from cases import Case, Inputs
from harness import op
from tolerance import assert_close

from nsa_ext import NativeSparseAttention, NSAConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_path")]

CASE = Case("runtime", (700, 333), heads=(16, 2), dims=(128, 128), select=(6, 1, 2))


def arguments(x: Inputs) -> tuple:
    case = x.case
    return (*x.cu, *case.compress, case.block_size, *case.select, case.window, x.scale)


def with_gradients(x: Inputs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = {name: t.clone().requires_grad_() for name, t in attention_tensors(x).items()}
    return tensors, x.output_like()


def gradients(tensors: dict[str, torch.Tensor], x: Inputs, d_o: torch.Tensor) -> tuple[torch.Tensor, ...]:
    o, _ = op("attention")(*tensors.values(), *arguments(x))
    return torch.autograd.grad(o, list(tensors.values()), d_o)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[Callable], object]]:
    """Calls a function with every synchronisation being an error."""

    def call(fn: Callable) -> object:
        fn()  # initialisation may wait
        torch.cuda.set_sync_debug_mode("error")
        return fn()

    yield call
    torch.cuda.set_sync_debug_mode("default")


def test_no_synchronisation(no_synchronisation: Callable) -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, rest, tokens = attention_tensors(x), arguments(x), x.keys("slc")
    mean = (None, None, None, None, None, x.cu[1], x.cu[3], *CASE.compress, "mean")
    no_synchronisation(lambda: (op("attention")(*tensors.values(), *rest), op("compress")(tokens, *mean)))


def test_no_synchronisation_of_the_backward(no_synchronisation: Callable) -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, d_o = with_gradients(x)
    no_synchronisation(lambda: gradients(tensors, x, d_o))


def captured(fn: Callable[[], tuple]) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """A graph of one call after a warm-up, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fn()
    return graph, results


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_graph_replay_equals_eager(direction: str) -> None:
    first, second = (Inputs(CASE, torch.bfloat16, "cuda", seed=seed) for seed in (1, 2))
    rest = arguments(first)

    def call(tensors: dict[str, torch.Tensor], d_o: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if direction == "backward":
            return gradients(tensors, first, d_o)
        return op("attention")(*tensors.values(), *rest)

    (static, static_d_o), (fresh, fresh_d_o) = with_gradients(first), with_gradients(second)
    graph, results = captured(lambda: call(static, static_d_o))
    with torch.no_grad():
        for name, t in static.items():
            t.copy_(fresh[name])
        static_d_o.copy_(fresh_d_o)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, call(fresh, fresh_d_o), strict=True))


def test_graph_of_a_training_step() -> None:
    """Forward, backward and optimiser of the module: replays continue as eager steps would."""
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, window_size=128)
    hidden = torch.randn(1, 700, 256, device="cuda", dtype=torch.bfloat16)

    def trainer() -> tuple[NativeSparseAttention, Callable[[], tuple]]:
        torch.manual_seed(0)
        module = NativeSparseAttention(config).to("cuda", torch.bfloat16)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, capturable=True)

        def step() -> tuple:
            optimizer.zero_grad(set_to_none=True)
            module(hidden).float().square().mean().backward()
            optimizer.step()
            return ()

        return module, step

    (replayed, step), (eager, eager_step) = trainer(), trainer()
    graph, _ = captured(step)  # the warm-up is the first step
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        eager_step()
    for (name, a), b in zip(replayed.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_compiled_training_step_equals_eager() -> None:
    torch._dynamo.reset()
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, window_size=128)
    module = NativeSparseAttention(config).to("cuda", torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True)
    parameters = list(module.parameters())
    for length in (700, 900):
        hidden = torch.randn(1, length, 256, device="cuda", dtype=torch.bfloat16)
        d_o = torch.randn_like(hidden)
        actual, expected = (torch.autograd.grad(run(hidden), parameters, d_o) for run in (compiled, module))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-5 * b.abs().max().item())


def test_repeats_bitwise() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors = attention_tensors(x)
    first = op("attention_forward")(*tensors.values(), *arguments(x))
    for _ in range(5):
        again = op("attention_forward")(*tensors.values(), *arguments(x))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_repeat_bitwise() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, d_o = with_gradients(x)
    first = gradients(tensors, x, d_o)
    for _ in range(5):
        again = gradients(tensors, x, d_o)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_runs_on_the_current_stream() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, rest = attention_tensors(x), arguments(x)
    expected = op("attention")(*tensors.values(), *rest)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: t * 1 for name, t in tensors.items()}  # exists only after the sleep
        actual = op("attention")(*late.values(), *rest)[0]
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_streams_do_not_disturb_each_other() -> None:
    """Forward and backward on several streams at a time, each with workspaces and tickets of its own."""
    problems = []
    for seed in range(4):
        x = Inputs(CASE, torch.bfloat16, "cuda", seed=seed)
        tensors, d_o = with_gradients(x)
        problems.append((x, tensors, d_o, torch.cuda.Stream(), gradients(tensors, x, d_o)))
    torch.cuda.synchronize()
    for _ in range(3):
        results, gate = [], torch.cuda.Event()
        torch.cuda._sleep(200_000_000)  # so that all have work before the first begins
        gate.record()
        for x, tensors, d_o, stream, _ in problems:
            with torch.cuda.stream(stream):
                stream.wait_event(gate)
                results.append(gradients(tensors, x, d_o))
        torch.cuda.synchronize()
        for (*_, expected), actual in zip(problems, results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_strided_and_misaligned_inputs() -> None:
    case = Case("strides", (260,), heads=(4, 1), dims=(64, 64), packed=False)
    x = Inputs(case, torch.bfloat16, "cuda")
    q, k, v = x.q, x.keys("swa"), x.values("swa")
    expected = op("sliding_window_attention")(q, k, v, *x.cu, case.window, x.scale)[0]
    qkv = torch.cat([q, k, v], dim=1)
    split = qkv.split([4, 1, 1], dim=1)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:].view_as(t) for t in (q, k, v)]
    for to_fill, t in zip(shifted, (q, k, v), strict=True):
        to_fill.copy_(t)
    wide = torch.empty(260, 6, 67, dtype=q.dtype, device="cuda")
    wide[..., :64] = qkv
    odd = wide[..., :64].split([4, 1, 1], dim=1)
    for variant in (split, shifted, odd, [t.mT.contiguous().mT for t in (q, k, v)]):
        assert torch.equal(op("sliding_window_attention")(*variant, *x.cu, case.window, x.scale)[0], expected)


def test_module_like_the_cpu() -> None:
    torch.manual_seed(0)
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, window_size=128)
    module = NativeSparseAttention(config)
    hidden = torch.randn(2, 1500, 256)
    with torch.no_grad():
        exact = module.double()(hidden.double())
        baseline = module.bfloat16()(hidden.bfloat16())
        actual = module.cuda()(hidden.bfloat16().cuda())
        assert_close("module", actual, exact, baseline)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert module.float()(hidden.cuda()).dtype == torch.bfloat16
