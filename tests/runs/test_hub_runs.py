"""Whole runs that start from a published model: every algorithm, and what becomes of its tokenizer;
with a stand-in for the safetensors library."""

import os
import sys

import pytest
import torch

import sample
from conftest import run
from harness import chat, checkpoint, hub
from hub_models import FAKE, load_file, write_model
from runs_helpers import (checkpoint as saved, complaint, metrics, networks, same, same_networks,
                          weights, write_jsonl)

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b),
         "chosen": str(a + b), "rejected": "12"} for a in range(6) for b in range(5)]
SHORT = ("--data", "data.jsonl", "--batch_size", 3, "--max_steps", 2, "--logging_steps", 1,
         "--eval_steps", 2, "--warmup_steps", 0, "--max_new_tokens", 5, "--eval_problems", 2)
OWN = ("--num_generations", 4, "--reward", "verifier,brevity")
ALGORITHMS = {"sft": (), "dft": (), "rft": (*OWN, "--keep", "best"), "dpo": (), "rm": (),
              "ppo": OWN, "grpo": OWN, "hybrid": OWN,
              "distill": ("--num_generations", 2, "--teacher", "qwen2")}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # a picture takes longer than a run
    monkeypatch.setattr(hub, "safetensors", lambda: FAKE)
    write_jsonl(ROWS)


@pytest.fixture
def qwen(tmp_path):
    write_model(tmp_path / "qwen2", "qwen2", FAKE.torch.save_file)
    return "qwen2"


def words(*flags):
    return [str(word) for word in flags]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_starts_from_a_published_model(qwen, algo):
    """Two steps: the weights move, the reference stays what was published, and the checkpoint
    knows the tokenizer by its folder."""
    assert run("--algo", algo, *SHORT, *ALGORITHMS[algo], "--init_from", qwen,
               "--out_dir", "run") == 0
    begun = checkpoint.build_model(checkpoint.read(qwen)).state_dict()
    if algo == "rm":
        begun["lm_head.weight"] = weights("run")["lm_head.weight"]
    assert not same(weights("run"), begun)
    if "ref_model" in networks("run"):
        reference = {k.removeprefix("ref_model."): v for k, v in saved("run")["algorithm"].items()
                     if k.startswith("ref_model.")}
        assert same(reference, begun)
    assert saved("run")["tokenizer"] == os.path.abspath("qwen2")
    assert metrics("run")[-1]["trained_tokens"] > 0


@pytest.mark.parametrize("family", ["qwen3", "llama3.2", "smollm2", "mistral"])
def test_other_families_train(tmp_path, family):
    """GRPO on each: what is sampled is scored to the same ratio of 1."""
    write_model(tmp_path / "start", family, FAKE.torch.save_file)
    assert run("--algo", "grpo", *SHORT, *OWN, "--init_from", "start", "--out_dir", "run") == 0
    assert metrics("run")[-1]["max_ratio"] == 1


def test_a_run_resumes_bit_for_bit(qwen):
    """Stopped after two steps of four; neither the start nor its tokenizer is named again."""
    flags = ("--algo", "grpo", *SHORT, *OWN, "--max_steps", 4, "--save_steps", 2)
    assert run(*flags, "--init_from", qwen, "--out_dir", "whole") == 0
    assert run(*flags, "--init_from", qwen, "--out_dir", "parts") == 0
    os.remove("parts/summary.json")
    torch.save(stopped_after(2, flags, qwen), "parts/ckpt.pt")
    assert run(*flags, "--out_dir", "parts", "--resume") == 0
    assert same_networks("whole", "parts")


def stopped_after(steps, flags, start):
    """The checkpoint that a run of 4 steps has written at one of them."""
    kept, save = {}, checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        def keep(run):
            save(run)
            kept[run.step] = saved("stopped")
        patch.setattr(checkpoint, "save", keep)
        assert run(*flags, "--init_from", start, "--out_dir", "stopped") == 0
    return kept[steps]


def test_training_goes_on_from_such_a_run(qwen, capsys):
    """SFT, then GRPO from its checkpoint: the tokenizer is that of the published folder. Once that
    is gone, --tokenizer names another place."""
    assert run("--algo", "sft", *SHORT, "--init_from", qwen, "--out_dir", "first") == 0
    assert run("--algo", "grpo", *SHORT, *OWN, "--init_from", "first", "--out_dir", "second") == 0
    assert saved("second")["tokenizer"] == os.path.abspath("qwen2")
    os.rename("qwen2", "moved")
    again = words("--algo", "sft", *SHORT, "--init_from", "first", "--out_dir", "third")
    assert "use byte or gpt2, or a folder" in complaint(run, *again)
    assert run(*again, "--tokenizer", "moved") == 0


