"""Runs of hybrids: a file of one's own, --inspect, flags that contradict each other, and what does
not fit the context."""

import os
import re

import pytest

import train
from conftest import TASK, run
from harness import report
from hybrid import HybridConfig
from runs_helpers import HYBRID_, checkpoint, complaint, metrics, same, weights, write_jsonl

SHORT = ("--max_steps", 3, "--logging_steps", 1, "--eval_steps", 3, "--warmup_steps", 0)
ROWS = [{"prompt": f"{a}+{b}=", "completion": f"it is {a + b}", "answer": str(a + b)}
        for a in range(5) for b in range(5)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")


@pytest.fixture
def refused(monkeypatch):
    """refused(flags) -> the complaint, before anything is trained or written."""
    def refused(flags):
        there = sorted(os.listdir("."))
        said = complaint(run, "--algo", "hybrid", *flags.split())
        assert sorted(os.listdir(".")) == there
        return said
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("something was trained"))
    return refused


# -- a file of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    (), ("--hint", "all", "--hint_end", 0.9), ("--imitation", "luffy")])
def test_a_file_of_demonstrations_and_answers(tiny_base, flags):
    """Lines with prompt, completion and answer are demonstrations and problems at once."""
    data = write_jsonl(ROWS)
    assert run(*HYBRID_, *SHORT, *flags, "--data", data, "--max_new_tokens", 8, "--eval_problems",
               2, "--init_from", tiny_base, "--out_dir", "run") == 0
    assert not same(weights("run"), weights(tiny_base))
    assert metrics("run")[-1]["nll"] > 0 and metrics("run")[-1]["sampled_tokens"] > 50
    assert len(checkpoint("run")["algorithm"]["waiting"]) < len(ROWS)      # some are held out


@pytest.mark.parametrize("column, flags", [
    ("completion", ""), ("answer", ""), ("completion", "--reward brevity"),
    ("completion", "--hint rescue --imitation none")])
def test_a_column_is_missing(refused, column, flags):
    """What a line lacks is named before a base model is made; without a reward that asks for it,
    no answer is needed."""
    data = write_jsonl([{k: v for k, v in row.items() if k != column} for row in ROWS])
    said = refused(f"--data {data} {flags}")
    assert re.match(rf"data.jsonl, line \d+: no column '{column}', which this algorithm", said)


def test_answers_are_not_needed_where_nothing_judges_by_them(tiny_base):
    data = write_jsonl([{k: v for k, v in row.items() if k != "answer"} for row in ROWS])
    assert run(*HYBRID_, *SHORT, "--reward", "brevity", "--data", data, "--max_new_tokens", 8,
               "--init_from", tiny_base, "--out_dir", "run") == 0


# -- what does not fit ----------------------------------------------------------------------------

FITS = "--max_new_tokens 5 --block_size"


@pytest.mark.parametrize("flags, fits", [
    (f"--min_terms 2 --max_terms 2 {FITS}", 5 + 6),                      # 3+4=, then 3+4=7<end>
    (f"--min_terms 2 --max_terms 2 --hint all {FITS}", 5 + 6 + 5),       # then 5 more
    (f"--data data.jsonl --eval_data data.jsonl {FITS}", 5 + 8),         # then it is 7<end>
    (f"--data data.jsonl --eval_data data.jsonl --hint one {FITS}", 5 + 8 + 4),
    ("--data data.jsonl --eval_data short.jsonl --max_new_tokens 20 --block_size", 5 + 20)])
def test_demonstrations_and_what_follows_hints_must_fit(refused, monkeypatch, flags, fits):
    """Demonstrations are read whole, and after a hint up to max_new_tokens are sampled: a context
    that is a token too short is refused before anything is trained, the next is not."""
    class Reached(Exception):
        """All checks have been passed: the base model comes next."""

    def reached(*args):
        raise Reached
    for prompt, file in (("3+4=", "data.jsonl"), ("4=", "short.jsonl")):
        write_jsonl([{"prompt": prompt, "completion": "it is 7", "answer": "7"}], file)
    said, what = refused(f"{flags} {fits - 1}"), "data.jsonl" if "--data" in flags else "a prompt"
    assert said.startswith(what) and f"block_size {fits - 1}" in said
    monkeypatch.setattr(report, "needed_line", reached)
    with pytest.raises(Reached):
        run("--algo", "hybrid", *flags.split(), fits)


