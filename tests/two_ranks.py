"""
What each rank of two does, as a script: an update of every algorithm, in float64. Rank 0 writes the
batches, gradients, weights and figures to a file, for test_ranks.py, which makes the same updates
from the same batches in one process.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python tests/two_ranks.py FILE
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/algorithms")]

import torch  # noqa: E402

import tiny  # noqa: E402
import train  # noqa: E402
from dft import DFT  # noqa: E402
from harness import ranks  # noqa: E402
from rft import RFT  # noqa: E402
from rm import RM  # noqa: E402
from sft import SFT, Pretrain  # noqa: E402
from tiny_dpo import make_dpo  # noqa: E402
from tiny_hybrid import RECIPES, hard, make_hybrid  # noqa: E402

FIVE = tiny.PROBLEMS + [{"prompt": "2*2=", "answer": "4"}]   # three for a rank, two for the other
EXAMPLES = [{**problem, "completion": d["completion"]}
            for problem, d in zip(FIVE, tiny.DEMONSTRATIONS)]
# What each variant makes, and from which examples. Some batches leave a rank without a row.
VARIANTS = {
    "pretrain": (lambda: tiny.make(Pretrain, ref_seed=None), tiny.DOCUMENTS),
    "sft": (lambda: tiny.make(SFT), tiny.DEMONSTRATIONS),
    "sft of one": (lambda: tiny.make(SFT), tiny.DEMONSTRATIONS[1:2]),
    **{f"dft {loss_type}": (lambda loss_type=loss_type: tiny.make(DFT, loss_type=loss_type),
                            tiny.DEMONSTRATIONS)
       for loss_type in ("dft", "psft", "asft", "gem")},
    "rft": (lambda: tiny.make(RFT, tiny.coin, num_generations=4, max_steps=6), FIVE),
    "rm": (lambda: tiny.make(RM, tiny.coin, num_generations=4), FIVE),
    "dpo": (make_dpo, FIVE),
    "dpo of one pair": (lambda: make_dpo(tiny.PAIRS), tiny.PAIRS[:1]),
    "dpo kto": (lambda: make_dpo(loss_type="kto"), FIVE),
    "dpo confidence": (lambda: tiny.make(make_dpo.__globals__["DPO"], num_generations=4,
                                         reward="confidence"), FIVE),
    "ppo": (lambda: tiny.make_ppo(num_minibatches=3), FIVE),
    **{f"grpo {loss_type}": (lambda loss_type=loss_type: tiny.make_grpo(
        loss_type=loss_type, beta=0.1, num_iterations=2, num_minibatches=2), FIVE)
       for loss_type in ("grpo", "dr_grpo", "dapo", "cispo")},
    "grpo of one": (lambda: tiny.make_grpo(), FIVE[1:2]),
    "grpo in micro-batches": (lambda: tiny.make_grpo(micro_batch_size=3, num_iterations=2), FIVE),
    "grpo random": (lambda: tiny.make_grpo(None, reward="random"), FIVE),
    "grpo remax": (lambda: tiny.make_grpo(advantage="remax", scale_rewards="none"), FIVE),
    "grpo covariance": (lambda: tiny.make_grpo(covariance="clip", cov_share=0.2, cov_low=1e-4),
                        FIVE),
    **{f"hybrid {name}": (lambda name=name: make_hybrid(hard, **RECIPES[name]), EXAMPLES[:4])
       for name in RECIPES},
}


def steps(name, batch=None):
    """The updates of one step of a variant by plain gradient descent. batch: in place of what it
    samples. -> the batch, the gradient of each update, the weights after them, what was logged"""
    make, examples = VARIANTS[name]
    algo, run, gradients = make(), tiny.a_run(), []
    trained = [p for p in algo.parameters() if p.requires_grad]
    algo.optimizer = torch.optim.SGD(trained, lr=0.1)
    algo.optimizer.register_step_pre_hook(lambda *_: gradients.append(
        torch.cat([p.grad.flatten() for p in trained])))
    batch = tiny.sample(algo, examples, log=run.log) if batch is None else batch
    for minibatch in algo.minibatches(dict(batch), run.log):
        train.update(algo, minibatch, run)
    weights = torch.cat([p.detach().flatten() for p in trained])
    return {"batch": batch, "gradients": gradients, "weights": weights, "log": run.log.line(),
            "totals": run.log.totals}


def in_float64():
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)


def main(path):
    in_float64()
    torch.set_num_threads(1)
    with ranks.together("cpu"):
        found = {name: steps(name) for name in VARIANTS}
        weights = ranks.everyone({name: result["weights"] for name, result in found.items()})
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in VARIANTS)
        if ranks.RANK == 0:
            torch.save(found, path)
        ranks.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
    ranks.leave(0)
