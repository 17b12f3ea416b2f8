"""A whole run of SFT on completions alone, and on prompts and completions."""

import tasks
from conftest import TASK, run
from harness.checkpoint import read_json


def test_a_run_on_prompts_and_completions(tiny_base, tmp_path, monkeypatch):
    """From the command line: it ends well, and has trained every token of its 8 demonstrations."""
    monkeypatch.chdir(tmp_path)
    for flag, whole in (("true", False), ("false", True)):
        assert run("--algo", "sft", "--completion_only", flag, *TASK, "--max_steps", 2,
                   "--num_demonstrations", 8, "--batch_size", 4, "--init_from", tiny_base,
                   "--out_dir", flag) == 0
        trained = read_json(f"{flag}/summary.json")["trained_tokens"]
        examples = tasks.Chain(2, 2).demonstrations(8, 0)
        assert trained == sum(len(e["completion"]) + 1 + whole * len(e["prompt"]) for e in examples)