# -- flags ----------------------------------------------------------------------------------------


def test_half_of_a_batch_is_demonstrated():
    """Unless it is said how many are; one at least."""
    assert [HybridConfig(batch_size=n).demonstrated for n in (32, 5, 1)] == [16, 2, 1]
    assert HybridConfig(batch_size=32, demonstrated=3).demonstrated == 3


@pytest.mark.parametrize("flags, expected", [
    ("--num_generations 1", "--num_generations 1 leaves a group nothing to compare with"),
    ("--num_demonstrations 0", "--num_demonstrations 0: a number of at least 1"),
    ("--demonstrated -1", "--demonstrated -1: a number of at least 0"),
    ("--demonstrated 33", "--demonstrated 33: a batch has --batch_size 32 prompts"),
    ("--batch_size 8 --demonstrated 9", "--demonstrated 9: a batch has --batch_size 8 prompts"),
    ("--gate failed --hint all", "--gate failed decides about whole demonstrations: use it with "
                                 "--hint none and --imitation sft or chord"),
    ("--gate failed --imitation luffy", "--gate failed decides about whole demonstrations"),
    ("--gate buffer --imitation none", "--gate buffer decides about whole demonstrations"),
    ("--gate failed --reward verifier,brevity", "--gate failed compares mean rewards of 0 to 1"),
    ("--gate buffer --reward model", "--gate buffer compares mean rewards of 0 to 1"),
    ("--gate failed --reward_weights -1", "--gate failed compares mean rewards of 0 to 1"),
    ("--gate buffer --buffer_size 401", "--buffer_size 401: there are only 400 demonstrations"),
    ("--gate_threshold 1", "--gate_threshold 1.0: a number below 1"),
    ("--own_loss nft --reward verifier,brevity", "--own_loss nft with --hint none needs rewards of "
                                                 "0 and 1"),
    ("--own_loss srft --reward model", "--own_loss srft with --hint none needs rewards of 0 and 1"),
    ("--own_loss nft --reward_weights 2", "--own_loss nft with --hint none needs rewards of 0"),
    ("--own_loss nft --imitation luffy", "--own_loss nft learns from the group's own answers"),
    ("--hint rescue --reward brevity", "--own_loss grpo with --hint rescue needs rewards of 0"),
    ("--imitation prefix", "--imitation prefix is for hints: use it with --hint one or all"),
    ("--imitation luffy --reward majority", "--imitation luffy rewards one demonstration by "
                                            "itself"),
    ("--imitation srft --reward verifier,majority", "--imitation srft rewards one demonstration"),
    ("--imitation dft", "argument --imitation: invalid choice: 'dft'"),
    ("--mu 1.5", "--mu 1.5: a number of at most 1"),
    ("--mu_end -1", "--mu_end -1.0: a number of at least 0"),
    ("--hint_share 2", "--hint_share 2.0"), ("--hint_end 2", "--hint_end 2.0"),
    ("--shaping 0", "--shaping 0.0: a number above 0"),
    ("--top_entropy 0", "--top_entropy 0.0: a number above 0"),
    ("--rescue_rounds 0", "--rescue_rounds 0"), ("--decay_steps -1", "--decay_steps -1"),
])
def test_what_contradicts_itself(refused, flags, expected):
    """One line that says what is wrong and what to do, before a base model is made."""
    assert refused(flags).startswith(expected)


def test_the_command_shows_demonstrations(tiny_base, capsys):
    """python train.py --algo hybrid --inspect: aligned lines, of which some are a demonstrator's;
    nothing is written."""
    assert run(*HYBRID_, *TASK, "--inspect", "--init_from", tiny_base) == 0
    lines = [line for line in capsys.readouterr().out.splitlines()
             if re.search(r"[+-]0\.\d{6}$", line)]
    assert {line.split()[-6] for line in lines} == {"yes", "demo"}
    assert len({len(line) for line in lines}) == 1 and os.listdir(".") == []