def test_sample_asks_judges_and_exports(qwen, tmp_path, capsys):
    """The published model and what was trained from it; what is exported is read again with the
    same weights."""
    assert run("--algo", "sft", *SHORT, "--init_from", qwen, "--out_dir", "run") == 0
    for folder in ("qwen2", "run"):
        assert sample.main(words(folder, "7+5=", "--max_new_tokens", 3)) == 0
        assert sample.main(words(folder, "--data", "data.jsonl", "--max_new_tokens", 3)) == 0
    capsys.readouterr()
    assert sample.main(words("run", "--export", "out")) == 0
    assert "wrote out: config.json, model.safetensors (float32), and the tokenizer of" in \
        capsys.readouterr().out
    found = checkpoint.build_model(checkpoint.read("out")).state_dict()
    assert same(found, weights("run"))
    assert "not empty" in complaint(sample.main, words("run", "--export", "out"))
    assert sample.main(words("run", "--export", "half", "--dtype", "bfloat16")) == 0
    assert {t.dtype for t in load_file("half/model.safetensors").values()} == {torch.bfloat16}
    assert run("--algo", "sft", *SHORT, "--init_from", "out", "--out_dir", "again") == 0


def test_a_reward_model_from_a_published_one(qwen):
    """RLHF: the reward model is made first, from the same start, and reads turns as well."""
    assert run("--algo", "rm", *SHORT, "--init_from", qwen, "--out_dir", "judge") == 0
    assert run("--algo", "grpo", *SHORT, "--num_generations", 4, "--reward", "model",
               "--reward_model", "judge", "--init_from", qwen, "--out_dir", "run") == 0
    assert "true_reward" in metrics("run")[-1]


def test_template_and_system_prompt(qwen, capsys):
    """They are settings of the run, which sample.py takes over; a resumption must name the same."""
    flags = ("--algo", "sft", *SHORT, "--init_from", qwen, "--out_dir", "run")
    assert run(*flags, "--system_prompt", "Count.") == 0
    assert "prompts are chatml turns, after the system prompt 'Count.'" in capsys.readouterr().out
    plain = metrics("run")[-1]["nll"]
    _, _, config = sample.parse(["run"])
    tokenizer = chat.tokenizer_of(config)
    assert (tokenizer.template, tokenizer.system_prompt) == ("chatml", "Count.")
    os.remove("run/summary.json")
    assert "--system_prompt" in complaint(run, *words(*flags, "--resume"))
    assert run(*flags, "--template", "plain") == 0
    assert "prompts are plain text, though the model has a chat template (--template)" in \
        capsys.readouterr().out
    assert metrics("run")[-1]["nll"] != plain


def test_pre_training_with_a_published_tokenizer(qwen):
    """--tokenizer FOLDER: a new model of ours with that vocabulary."""
    assert run("--algo", "pretrain", *SHORT, "--tokenizer", qwen, "--n_embd", 16, "--n_layer", 1,
               "--n_head", 2, "--out_dir", "base", "--block_size", 200) == 0
    assert saved("base")["model_config"]["vocab_size"] == 352


def test_what_a_published_model_cannot_start(qwen):
    """Another shape than its own, another template, a missing folder, whole texts with turns."""
    flags = ("--algo", "sft", *SHORT, "--out_dir", "run", "--init_from")
    assert "has n_layer 2, not 3" in complaint(run, *words(*flags, qwen, "--n_layer", 3))
    assert "has no <|eot_id|>" in complaint(run, *words(*flags, qwen, "--template", "llama3"))
    assert "no checkpoint there" in complaint(run, *words(*flags, "Qwen9"))
    assert "--template plain" in complaint(run, *words(*flags, qwen, "--completion_only", "false"))
    write_jsonl([{"prompt": "x" * 300, "completion": "y"}])
    assert "tokens do not fit --block_size 256" in complaint(run, *words(*flags, qwen))
    assert not os.path.exists("run")


def test_inspect_names_special_tokens(qwen, capsys):
    """--inspect: the turns of the prompt by their names, and the end of the answer as it is."""
    assert run("--algo", "sft", *SHORT, "--init_from", qwen, "--inspect") == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = [word for word, *_ in filter(None, said) if word.startswith("<|")]
    assert first[:4] == ["<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert ["<|im_end|>", "yes"] in [words[:2] for words in said]
