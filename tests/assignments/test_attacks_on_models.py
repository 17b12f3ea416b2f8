"""
Attacks on what travels with a model: modules that are built anew, generators, buffers that a body
may write to, and named tuples that it may return. The bodies are those of assignment 2.
"""

import inspect
import pathlib
import tempfile
import textwrap

import pytest
import torch

from assignments import check, judge, make, table
from conftest import ROOT
from harness.errors import InputError
from llama import EOS, PAD, PROMPTS, make_model, pad
from model import Samples

ASSIGNMENT = table.assignment(2)
ROTATE, ATTEND, SAMPLE, GENERATE = (
    "model.rotate", "model.CausalSelfAttention.forward", "model.sample", "model.GPT.generate")


# Before each body: one process tries several tricks, one a call.
HEAD = """
    import collections, gc
    tried = torch.__dict__.setdefault("tried", [])
    tried.append(0)
    [worker] = [o for o in gc.get_objects() if type(o).__name__ == "Worker"]
    """


@pytest.fixture
def peer():
    """peer({name: body}): the judge's side of a worker with the project's bodies but for these."""
    with tempfile.TemporaryDirectory() as folder:
        made = []

        def peer(bodies):
            text = (ROOT / "model.py").read_text()
            for name, body in bodies.items():
                function = name.split(".", 1)[1]
                first, last = check.body_lines(text, check.find(text, function))
                lines = text.splitlines(keepends=True)
                indent = " " * (4 * name.count("."))
                body = f"{inspect.cleandoc(HEAD)}\n{inspect.cleandoc(body)}\n"
                lines[first - 1:last] = [textwrap.indent(body, indent)]
                text = "".join(lines)
            copy = pathlib.Path(folder) / str(len(made))
            make.write({**make.code(ASSIGNMENT), "model.py": text}, copy)
            made.append(judge.Peer(str(copy), ASSIGNMENT.bodies, {}, 10))
            return made[-1]
        yield peer
        for one in made:
            one.stop()


def attend(peer, past=None, filled=None, T=2):
    """One call of a module's attention, as its block makes it."""
    model = make_model()
    module, x = model.layers[0].self_attn, torch.randn(T, 32).requires_grad_()
    mask = torch.ones(1, 1, T, T + (filled or 0)).bool()
    args = [module, x, judge.place("model.Padding")[0].Padding(1, T, None), model.cos[:T, None],
            model.sin[:T, None], mask]
    return module, x, args, peer.call(ATTEND, [*args, past, filled], {})


def test_modules_generators_and_buffers_travel(peer):
    """The project's own bodies: the same values, gradients of parameters and inputs, the same
    draws, the same buffer, the same error as in this process."""
    peer = peer({})
    module, x, args, (y, (k, v)) = attend(peer)
    direction, wanted = torch.randn_like(y), [x, *module.parameters()]
    found = torch.autograd.grad((y * direction).sum() + k.sum() + v.sum(), wanted)
    y2, (k2, v2) = module(*args[1:])
    expected = torch.autograd.grad((y2 * direction).sum() + k2.sum() + v2.sum(), wanted)
    for a, b in zip([y, k, v, *found], [y2, k2, v2, *expected]):
        torch.testing.assert_close(a, b)
    model = make_model(eos_bias=1.0)
    ids, mask = pad(PROMPTS, "left")
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(2):   # the second goes on from where the first has left the generators
        ours = peer.call(GENERATE, [model, ids, mask, 8, EOS, PAD, 3], {"generator": one})
        theirs = model.generate(ids, mask, 8, EOS, PAD, 3, generator=two)
        assert type(ours) is Samples and all(torch.equal(*pair) for pair in zip(ours, theirs))
    assert torch.equal(one.get_state(), two.get_state())
    buffers = [torch.full((2, 1, 4, 5, 8), 7.0) for _ in range(2)]
    with torch.no_grad():
        _, _, args, _ = attend(peer, buffers[0], 3)
        args[0](*args[1:], buffers[1], 3)
    assert torch.equal(buffers[0][:, :, :, 3:] == 7, torch.zeros(2, 1, 4, 2, 8).bool())
    assert buffers[0][:, :, :, :3].eq(7).all() and buffers[1].shape == buffers[0].shape
    with pytest.raises(InputError, match="block_size 32"):
        peer.call(GENERATE, [model, ids, mask, 80, EOS, PAD], {})


