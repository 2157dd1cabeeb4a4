"""examples/pretrain.py: data, resume, signals, processes and generation, in runs of seconds."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare_runs  # noqa: E402
import data  # noqa: E402
import pretrain  # noqa: E402
from generate import generate, load_model  # noqa: E402
from model import Decoder, ModelConfig, Packing  # noqa: E402
from options import parse_options  # noqa: E402
from runtime import load_checkpoint  # noqa: E402
from sampling import choose  # noqa: E402
from tolerance import assert_close  # noqa: E402

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 48}
NSA_OPTIONS = {
    "compress_block_size": 16,
    "compress_stride": 8,
    "block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 16,
}
RUN = {
    "context": 128,
    "batch_size": 2,
    "steps": 8,
    "warmup": 2,
    "log_every": 1,
    "val_every": 4,
    "val_sequences": 4,
    "sample_tokens": 8,
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Forty documents of 5 to 400 bytes."""
    folder = tmp_path_factory.mktemp("text")
    words = ["sparse", "attention", "block", "window", "gate", "(x)", "= 1\n", "\u00e4"]
    random = np.random.default_rng(0)
    for number in range(40):
        text = " ".join(random.choice(words, size=random.integers(1, 60)))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def arguments(text_folder, tmp_path):
    """Command line, without the program, of a tiny run in a folder of this name."""

    def build(name, *more):
        folders = {"data": text_folder, "cache_dir": tmp_path / "cache", "run_dir": tmp_path / name}
        options = folders | SHAPE | NSA_OPTIONS | RUN
        line = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        return [*line, *map(str, more)]

    return build


