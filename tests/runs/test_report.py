"""
What a run prints: lines and tables compared, character by character, with what the same figures
give by hand. Pictures are in test_pictures.py.
"""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import sample
import tasks
from harness import files, report
from model import GPTConfig
from table_policy import DRAWS, Policy, Task, Tokens, config_of

# -- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.9, "0:59"), (60, "1:00"), (75, "1:15"), (3725, "62:05")])
def test_duration(seconds, text):
    """Minutes and whole seconds, the seconds in two digits."""
    assert report.duration(seconds) == text


def console(algo="grpo", step=0):
    return report.Console(config_of(algo=algo, max_steps=20), step)


def test_the_console_keeps_its_columns(capsys):
    """A heading once, from the first line, in the order of COLUMNS; a number that is missing later
    leaves a gap, one that is new is not shown; every cell is as wide as its heading and at least
    6. Where no line is due, nothing is printed."""
    lines = console()
    lines.show({}, 80)
    lines.show({"loss": 0.25, "step": 5, "reward": 0.5, "mystery": 1, "policy/approxkl": 0.0004,
                "clip_ratio": 0.1239}, 75)
    lines.show({}, 30)
    lines.show({"step": 10, "loss": -1.5, "eval/kl": 3.0, "tokens_per_second/train": 54321.6,
                "clip_ratio": 0.0}, 0)
    lines.close()
    assert capsys.readouterr().out.splitlines() == [
        "  step  reward    loss   moved  clipped    left",
        "     5   0.500  +0.250   0.000    0.124    1:15",
        "    10          -1.500            0.000    0:00"]


def test_every_column_has_its_digits(capsys):
    """1234.5678 as each column writes it; losses and rewards of answers with a sign."""
    titles = {name: title for name, title, _ in report.COLUMNS}
    console().show({**dict.fromkeys(titles, 1234.5678), "step": 7}, 61)
    heading, cells = capsys.readouterr().out.splitlines()
    assert heading == "  ".join(f"{title:>{max(len(title), 6)}}" for title in titles.values())
    found = dict(zip(titles.values(), cells.split()))
    assert {found.pop("step"), found.pop("left")} == {"7", "1:01"}
    assert {text: " ".join(t for t in found if found[t] == text) for text in found.values()} == {
        "1234.568": "reward true nll accuracy value loss to teacher moved heldout pairs heldout "
                    "heldout nll entropy clipped",
        "+1234.568": "loss", "+1234.57": "chosen rejected",
        "1234.57": "weight unweighted kept mu open margin skipped worked KL grad ratio flat",
        "1234.6": "length", "1,235": "sample/s train/s"}


def test_columns_stand_under_their_metric():
    """What each heading shows."""
    shown = {title: name for name, title, _ in report.COLUMNS}
    assert shown == {
        "step": "step", "reward": "reward", "true": "true_reward", "loss": "loss", "nll": "nll",
        "mu": "mu", "open": "open", "to teacher": "teacher_kl", "weight": "mean_weight",
        "unweighted": "frac_weight_near_zero", "kept": "kept",
        "chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins",
        "skipped": "skipped_pairs", "accuracy": "accuracy", "value loss": "loss/value",
        "moved": "policy/approxkl", "heldout pairs": "eval/pair_accuracy",
        "heldout": "eval/accuracy", "heldout nll": "eval/loss", "worked": "eval/worked",
        "length": "completions/mean_length",
        "KL": "eval/kl", "entropy": "entropy", "grad": "grad_norm", "ratio": "max_ratio",
        "clipped": "clip_ratio", "flat": "frac_reward_zero_std", "left": "left",
        "sample/s": "tokens_per_second/sample", "train/s": "tokens_per_second/train"}


