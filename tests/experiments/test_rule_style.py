"""The rule of experiments/style.py on figures made up for each outcome, and what it measures."""

import common
import pytest
import style
import tiny
import torch
from experiment_helpers import around, first_seed, scattered

BASE = 0.44


def of_style(own=0.9, letters=0.3, swapped=0.2, grpo=0.8, learned=0.98, grpo_learned=0.98):
    """Figures of every arm: ood of SFT on many demonstrations and of GRPO as given, others .5.
    learned: on the task, of SFT with letters."""
    def found(ood, accuracy=0.98, kl=1.0):
        ood, accuracy = around(ood), around(accuracy)
        return {"accuracy": accuracy, "ood": ood, "reversing": ood, "facts": ood,
                "KL": [kl] * len(ood), "forward KL": [kl] * len(ood)}
    figures = {arm: found(0.5) for arm in ("base", *style.ARMS)}
    return {**figures, "base": found(BASE, BASE, 0.0), "GRPO": found(grpo, grpo_learned),
            "SFT, own, many": found(own), "SFT, letters, many": found(letters, learned),
            "SFT, swapped, many": found(swapped)}


@pytest.mark.parametrize("changed, expected", [
    ({"own": 0.3}, common.HOLDS),
    ({}, "holds with a condition: of SFT on letters and swapped"),
    ({"letters": 0.9}, "holds with a condition: of SFT on swapped"),
    ({"letters": 0.41}, "holds with a condition: of SFT on swapped"),   # falls, but by too little
    ({"letters": scattered(0.4)}, "holds with a condition: of SFT on swapped"),
    ({"learned": 0.85}, "holds with a condition: of SFT on swapped"),   # and had not learned it
    ({"learned": 0.91}, "holds with a condition: of SFT on letters and swapped"),
    ({"letters": 0.9, "swapped": 0.6}, common.FAILS),
    ({"grpo": 0.46}, common.FAILS),                        # RL does not rise
    ({"own": 0.3, "grpo": 0.3}, common.FAILS),
    ({"letters": 0.9, "swapped": scattered(0.4)}, common.UNCLEAR),
    ({"own": 0.3, "grpo": scattered(0.6)}, common.UNCLEAR),
    ({"own": 0.3, "grpo_learned": 0.85}, common.UNCLEAR),
    ({"letters": 0.9, "swapped": 0.6, "learned": 0.85}, common.UNCLEAR)])
def test_the_rule_of_style(changed, expected):
    assert style.verdict(of_style(**changed))[0] == expected


def test_one_seed_says_nothing_about_style():
    assert style.verdict(first_seed(of_style(own=0.3)))[0] == common.UNCLEAR


def test_the_effects_of_style_have_their_sign():
    """The base has .44, GRPO .8, SFT .9 in its own style and .3 with letters, DFT there .5; on the
    task .9 and .98."""
    _, effects = style.verdict(of_style(learned=0.9))
    for name, value in (("GRPO - base, ood", 0.36), ("SFT own - base, ood", 0.46),
                        ("SFT letters - base, ood", -0.14), ("GRPO - SFT letters, ood", 0.5),
                        ("GRPO - SFT swapped, ood", 0.6),
                        ("DFT letters - SFT letters, ood", 0.2),
                        ("DFT letters - SFT letters, accuracy", 0.08)):
        assert effects[name]["mean"] == pytest.approx(value)


@pytest.mark.parametrize("kl", ["KL", "forward KL"])
@pytest.mark.parametrize("kept", ["ood", "reversing", "facts"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_razor(kl, kept, sign):
    """Where the arm of larger KL has lost more the correlation is 1, where it has lost less -1; a
    constant KL says nothing."""
    figures = of_style()
    for i, arm in enumerate(style.ARMS):
        figures[arm][kl] = [10.0 + sign * i] * 5
        figures[arm][kept] = [0.9 - 0.01 * i] * 5
    effects = style.verdict(figures)[1]
    assert effects[f"{kl} and {kept} lost, rank correlation"]["mean"] == pytest.approx(sign)
    other = {"KL": "forward KL", "forward KL": "KL"}[kl]
    assert effects[f"{other} and {kept} lost, rank correlation"]["mean"] == 0


def test_rank_correlation_by_hand():
    """1 2 9 and 5 8 7: ranks 1 2 3 and 1 3 2, about their mean -1 0 1 and -1 1 0: (1 + 0 + 0) / 2.
    Of equal values the ranks are shared."""
    assert style.ranks([3, 1, 3]) == [2.5, 1, 2.5]
    assert style.rank_correlation([1, 2, 9], [5, 8, 7]) == pytest.approx(0.5)
    assert style.rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    # -1 .5 .5 and -1 0 1: 1.5 / sqrt(1.5 x 2)
    assert style.rank_correlation([1, 2, 2], [1, 2, 3]) == pytest.approx(1.5 / 3 ** 0.5)
    assert style.rank_correlation([4, 4, 4], [1, 2, 3]) == 0


def test_forward_kl_by_hand(monkeypatch):
    """KL(base || policy) along the base's own answers, as single unpadded forward passes have it;
    of the base itself 0."""
    base, policy, tokenizer = tiny.tiny_model(), tiny.tiny_model(seed=1), tiny.Letters()
    tiny.move(base)
    config = style.common.flags.parse(["--algo", "sft", "--eval_problems", "5", "--device", "cpu"],
                                      common.train.ALGORITHMS, common.train.GPTConfig)
    asked = []
    monkeypatch.setattr(style.compare, "start_of",
                        lambda config: asked.append(config) or "the start")
    monkeypatch.setattr(style.checkpoint, "read", lambda folder: {"folder": folder})
    monkeypatch.setattr(style.checkpoint, "build_model",
                        lambda found, device: {"the start": base}[found["folder"]])
    task, generate, drawn = common.prepare.tasks.Chain(), base.generate, []
    base.generate = lambda *args: drawn.append(generate(*args)) or drawn[-1]
    found = style.measure(policy, tokenizer, task, config)
    kls = []
    for i, problem in enumerate(task.problems("test", 5, 0)):
        prompt = [tokenizer.eos_id] + tokenizer.encode(problem["prompt"])
        length = int(drawn[0].completion_mask[i].sum())
        ids = torch.tensor([prompt + drawn[0].completion_ids[i][:length].tolist()])
        logp, logq = (m(ids)[0, len(prompt) - 1:-1].log_softmax(-1) for m in (base, policy))
        kls.append((logp.exp() * (logp - logq)).sum().item())
    assert found == {"forward KL": pytest.approx(sum(kls) / 5, abs=1e-5)} and sum(kls) > 0.5
    assert asked == [config]
    assert style.measure(base, tokenizer, task, config)["forward KL"] == pytest.approx(0, abs=1e-5)