def metrics(run_dir, *names):
    """{(step, name): value} of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def tiny_model(attention):
    torch.manual_seed(0)
    config = ModelConfig(data.VOCAB_SIZE, **SHAPE, attention=attention, nsa=NSA_OPTIONS)
    model = Decoder(config).eval()
    with torch.no_grad():
        model.head.weight.normal_()  # it starts at zero, which would hide everything
    return model


# --- data


def test_default_corpus_is_the_standard_library():
    files = data.text_files([])
    root = Path(sysconfig.get_path("stdlib"))
    assert files == sorted(files) and len(files) > 100
    assert root / "argparse.py" in files
    assert all(f.suffix == ".py" and f.is_relative_to(root) for f in files)
    assert not any({"site-packages", "dist-packages"} & set(f.relative_to(root).parts) for f in files)


def test_folders_are_searched_for_visible_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / ".hidden").write_text("h")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert data.text_files([tmp_path]) == [tmp_path / "b.txt", tmp_path / "sub" / "a.md"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.text_files([tmp_path / "nowhere"])


def test_neighbouring_files_become_long_documents():
    files = [b"a" * 10, b"b" * 200, b"c" * 30, b"d" * 40, b"e" * 50, b"f"]
    documents = data.join_neighbours(files, 100)
    assert b"".join(documents) == b"".join(files)
    assert [len(document) for document in documents] == [210, 120, 1]
    assert data.join_neighbours(files, 0) == files


def test_sequences_hold_every_document_in_order(text_folder, tmp_path):
    folder = data.prepare([text_folder], tmp_path)
    documents = [f.read_bytes() for f in sorted(text_folder.iterdir())]
    held_out = {19, 39}
    for split, members in (("train", set(range(40)) - held_out), ("val", held_out)):
        text = data.PackedText(folder, split, context=64)
        expected = [t for i in sorted(members) for t in (data.BOS, *documents[i], data.EOS)]
        rows = [text.sequence(i)[0] for i in range(text.num_sequences)]
        stream = np.concatenate([row[:-1] for row in rows])
        assert stream[: len(expected)].tolist() == expected
        assert (stream[len(expected) :] == data.PAD).all() and len(stream) - len(expected) < 64


def test_batches_mark_the_document_boundaries(text_folder, tmp_path):
    text = data.PackedText(data.prepare([text_folder], tmp_path), "train", context=64)
    shapes = set()
    for number in range(text.num_sequences // 4):
        batch = text.micro_batch(number, 4, seed=1)
        tokens, bounds = batch.tokens, batch.cu_seqlens.tolist()
        shapes.add(batch.cu_seqlens.shape)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == 64
        assert bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == len(tokens) == 4 * 64
        starts = set(bounds[:-1]) - {256}
        assert {0, 64, 128, 192} <= starts
        assert set((tokens == data.BOS).nonzero().flatten().tolist()) <= starts
        assert sum(batch.lengths) == 256 and [0, *np.cumsum(batch.lengths)] == sorted(starts | {256})
        for begin, length in zip(sorted(starts), batch.lengths, strict=True):
            assert batch.positions[begin : begin + length].tolist() == list(range(length))
        inside = torch.arange(256) % 64 != 63
        counted = (batch.targets >= 0) & inside
        assert torch.equal(batch.targets[counted], tokens.roll(-1)[counted])
        ignored = inside & ~counted
        assert torch.isin(tokens.roll(-1)[ignored], torch.tensor([data.BOS, data.PAD])).all()
    assert len(shapes) == 1  # one compiled graph for all


def test_an_epoch_visits_each_sequence_once(text_folder, tmp_path):
    text = data.PackedText(data.prepare([text_folder], tmp_path), "train", context=64)
    count = text.num_sequences

    def order(epoch, seed):
        return [text._shuffled(epoch * count + i, seed) for i in range(count)]

    orders = [order(0, seed=5), order(1, seed=5), order(0, seed=5), order(0, seed=6)]
    assert all(sorted(order) == list(range(text.num_sequences)) for order in orders)
    assert orders[0] == orders[2]
    assert orders[0] != orders[1] and orders[0] != orders[3]


def test_token_files_are_built_once_and_again_after_a_change(tmp_path):
    source = tmp_path / "one.txt"
    source.write_text("x" * 1000)
    first = data.prepare([source], tmp_path / "cache")
    built = (first / "train.bin").stat().st_mtime_ns
    assert data.prepare([source], tmp_path / "cache") == first
    assert (first / "train.bin").stat().st_mtime_ns == built
    assert (
        len(data.PackedText(first, "train", 64).tokens) == 950 + 2
    )  # a single file gives its last twentieth
    assert len(data.PackedText(first, "val", 64).tokens) == 50 + 2
    source.write_text("y" * 1001)
    assert data.prepare([source], tmp_path / "cache") != first


# --- model


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_documents_do_not_see_each_other(attention):
    model = tiny_model(attention)
    tokens = torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(70), torch.arange(58)))
    packing = Packing(torch.tensor([0, 70, 128, 128], dtype=torch.int32), 128, (70, 58))
    with torch.no_grad():
        before = model(tokens, positions, packing)
        alone = model(
            tokens[70:], positions[70:], Packing(torch.tensor([0, 58], dtype=torch.int32), 58, (58,))
        )
        tokens[3] += 1
        after = model(tokens, positions, packing)
    torch.testing.assert_close(before[70:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before[70:], after[70:], rtol=0, atol=0)
    assert not torch.allclose(before[3:70], after[3:70])


def test_full_attention_by_mask_equals_that_by_document(text_folder, tmp_path):
    batch = data.PackedText(data.prepare([text_folder], tmp_path), "train", 64).batch([0, 1, 2])
    model = tiny_model("full")
    with torch.no_grad():
        by_document = model(batch.tokens, batch.positions, Packing(batch.cu_seqlens, 64, batch.lengths))
        by_mask = model(batch.tokens, batch.positions, Packing(batch.cu_seqlens, 64))
    torch.testing.assert_close(by_mask, by_document, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_full_attention_on_a_gpu(text_folder, tmp_path):
    """FlashAttention over packed documents, against the reference precision on the CPU."""
    text = data.PackedText(data.prepare([text_folder], tmp_path), "train", 128)
    batch = text.micro_batch(0, 3, seed=0)
    model = tiny_model("full")

    def logits(device, dtype, lengths=None):
        placed = batch.to(torch.device(device))
        packing = Packing(placed.cu_seqlens, placed.max_seqlen, lengths)
        return model.to(device, dtype)(placed.tokens, placed.positions, packing).detach()

    exact = logits("cpu", torch.float64, batch.lengths)
    baseline = logits("cpu", torch.bfloat16, batch.lengths)
    assert_close("logits", logits("cuda", torch.bfloat16), exact, baseline)


def test_groups_of_the_optimizer(arguments):
    model = tiny_model("nsa")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = pretrain.make_optimizer(model, parse_options(arguments("x"))).param_groups
    found = {
        names[p]: (group["weight_decay"], group["rate_scale"]) for group in groups for p in group["params"]
    }
    assert found.keys() == set(names.values())
    layer = "layers.1.attention."
    assert found["head.weight"] == found["layers.0.ffn.down.weight"] == (0.1, 1)
    assert found["norm.weight"] == found["layers.0.ffn_norm.weight"] == (0, 1)
    assert found[layer + "q_proj.weight"] == found[layer + "compress_k.w2"] == (0.1, 1)
    assert all(found[layer + f"compress_v.{name}"] == (0, 1) for name in ("pe", "b1", "b2"))
    assert found[layer + "compress_k.w1"] == (0.1, 32 / (16 * 8))  # hidden_size / (l * D)
    assert found[layer + "gate_proj.weight"] == (0.1, 0.1) and found[layer + "gate_proj.bias"] == (0, 0.1)


def test_learning_rate_warms_up_and_follows_a_cosine():
    options = parse_options(["--steps", "101", "--warmup", "10", "--lr", "1.0", "--min-lr-ratio", "0.1"])
    rates = [pretrain.learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- runs


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_resume_is_bit_exact(attention, arguments, tmp_path):
    pretrain.main(arguments("whole", "--attention", attention))
    pretrain.main(arguments("parts", "--attention", attention, "--stop-after", 3))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 4, "loss": 0.0}\n{"step": 5, "lo'
        )  # what a killed run can leave behind its checkpoint
    pretrain.main(arguments("parts", "--attention", attention, "--resume"))
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 8
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    for number, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(state[name], parts["optimizer"]["state"][number][name]) for name in state)
    names = ("loss", "val_loss", "lr", "grad_norm")
    assert metrics(tmp_path / "whole", *names) == metrics(tmp_path / "parts", *names)
    assert len(metrics(tmp_path / "whole", "loss")) == 8 and len(metrics(tmp_path / "whole", "val_loss")) == 3
    samples = [(tmp_path / name / "sample.txt").read_bytes() for name in ("whole", "parts")]
    assert samples[0] == samples[1] and samples[0].startswith(b"def ")


def test_a_run_learns(arguments, tmp_path):
    pretrain.main(arguments("learns", "--steps", 40, "--lr", 1e-2))
    losses = metrics(tmp_path / "learns", "val_loss")
    assert losses[0, "val_loss"] == pytest.approx(np.log(data.VOCAB_SIZE))
    assert losses[40, "val_loss"] < 3


def test_resume_refuses_another_run(arguments, tmp_path):
    pretrain.main(arguments("run", "--stop-after", 1))
    with pytest.raises(SystemExit, match=r"lr: 0\.001 -> 0\.5"):
        pretrain.main(arguments("run", "--resume", "--lr", 0.5))
    with pytest.raises(SystemExit, match="--overwrite"):
        pretrain.main(arguments("run"))


def run_script(*command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


def test_sigint_leaves_a_checkpoint_to_resume(arguments, tmp_path):
    run_dir = tmp_path / "interrupted"
    command = arguments("interrupted", "--steps", 100_000, "--checkpoint-every", 0)
    process = run_script(str(EXAMPLES / "pretrain.py"), *command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir, "loss")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in output
    state = load_checkpoint(run_dir / "checkpoint.pt")
    assert 3 <= state["step"] < 100_000
    assert max(step for step, _ in metrics(run_dir, "loss")) == state["step"]
    assert not (run_dir / "checkpoint.tmp").exists()
    pretrain.main([*command, "--resume", "--stop-after", str(state["step"] + 2)])
    assert load_checkpoint(run_dir / "checkpoint.pt")["step"] == state["step"] + 2


def test_two_processes_equal_accumulation_in_one(arguments, tmp_path):
    pretrain.main(arguments("one", "--batch-size", 1, "--accumulation", 2))
    command = ["--nproc-per-node", "2", "--standalone", str(EXAMPLES / "pretrain.py")]
    process = run_script("-m", "torch.distributed.run", *command, *arguments("two", "--batch-size", "1"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = (metrics(tmp_path / name, "loss", "val_loss") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(load_checkpoint(tmp_path / "two" / "checkpoint.pt")["random_states"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_compiled_training_follows_the_eager_one(attention, arguments, tmp_path):
    pretrain.main(arguments("eager", "--attention", attention, "--steps", 3, "--sample-tokens", 0))
    pretrain.main(
        arguments("compiled", "--attention", attention, "--steps", 3, "--sample-tokens", 5, "--compile")
    )
    assert metrics(tmp_path / "compiled", "compile_seconds")[0, "compile_seconds"] > 0
    assert (tmp_path / "compiled" / "sample.txt").exists()
    eager, compiled = (metrics(tmp_path / name, "loss", "val_loss") for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


# --- generation


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_generation_from_a_checkpoint(attention, arguments, tmp_path):
    pretrain.main(arguments("run", "--attention", attention, "--steps", 2))
    model, options = load_model(tmp_path / "run")
    assert options["context"] == 128 and not model.training
    first, second, other = (generate(model, "gate ", 12, 128, seed=seed) for seed in (0, 0, 1))
    assert first == second != other
    # Beyond the context the window slides.
    assert generate(model, "x" * 200, 1, 128, temperature=0) == generate(
        model, "x" * 300, 1, 128, temperature=0
    )


def test_two_runs_are_compared(arguments, tmp_path, capsys):
    folders = []
    for attention in ("nsa", "full"):
        pretrain.main(arguments(attention, "--attention", attention, "--steps", 4, "--log-every", 1))
        folders.append(str(tmp_path / attention))
    report, plot = tmp_path / "docs" / "report.json", tmp_path / "docs" / "report.png"
    compare_runs.main([*folders, "--json", str(report), "--plot", str(plot)])
    runs = json.loads(report.read_text())["runs"]
    assert [run["options"]["attention"] for run in runs] == ["nsa", "full"]
    for run in runs:
        assert [step for step, _, _ in run["loss"]] == [1, 2, 3, 4]
        assert run["val_loss"][-1][0] == 4 and run["tokens_per_s"] > 0
        assert run["machine"]["device"] == "cpu" and run["corpus_tokens"]["train"] > 0
    model, _ = load_model(tmp_path / "nsa")
    assert runs[0]["parameters"] == model.num_parameters()
    assert str(tmp_path) not in report.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    compare_runs.main(["--from", str(report)])
    assert capsys.readouterr().out in table
    compare_runs.main([*folders, "--concurrent", "--json", str(report), "--plot", str(plot)])
    assert all(run["tokens_per_s"] is None for run in json.loads(report.read_text())["runs"])


def test_choice_of_a_token():
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 0, 1.0, generator) == 1
    assert {choose(logits, 1.0, 0.6, generator) for _ in range(50)} == {1}
    assert {choose(logits, 1.0, 0.7, generator) for _ in range(50)} == {1, 2}
    assert {choose(logits, 1.0, 1.0, generator) for _ in range(200)} == {0, 1, 2}