def test_pretraining_shows_a_progress_bar(capsys, monkeypatch):
    """One that counts every step, from the step at which the run began, and shows loss and accuracy
    as of the last line; it is closed at the end, and nothing else is printed."""
    told = []

    def bar(**options):
        told.append((options["initial"], options["total"]))
        return SimpleNamespace(update=lambda: told.append("step"), set_postfix=told.append,
                               close=lambda: told.append("closed"))
    monkeypatch.setattr(report, "tqdm", bar)
    lines = console("pretrain", step=4)
    for line in ({}, {"step": 6, "loss": 0.25, "eval/accuracy": 0.12345, "nll": 1.0}, {"loss": 1}):
        lines.show(line, 5)
    lines.close()
    assert told == [(4, 20), "step", "step", {"loss": "0.250", "eval/accuracy": "0.123"}, "step",
                    {"loss": "1.000"}, "closed"]
    assert capsys.readouterr().out == ""


def test_opening():
    """Algorithm, task, size, machine, steps, folder; the legend of held-out figures, but not for a
    reward model, which is judged otherwise; and the algorithm's own. One line for a base model."""
    shape = SimpleNamespace(scalar_head=False)
    algo = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 1234567, config=shape),
                           legend="its own", task=Task(), tokenizer=Tokens(), config=config_of(
                               algo="sft", max_steps=20, batch_size=8, out_dir="out/x"))
    first = "\nsft on table: 1,234,567 parameters, cpu, float32, 20 steps of 8{}, into out/x\n"
    assert report.opening(algo) == first.format("") + report.LEGEND + "its own"
    resumed = report.opening(algo, resumed_at=5)
    assert resumed == first.format(" from step 5") + report.LEGEND + "its own"
    shape.scalar_head = True
    assert report.opening(algo) == first.format("") + "its own"
    algo.config.algo = "pretrain"
    assert report.opening(algo) == "Pre-training into out/x"


def test_needed_line(tmp_path):
    """What is said of a base model, or a reward model, that a run needs: when it was made, or that
    it will be made first."""
    config = config_of(algo="pretrain", out_dir=tmp_path)
    line = report.needed_line(config, "Base model", finished=False)
    assert line == (f"No base model in {tmp_path} yet: pre-training one first (once; every "
                    "algorithm starts from it).")
    config.algo = "rm"
    line = report.needed_line(config, "Reward model", finished=False)
    assert line == f"No reward model in {tmp_path} yet: training one first (once)."
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 59.7}))
    line = report.needed_line(config, "Reward model", finished=True)
    assert line == f"Reward model: {tmp_path} (made earlier in 60 s)"
    line = report.needed_line(config, "Base model", finished=True, otherwise="warmup_steps 50")
    assert line == (f"Base model: {tmp_path} (made earlier in 60 s with warmup_steps 50: delete "
                    "the folder to have it made anew)")


@pytest.mark.parametrize("after, text", [
    ({}, ""),
    ({"eval/accuracy": 0.4736}, ": held-out accuracy 0.474"),
    ({"eval/accuracy": 0.5, "eval/worked": 0.304, "eval/accuracy_when_worked": 0.956},
     ": held-out accuracy 0.500; worked steps in 30% of its answers, right 96% of the time"),
    ({"eval/pair_accuracy": 0.8154, "eval/pairs": 130},
     ": right about 81.5% of 130 held-out pairs")])
def test_shared_line(after, text):
    """What is said of a base model, or a reward model, that has just been made."""
    line = report.shared_line("Base model", {"after": after, "seconds": 62.4}, "out/b")
    assert line == f"Base model: out/b, made in 1:02{text}"


@pytest.fixture
def sampled_policy(monkeypatch):
    """sample.py with a table for the model of its checkpoint."""
    policy = Policy("pi", {**DRAWS, "rrr": ["101", "0", "", "1"] + ["0"] * 12})
    monkeypatch.setattr(sample.checkpoint, "read", lambda path: {"settings": {}})
    monkeypatch.setattr(sample.checkpoint, "build_model", lambda found, device: policy)
    monkeypatch.setattr(sample.prepare, "make_task", lambda config, block_size: Task())
    monkeypatch.setattr(sample.data, "Tokenizer", lambda name: Tokens())
    monkeypatch.setattr(policy, "config", GPTConfig(vocab_size=4))
    return policy