def test_arguments_are_not_changed_where_nothing_is_to_be_written(peer):
    """A body that turns the angles to 0, so that doing nothing would be right, has turned its own
    copies; nor does it reach the weights of the judge's model, or what is no buffer."""
    tricks = peer({
        ROTATE: """
            cos.fill_(1), sin.zero_()
            return x""",
        ATTEND: """
            with torch.no_grad():
                for t in (x, cos, sin, self.q_proj.weight, self.o_proj.weight):
                    t.zero_()
                mask.fill_(True)
            return x * 0, (x * 0, x * 0)"""})
    angles = torch.rand(3, 1, 2)
    cos, sin, x = angles.cos(), angles.sin(), torch.randn(3, 1, 4)
    found = tricks.call(ROTATE, [x, cos, sin], {})
    assert torch.equal(found, x) and torch.equal(cos, angles.cos()) and torch.equal(
        sin, angles.sin())
    module, x, args, _ = attend(tricks)
    assert module.q_proj.weight.abs().min() > 0 and x.abs().min() > 0
    assert args[3][1:].ne(1).any() and module.o_proj.weight.abs().sum() > 0


def test_what_is_sent_back_has_the_shape_of_what_was_given(peer):
    """Too few buffers, too many, of another shape or of no kind: the call has failed, and the
    buffer is as it was."""
    tricks = [None, [], [1, 2], {"list": [{"list": []}, {"list": [1]}]},
              {"list": ["x", {"list": []}]}, {"list": [{"list": [3, 4]}, {"list": []}]},
              {"dict": [[1, 2]]}]
    peer = peer({ATTEND: f"""
        tricks = {tricks}
        tricks[4]["list"][0] = {{"list": [{{"tensor": "float32", "shape": [2], "at": 0}}]}}
        say = worker.say
        def forged(message, blobs=()):
            worker.say = say
            say({{**message, "kept": tricks[len(tried) - 1]}}, blobs)
        worker.say = forged
        return x, (x, x)"""})
    buffer = torch.full((2, 1, 4, 5, 8), 7.0)
    for _ in tricks:
        with torch.no_grad(), pytest.raises(judge.Body, match="written to is of no use"):
            attend(peer, buffer, 3)
        assert buffer.eq(7).all()


def test_a_forged_state_of_a_generator_is_refused(peer):
    """torch checks what it can of a state; the rest is its size and its type."""
    peer = peer({SAMPLE: """
        byte = torch.uint8
        states = [torch.zeros(5056, dtype=byte), torch.full((5056,), 255, dtype=byte),
                  torch.zeros(7, dtype=byte), torch.zeros(5056, dtype=torch.float64), None]
        class Lies:
            def get_state(self):
                return states[len(tried) - 1]
        for _, generators in worker.kept.values():
            generators[:] = [Lies()]
        return logits.argmax(-1), logits[:, 0]"""})
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    for _ in range(5):
        with pytest.raises(judge.Body, match="of no use"):
            peer.call(SAMPLE, [torch.zeros(2, 3)], {"generator": generator})
        assert torch.equal(generator.get_state(), before)


def test_only_known_tuples_are_made_of_what_is_returned(peer):
    """Of a name and fields the judge makes Samples and nothing else, with as many fields as it has;
    a module or a generator does not come back at all."""
    tricks = ['collections.namedtuple("Popen", "args")(["touch", "x"])',
              'collections.namedtuple("Samples", "a b")(1, 2)',
              'collections.namedtuple("Samples", "a b c d e")(1, 2, 3, 4, 5)',
              'collections.namedtuple("GPT", "config")({})', "self", "generator"]
    peer = peer({GENERATE: f"""
        return ({", ".join(tricks)})[len(tried) - 1]"""})
    ids, mask = pad(PROMPTS, "left")
    for _ in tricks:
        with pytest.raises(Exception) as error:
            peer.call(GENERATE, [make_model(), ids, mask, 4, EOS, PAD],
                      {"generator": torch.Generator()})
        assert "no value" in str(error.value) or "returned a value of type" in str(error.value)


def test_a_model_in_the_worker_is_no_way_back(peer):
    """Its hooks, its class and what hangs on it stay there: the judge's model is another object,
    which nothing of the body reaches."""
    tricks = peer({GENERATE: """
        GPT.completion_logits = GPT.forward = lambda *args, **kwargs: 1 / 0
        self.lm_head.register_forward_hook(lambda *args: 1 / 0)
        self.judge = self.config.judge = "here"
        self.config.block_size = 0
        return Samples(prompt_ids, prompt_mask, prompt_mask[:, 0], prompt_ids * 0.0)"""})
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    kept = []
    model.secret = kept.append
    found = tricks.call(GENERATE, [model, ids, mask, 4, EOS, PAD], {})
    assert torch.equal(found.completion_ids, ids) and model(ids, mask).shape == (3, 7, 8)
    assert not hasattr(model, "judge") and model.config.block_size == 32 and kept == []
