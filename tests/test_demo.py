"""examples/demo.py: its two runs are comparable, the selection is at work, and a tiny run of all of it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import demo

TINY = {
    "context": 128,
    "hidden_size": 32,
    "num_layers": 2,
    "head_dim": 8,
    "ffn_size": 48,
    "block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 16,
    "val_sequences": 2,
    "sample_tokens": 4,
}


def test_both_models_have_the_same_size():
    nsa = demo.count_parameters("nsa", demo.OPTIONS["ffn_size"])
    full = demo.count_parameters("full", demo.matching_ffn_size())
    assert full == pytest.approx(nsa, rel=0.01)


def test_selection_and_window_leave_something_out():
    options = demo.OPTIONS
    assert options["context"] >= 1024
    assert options["context"] // options["block_size"] > 2 * options["num_selected_blocks"]
    assert options["num_selected_blocks"] > 3  # more than the forced blocks
    assert options["window_size"] < options["context"]


def test_demo_leaves_a_figure_and_a_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("def function(argument): return argument\n" * 400)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "OPTIONS", demo.OPTIONS | TINY)
    monkeypatch.setattr(demo, "STEPS", 12)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", str(text)])
    demo.main()
    folder = tmp_path / "runs" / "demo"
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    for name in demo.ATTENTIONS:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["val_loss"] for line in lines if "val_loss" in line]
        assert losses[-1] < losses[0]
        assert f"{losses[-1]:.4f}" in table
    assert "against full attention" in table


def test_a_slow_machine_gets_fewer_steps(tmp_path, monkeypatch):
    class Slow:
        def records(self):
            return [{"tokens_per_s": 1.0}, {"tokens_per_s": 512.0}, {"val_loss": 5.0}]

    monkeypatch.setattr(demo, "run_both", lambda *args, **more: [Slow(), Slow()])
    assert demo.affordable_steps(tmp_path, [], {}, most=1200) == demo.TRAINING_SECONDS * 512 // 1024
    assert demo.affordable_steps(tmp_path, [], {}, most=5) == 5