def test_sample_and_print(capsys, sampled_policy):
    """sample.py with a prompt: the greedy answer, then four sampled ones, with the seed and the
    flags that were given; dots where it was cut off."""
    sample.main(["x", "rrr", "--seed", "5", "--top_k", "2", "--top_p", "0.5", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == [
        "greedy   rrr1", "sampled  rrr101 ...", "sampled  rrr0", "sampled  rrr", "sampled  rrr1"]
    asked = [call[:6] for call in sampled_policy.calls]
    assert asked[0][:3] == (["rrr"], 1, 0) and asked[1] == (["rrr"], 4, 1.0, 2, 0.5, 5)
    assert len(asked) == 2


def test_judge_and_print(capsys, sampled_policy):
    """sample.py without a prompt: the table of held-out figures, at the temperature that was
    given."""
    sample.main(["x", "--eval_problems", "2", "--temperature", "0.7", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["held-out problems           now   chance",
                         "accuracy, sampled         0.281         ",    # 8 + 1 of 32
                         "accuracy, greedy          1.000         "]
    assert [call.temperature for call in sampled_policy.calls] == [0.7, 0, 0.7]


# -- tables ---------------------------------------------------------------------------------------


def test_table():
    """A row for each figure that any column has, three digits, `-` where a column lacks it; chance
    beside pass@k alone."""
    before = {"eval/accuracy": 0.25, "eval/pass@4": 0.5, "eval/kl": 0.0}
    after = {"eval/accuracy": 0.98765, "eval/pass@16": 1.0, "eval/mystery": 1,
             "eval/ood_accuracy": 0.5, "eval/worked": 0.75}
    text = report.table([("before", before), ("after", after)], tasks.Chain())
    assert text.splitlines() == ["held-out problems        before    after   chance",
                                 "accuracy, sampled         0.250    0.988    0.100",
                                 "pass@4                    0.500        -    0.344",
                                 "pass@16                       -    1.000    0.815",
                                 "out of distribution           -    0.500    0.100",
                                 "worked steps                  -    0.750         ",
                                 "KL to the start           0.000        -         "]


def test_table_names_every_figure():
    """Every eval/... figure has its own row."""
    titles = {"accuracy": "accuracy, sampled", "greedy_accuracy": "accuracy, greedy",
              "pass@4": "pass@4", "pass@16": "pass@16", "ood_accuracy": "out of distribution",
              "pair_accuracy": "pairs ranked right", "worked": "worked steps",
              "accuracy_when_worked": "right when worked", "mean_length": "completion length",
              "loss": "held-out nll", "kl": "KL to the start"}
    values = {f"eval/{name}": i / 100 for i, name in enumerate(titles)}
    rows = report.table([("now", values)], Task()).splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == list(titles.values())
    assert [float(row.split()[-1]) for row in rows] == pytest.approx(list(values.values()))


def test_table_of_nothing():
    """Where nothing was held out the table says so."""
    assert report.table([("now", {})], tasks.Chain()) == "nothing held out to judge by"


SUMMARY = {"before": {"eval/accuracy": 0.5}, "after": {"eval/accuracy": 1.0}, "steps": 20,
           "seconds": 75, "eval_seconds": 9, "sampled_tokens": 12345, "trained_tokens": 678}
COSTS = "20 steps in 1:15, of it 0:09 for evaluations; 12,345 tokens sampled, 678 trained on"
COMPARE = "       python compare.py sft dft dpo grpo --seeds 3"


def finish(monkeypatch, summary=SUMMARY, own_task=None, **settings):
    """-> the lines that the end of a run prints. The trained model gets qq right and p wrong, the
    start model the other way round."""
    monkeypatch.setattr(report, "plot", lambda out_dir: f"picture of {out_dir}")
    after = Policy("pi", {**DRAWS, "p": ["000"], "qq": ["10"], "rrr": ["0"]})
    settings = {"algo": "grpo", "task": "chain", "data": None, "out_dir": "out/x",
                "worked_share": 0.3, "other_skills": False, **settings}
    algo = SimpleNamespace(task=own_task or Task(), model=after, ref_model=Policy("ref"),
                           tokenizer=Tokens(), config=config_of(**settings))
    return report.finish(algo, summary).splitlines()


def test_finish(monkeypatch):
    """Table, the first three held-out problems answered before and after and judged, costs, files,
    what to try next."""
    assert finish(monkeypatch) == [
        "",
        "held-out problems        before    after   chance",
        "accuracy, sampled         0.500    1.000         ",
        "",
        "problem (sampled answers)  before       after",
        "p                          1        ok  000  x",
        "qq                         0        x   10  ok",
        "rrr                        101      x   0  ok",
        "",
        COSTS,
        "files: out/x/ckpt.pt, metrics.jsonl, summary.json, picture of out/x",
        "next:  python sample.py out/x", "       python train.py --algo sft", COMPARE]


@pytest.mark.parametrize("settings, lines", [
    (dict(algo="pretrain"), ["next:  python train.py --algo grpo --init_from out/x"]),
    (dict(algo="pretrain", task="countdown"),
     ["next:  python train.py --algo grpo --init_from out/x --task countdown"]),
    (dict(algo="rm"),
     ["next:  python train.py --algo ppo --reward model --reward_model out/x"]),
    (dict(algo="rm", data="my.jsonl"),
     ["next:  python train.py --algo ppo --reward model --reward_model out/x --data my.jsonl"]),
    (dict(algo="sft"), ["next:  python sample.py out/x", "       python train.py --algo grpo",
                        COMPARE]),
    (dict(task="countdown"),
     ["next:  python sample.py out/x", "       python train.py --algo sft --task countdown",
      COMPARE + " --task countdown"]),
    (dict(algo="pretrain", worked_share=0.005, other_skills=True),
     ["next:  python train.py --algo grpo --init_from out/x --worked_share 0.005 --other_skills"]),
    (dict(data="my.jsonl", task="countdown"),
     ["next:  python sample.py out/x", "       python train.py --algo sft --data my.jsonl",
      COMPARE + " --data my.jsonl"]),
])
def test_what_to_try_next(monkeypatch, settings, lines):
    """Commands that fit what was run: its algorithm, task, world and data."""
    assert finish(monkeypatch, **settings)[-len(lines):] == lines


def test_finish_without_figures(monkeypatch, tmp_path):
    """A base model and a reward model have no table; a file's held-out nll is no accuracy, so that
    no answers are shown; a file may hold texts, and may hold out nothing at all."""
    for algo in ("pretrain", "rm"):
        assert finish(monkeypatch, algo=algo)[:2] == ["", COSTS]
    judged = {**SUMMARY, "before": {"eval/loss": 2.0}, "after": {"eval/loss": 1.0}}
    lines = finish(monkeypatch, judged)
    assert lines[2:5] == ["held-out nll              2.000    1.000         ", "", COSTS]
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    task = files.JsonLines(tmp_path / "texts.jsonl", tmp_path / "texts.jsonl")
    nothing = {**SUMMARY, "before": {}, "after": {}}
    for held_out in (task.test, []):
        task.test = held_out
        lines = finish(monkeypatch, nothing, own_task=task, algo="sft")
        assert lines[:2] == ["", COSTS] and lines[3] == "next:  python sample.py out/x"


# -- a comparison ---------------------------------------------------------------------------------


def result(variant="sft", seed=0, before=None, after=None, **costs):
    return {"variant": variant, "seed": seed, "before": before or {}, "after": after or {},
            "steps": 7, "seconds": 8.6, **costs}


@pytest.mark.parametrize("after, said", [
    ({"eval/accuracy": 0.98765, "eval/loss": 1.0}, "held-out accuracy 0.988"),
    ({"eval/loss": 1.23456}, "held-out nll 1.235"), ({}, "nothing held out to judge by")])
def test_result_line(after, said):
    """One line for each run of a comparison: accuracy, else nll, else that there is nothing."""
    line = report.result_line(result("dft:alpha=.5", 2, after=after))
    assert line == f"dft:alpha=.5, seed 2: {said}, 7 steps in 9 s"


def test_comparison_of_every_measure():
    """Each column shows its own figure: for the base that of the first run before it began, for a
    variant the mean over its seeds and, behind +-, half of largest minus smallest; what a run cost
    is a mean alone. In words: what MB contains."""
    judged = ["accuracy", "greedy_accuracy", "pass@16", "ood_accuracy", "loss", "kl", "mean_length"]
    costs = ["updates", "sampled_tokens", "trained_tokens", "train_seconds", "eval_seconds",
             "peak_memory_mb"]

    def run(variant, seed, shift):
        figures = {f"eval/{name}": i + shift for i, name in enumerate(judged)}
        return result(variant, seed, {k: v + 1 for k, v in figures.items()}, figures,
                      **{name: 1000 * i + 10 * shift for i, name in enumerate(costs)})
    table = report.comparison([run("b", 0, 0.0), run("a", 0, 0.2), run("b", 1, 0.4),
                               run("b", 2, 0.2), run("a", 1, 0.6)])
    rows = table.splitlines()[:4]
    assert [re.split(" {2,}", row.strip()) for row in rows] == [
        ["accuracy", "greedy", "pass@16", "ood", "nll", "KL", "length", "updates", "sampled",
         "trained", "train s", "eval s", "MB"],
        ["base", "1.000", "2.000", "3.000", "4.000", "5.000", "6.00", "7.0", *"------"],
        ["b", *(f"{i}.200 +-0.200" for i in range(5)), "5.20 +-0.20", "6.2 +-0.2",
         "2", "1,002", "2,002", "3002.0", "4002.0", "5002"],
        ["a", *(f"{i}.400 +-0.200" for i in range(5)), "5.40 +-0.20", "6.4 +-0.2",
         "4", "1,004", "2,004", "3004.0", "4004.0", "5004"]]
    assert len(set(map(len, rows))) == 1                                            # aligned:
    assert rows[2].startswith("b     0.200 +-0.200  1.200") and rows[2].endswith("  4002.0  5002")
    assert table.endswith("\n" + report.COSTS)
    assert "Python, torch and evaluations included" in table


def test_comparison_of_what_was_not_judged():
    """Runs without a held-out figure: their costs alone, and a base that has none."""
    table = report.comparison([result(updates=5, peak_memory_mb=None), result(seed=1, updates=7)])
    rows = table.removesuffix(report.COSTS).splitlines()
    assert [row.split() for row in rows] == [["updates"], ["base", "-"], ["sft", "6"]]


@pytest.mark.parametrize("platform, used, cuda, expected", [
    ("linux", 2048, None, 2.0), ("darwin", 3 * 2**20, None, 3.0),
    ("linux", 2048, 5 * 2**20, 5.0), ("linux", 2048, 0, 2.0)])
def test_peak_memory(monkeypatch, platform, used, cuda, expected):
    """In MB: of the process, which Linux counts in KB and macOS in bytes; of the tensors on a GPU,
    if one was used."""
    resource = ModuleType("resource")
    resource.RUSAGE_SELF, resource.getrusage = 0, lambda who: SimpleNamespace(ru_maxrss=used)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: cuda)
    assert report.peak_memory_mb() == expected
    monkeypatch.setitem(sys.modules, "resource", None)              # Windows
    assert report.peak_memory_mb() == (expected if cuda else None)
