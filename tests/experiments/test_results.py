"""
The results that are kept: each is what its script, as it stands, makes of the figures in it.
"""

import importlib
import json

import common
import pytest
from conftest import ROOT

# Those of experiments whose arms are runs, which experiments/common.py writes.
PATHS = [path for path in sorted((ROOT / "experiments" / "results").glob("*.json"))
         if "flags" in json.loads(path.read_text()).get("settings", {})]


def test_there_are_results():
    """Else the tests below would test nothing."""
    assert "facts" in [path.stem for path in PATHS]


@pytest.fixture(params=PATHS, ids=[path.stem for path in PATHS])
def kept(request):
    """A results file and the script that made it."""
    return json.loads(request.param.read_text()), importlib.import_module(request.param.stem)


def test_the_verdict_is_what_the_rule_says(kept):
    """Of the figures in the file; and so are the effects."""
    found, module = kept
    figures = {arm: a["figures"] for arm, a in found["arms"].items()}
    verdict, effects = module.verdict({"base": found.get("base", {}), **figures,
                                       **found.get("extra", {})})
    assert found["verdict"] == verdict and set(found["effects"]) == set(effects)
    for name, effect in effects.items():
        assert found["effects"][name] == pytest.approx(effect)


def test_the_settings_are_those_of_the_script(kept):
    """All arms, all flags, five seeds (more where the script says so), and a whole sweep on other
    seeds."""
    found, module = kept
    settings, seeds = found["settings"], getattr(module, "SEEDS", 5)
    assert (settings["arms"], settings["flags"]) == (module.ARMS, [*module.FLAGS, *common.LONG])
    assert settings["sweep_seeds"] == module.SWEEP_SEEDS and settings["seeds"] == seeds >= 5
    assert list(found["arms"]) == list(module.ARMS)
    for arm in found["arms"].values():
        assert arm["seeds"] == list(range(seeds))
        assert all(len(values) == seeds for values in arm["figures"].values())
        assert all(len(values) == module.SWEEP_SEEDS for values in arm["sweep"].values())
    assert ("extra" in found) == hasattr(module, "extra")
    for figures in found.get("extra", {}).values():
        assert all(len(values) == seeds for values in figures.values())


def test_an_arm_has_its_best_value(kept):
    """The variant that stands for an arm has the best mean of its sweep."""
    found, module = kept
    for arm, word in module.ARMS.items():
        sweep, variant = found["arms"][arm]["sweep"], found["arms"][arm]["variant"]
        assert bool(sweep) == ("|" in word)
        means = {name: sum(values) / len(values) for name, values in sweep.items()}
        assert not means or variant in means
        # (An experiment that chooses by another measure tests its choice itself.)
        assert not means or hasattr(module, "choose") or means[variant] == max(means.values())


def test_the_picture_is_kept_beside_it(kept):
    found, _ = kept
    assert (ROOT / "experiments" / "results" / f"{found['experiment']}.png").exists()
