"""NativeSparseAttention inside what PyTorch offers: compile, export, autocast, checkpointing, DDP, state
dicts."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from test_module import BASE, assert_equal, assert_grads_equal, make, random_input, recompute
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsa_ext import NativeSparseAttention, NSAConfig


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["batch", "packed", "mask"])
def test_compiles_to_one_dynamic_graph_with_backward(layout):
    module = make()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 57, 83):
        x, kwargs = random_input(2, length), {}
        if layout == "packed":
            x = x.flatten(0, 1)
            kwargs = {"cu_seqlens": torch.tensor([0, 3, length, 2 * length], dtype=torch.int32)}
        elif layout == "mask":
            kwargs = {"attention_mask": torch.arange(length).expand(2, -1) < torch.tensor([[length], [11]])}
        x.requires_grad_()
        actual, expected = compiled(x, **kwargs), module(x, **kwargs)
        assert_equal(actual, expected)
        assert_grads_equal(actual, expected, [x, *module.parameters()])
    assert counter.frame_count == 1


def test_layers_with_other_floats_do_not_share_a_graph():
    """A float of the config is a constant of the graph, so it must be guarded."""
    x = random_input(1, 40)
    for changes in ({}, {"rope_theta": 500.0}, {"softmax_scale": 0.9}):
        module = make(**changes)
        assert_equal(torch.compile(module, backend="eager", fullgraph=True, dynamic=True)(x), module(x))


@pytest.mark.slow
def test_compiles_with_inductor():
    module = make()
    x = random_input(2, 40).requires_grad_()
    actual = torch.compile(module, fullgraph=True)(x)
    expected = module(x)
    assert_equal(actual, expected)
    assert_grads_equal(actual, expected, [x, *module.parameters()])


def test_exports_with_a_dynamic_length():
    module = make().eval()
    length = torch.export.Dim("length", min=4, max=4096)  # at least two compressed rows
    exported = torch.export.export(module, (random_input(2, 40),), dynamic_shapes=({1: length},))
    for n in (40, 71):
        x = random_input(2, n)
        assert_equal(exported.module()(x), module(x))


def test_info_passes_through_export_and_compile():
    module, x = make(), random_input(2, 40)
    expected, expected_info = module(x, return_info=True)
    exported = torch.export.export(module, (x,), {"return_info": True}).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for fn in (exported, compiled):
        actual, info = fn(x, return_info=True)
        assert_equal(actual, expected)
        assert torch.equal(info.block_indices, expected_info.block_indices)
        assert_equal(info.gates, expected_info.gates)


def test_autocast_to_bfloat16():
    """Against the same layer in plain PyTorch under autocast; all blocks are selected, so that no
    near-tie decides."""
    module = make(torch.float32, num_selected_blocks=16)
    exact = copy.deepcopy(module).double()
    x = random_input(2, 64, dtype=torch.float32)
    expected = exact(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x)
        plain = torch.stack([recompute_low_precision(module, x[b]) for b in range(2)])
    assert actual.dtype == torch.bfloat16
    error, plain_error = ((o.double() - expected).abs().max() for o in (actual, plain))
    assert error <= 2 * plain_error, f"{error} against {plain_error} of plain PyTorch"
    actual.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def recompute_low_precision(module: NativeSparseAttention, x: torch.Tensor) -> torch.Tensor:
    """The re-computation with everything rounded to bfloat16, as autocast rounds what it computes."""
    low = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", enabled=False):
        return recompute(low, x.bfloat16())[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    module = make()
    x = random_input(2, 45).requires_grad_()
    expected = module(x)
    actual = checkpoint(module, x, use_reentrant=use_reentrant)
    assert_equal(actual, expected)
    actual.square().sum().backward()
    checkpointed = [p.grad.clone() for p in (x, *module.parameters())]
    direct = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    for a, e in zip(checkpointed, direct, strict=True):
        assert_equal(a, e)


def test_distributed_data_parallel_sees_no_unused_parameter(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = make()
        parallel = nn.parallel.DistributedDataParallel(module)
        for _ in range(2):  # the second call raises if the first left a parameter without a gradient
            parallel(random_input(2, 45)).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    finally:
        dist.destroy_process_group()


def test_state_dict_round_trip_and_deepcopy():
    module = make()
    x = random_input(2, 45)
    other = NativeSparseAttention(NSAConfig.from_dict(module.config.to_dict()), dtype=torch.float64)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_names_of_the_weights():
    separate = {
        name for name, _ in make().named_parameters() if name.endswith("proj.weight") or "_proj_" in name
    }
    branches = {f"{x}_proj_{branch}.weight" for x in "kv" for branch in ("cmp", "slc", "swa")}
    assert separate == branches | {"q_proj.weight", "o_proj.weight", "gate_proj.weight"}
    shared = {name for name, _ in make(share_kv=True).named_parameters() if name.endswith("proj.weight")}
    assert shared == {f"{x}_proj.weight" for x in ("q", "k", "v", "o", "gate")}


def test_meta_device_then_materialised():
    with torch.device("meta"):
        module = NativeSparseAttention(BASE)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(random_input(1, 20, dtype=torch.float32)).isfinite().all()
