"""
One folder, judged. The project's own tests, and the hidden ones, run in this process over the
project's own files, in which the named functions hand each call to the student's process
(worker.py). Arguments travel as plain numbers, and so do results and gradients: the tests compare
numbers in a process that has never run a line of the student's.

    python -m assignments.judge < {"number": 6, "folder": ..., "salt": ..., "seconds": 20}
"""

import ast
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"   # before torch

import torch

from assignments import check, make, table, wire
from harness.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 300   # for all tests of one folder
# What a body may ask of the objects that it is given: names that only look.
REACHABLE = {"encode", "encode_prompt", "eos_id", "pad_id", "vocab_size", "completion_logits",
             "device", "dtype", "config", "model", "ref_model", "tokenizer"}
# Of the file of the body that is called: modules that the worker builds anew, from their config and
# their numbers, and named tuples; the named tuples that a body may return; and the argument that it
# may write to.
BUILT, NAMED, RETURNED = {"GPT", "CausalSelfAttention"}, {"Padding"}, {"Samples": "model"}
WRITES = {"model.CausalSelfAttention.forward": "past"}
ERRORS = {e.__name__: e for e in (ValueError, TypeError, IndexError, KeyError, RuntimeError,
                                  AttributeError, NameError, NotImplementedError, MemoryError,
                                  ZeroDivisionError, ImportError, RecursionError, InputError)}


# -- the named bodies, and nothing else -----------------------------------------------------------


def read(folder, file):
    """The text of a student's file. Raises ValueError for what is no plain file of the folder."""
    path = pathlib.Path(folder) / file
    if path.resolve() != pathlib.Path(folder).resolve() / file or not path.is_file():
        raise ValueError("there is no such file")
    if path.stat().st_size > 1 << 20:
        raise ValueError("the file is larger than 1 MB")
    return path.read_text()


def graft(text, theirs, names):
    """The pristine text with the named bodies of the other text, taken by syntax tree: everything
    else, signatures and docstrings included, is the pristine one's. -> text, {name: what is wrong}
    """
    tree, wrong = ast.parse(text), {}
    for name in names:
        scope = check.find(tree, name)
        pristine = scope.body
        try:
            node = check.find(theirs, name)
            if node is None:
                raise ValueError("there is no such function")
            docstring = pristine[:ast.get_docstring(scope) is not None]
            scope.body = docstring + check.body_of(node)
            compile(ast.unparse(tree), name, "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            wrong[name] = f"{name}{line}: {getattr(error, 'msg', error)}"
            scope.body = pristine
    return ast.unparse(tree), wrong


def prepare(assignment, folder, into):
    """Write the student's copy, with the bodies of the folder, for the worker. -> {name: what is
    wrong with it}"""
    wrong, files = {}, make.code(assignment)
    for file, names in assignment.files().items():
        try:
            files[file], found = graft(files[file], read(folder, file), names)
            wrong |= {f"{file[:-3]}.{name}": words for name, words in found.items()}
        except (OSError, ValueError) as error:
            wrong |= {f"{file[:-3]}.{name}": f"{file}: {error}" for name in names}
    make.write(files, into)
    return wrong


# -- calls to the other process -------------------------------------------------------------------


class Body(NotImplementedError):
    """The student's code did not come back with a value."""


class Peer:
    """The worker, as the judge sees it: started when needed, again when it has ended."""

    def __init__(self, folder, names, wrong, seconds):
        self.folder, self.names, self.dead, self.seconds = folder, names, dict(wrong), seconds
        self.process, self.number, self.end = None, 0, time.monotonic() + TOTAL_SECONDS

    def start(self):
        ours, theirs = socket.socketpair()
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH",
                                                    "VIRTUAL_ENV") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "assignments/worker.py"), self.folder,
             str(theirs.fileno()), *self.names], pass_fds=[theirs.fileno()],
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        theirs.close()
        self.socket = ours
        self.receive("the file", time.monotonic() + 120)

    def stop(self):
        """End the worker and whatever it may have started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.socket.close()
            self.process = None

    def give_up(self, name, words):
        """End the worker; what has brought it down is not asked again."""
        self.stop()
        self.dead[name] = f"{name}: {words}"
        raise Body(self.dead[name])

    def receive(self, name, end):
        """The next message, if it comes in time."""
        try:
            return wire.receive(self.socket, max(end - time.monotonic(), 1e-3))
        except TimeoutError:
            self.give_up(name, f"did not return within {self.seconds} seconds")
        except wire.Broken as error:
            self.give_up(name, str(error))

    def send(self, name, message, blobs):
        try:
            wire.send(self.socket, message, blobs, self.seconds)
        except wire.Broken as error:
            self.give_up(name, str(error))

    def call(self, name, args, kwargs):
        """Call a body and return its value. While it runs it may ask for what it was given objects
        for; all together has `seconds`."""
        if name in self.dead:
            raise Body(self.dead[name])
        if time.monotonic() > self.end:
            raise Body(f"{name}: all calls together took more than {TOTAL_SECONDS} seconds")
        if self.process is None:
            self.start()
        self.number += 1
        number, leaves, kept, blobs = self.number, [], [], []
        buffers, generators = [], []
        may_write = list(map(id, written_to(name, args, kwargs)))
        end = time.monotonic() + self.seconds

        def tensor(t):
            if id(t) in may_write and not t.requires_grad:
                buffers.append(t)
                return {"written": len(buffers) - 1}
            if not t.requires_grad:
                return {}
            leaves.append(t)
            return {"leaf": len(leaves) - 1}

        def again(value):
            return wire.pack(value, blobs, tensor, other)

        def other(value):
            kind, file = type(value), type(value).__module__
            if isinstance(value, torch.Generator):
                generators.append(value)
                return {"generator": again(value.get_state())}
            if file == name.split(".")[0] and kind.__name__ in NAMED:
                return {"named": again([file, kind.__name__, *value])}
            if file == name.split(".")[0] and kind.__name__ in BUILT:
                return {"module": again([file, kind.__name__, *numbers_of(value)])}
            kept.append(value)
            return {"remote": len(kept) - 1}

        def pack(value):
            blobs.clear()
            return again(value)

        arguments = pack([list(args), kwargs])
        self.send(name, {"kind": "call", "number": number, "name": name, "arguments": arguments,
                         "grad": torch.is_grad_enabled(),
                         "double": torch.get_default_dtype() == torch.float64}, blobs)
        while True:
            message, blob = self.receive(name, end)
            if not isinstance(message, dict) or message.get("kind") not in ("ask", "result"):
                message = {"kind": "result", "error": "Broken", "words": "it sent no answer"}
            if message["kind"] == "result":
                break
            try:
                reply = {"value": pack(self.answer(message, blob, kept))}
            except Exception as error:   # of the object that was asked: the body's to handle
                blobs.clear()
                reply = {"error": str(error)[:200]}
            self.send(name, {"kind": "reply", **reply}, blobs)
        if "error" in message:
            words = " ".join(str(message.get("words"))[:300].split())
            error = ERRORS.get(str(message["error"]), Body)
            raise error(words if error is not Body else f"{name}: {message['error']} {words}")
        self.keep(name, message.get("kept"), blob, buffers, generators)
        return self.value(name, number, message.get("value"), blob, leaves)

    def keep(self, name, entry, blob, buffers, generators):
        """What a call has written to, and how far it has used up its generators."""
        try:
            written, states = wire.unpack(entry, blob)
            for olds, news in ((buffers, written), ([g.get_state() for g in generators], states)):
                if [(t.shape, t.dtype) for t in olds] != [(t.shape, t.dtype) for t in news]:
                    raise ValueError
            for generator, state in zip(generators, states):
                generator.set_state(state)
            with torch.no_grad():
                for buffer, new in zip(buffers, written):
                    if not torch.equal(buffer, new):
                        buffer.copy_(new)
        except (wire.Broken, ValueError, TypeError, AttributeError, RuntimeError):
            raise Body(f"{name}: what it has written to is of no use") from None

    def answer(self, message, blob, kept):
        """What a body asks of an object: an attribute that it may see, or a call of a method that
        it has been given."""
        def remote(kind, n):
            return kept[n]
        if "get" in message:
            value, name = kept[message["of"]], message["get"]
            fields = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(
                value) else set()
            if name not in REACHABLE | fields:
                raise AttributeError(f"the graded object has no attribute {name!r}")
            return getattr(value, name)
        args, kwargs = wire.unpack(message["arguments"], blob, other=remote)
        return kept[message["invoke"]](*args, **kwargs)

    def value(self, name, number, entry, blob, leaves):
        """What a call returned, joined to the gradients of what it was given."""
        def grows(t, entry):
            return bool(leaves) and entry.get("grad") is True and t.is_floating_point()
        def unpack(tensor):
            def named(kind, inner):
                kind, *fields = wire.unpack(inner, blob, tensor, named)
                return getattr(importlib.import_module(RETURNED[kind]), kind)(*fields)
            return wire.unpack(entry, blob, tensor, named)
        outputs = []
        try:
            unpack(lambda t, e: grows(t, e) and outputs.append(t))
            joined = iter(Call.apply(self, name, number, outputs, *leaves) if outputs else ())
            return unpack(lambda t, e: next(joined) if grows(t, e) else t)
        except wire.Broken as error:
            raise Body(f"{name}: {error}") from None

    def backward(self, name, number, gradients):
        """The gradients of what a call was given."""
        if self.process is None:
            raise Body(f"{name}: its process ended")
        blobs = []
        packed = wire.pack(list(gradients), blobs)
        self.send(name, {"kind": "backward", "number": number, "gradients": packed}, blobs)
        message, blob = self.receive(name, time.monotonic() + self.seconds)
        words = "it sent no gradient"
        try:
            found = None if "error" in message else wire.unpack(message["value"], blob)
            if isinstance(found, list):
                return found
            words = " ".join(str(message["words"])[:200].split())
        except (wire.Broken, KeyError, TypeError):
            pass
        raise Body(f"{name}: its gradient could not be computed: {words}")


def numbers_of(module):
    """A module's config, its parameters and buffers, and its plain attributes."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)),
               **dict(module.named_buffers())}
    plain = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str)}
    config = module.config
    return [type(config).__name__, dataclasses.asdict(config)], tensors, plain


def written_to(name, args, kwargs):
    """The tensors that a body may write to."""
    if name not in WRITES:
        return []
    holder, last = place(name)
    given = inspect.signature(getattr(holder, last)).bind(*args, **kwargs).arguments
    found = given.get(WRITES[name])
    return [found] if isinstance(found, torch.Tensor) else list(found or ())


class Call(torch.autograd.Function):
    """The node that stands for a call in the graph of the tests."""

    @staticmethod
    def forward(ctx, peer, name, number, outputs, *leaves):
        ctx.asked = peer, name, number
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        peer, name, number = ctx.asked
        return None, None, None, None, *peer.backward(name, number, gradients)


# -- the tests ------------------------------------------------------------------------------------


def place(name):
    """`sft.token_logprobs` -> what holds it, and its name there."""
    file, *path, last = name.split(".")
    holder = importlib.import_module(file)
    for part in path:
        holder = getattr(holder, part)
    return holder, last


def install(functions):
    """Put functions in the place of the project's own: {dotted name: function}. This comes before
    the tests are imported, for they import them by name."""
    for name, function in functions.items():
        holder, last = place(name)
        setattr(holder, last, functools.wraps(getattr(holder, last))(function))


def judge(number, folder, salt="", seconds=20):
    """{test: None or why it fails} of one folder."""
    assignment = table.assignment(number)
    os.environ["ASSIGNMENT_SALT"] = salt
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / assignment.files_in)]
    with tempfile.TemporaryDirectory() as copy:
        wrong = prepare(assignment, folder, pathlib.Path(copy))
        peer = Peer(copy, assignment.bodies, wrong, seconds)
        install({name: lambda *args, _name=name, **kwargs: peer.call(_name, args, kwargs)
                 for name in assignment.bodies})
        try:
            return check.run([ROOT / test for test in assignment.tests()])
        finally:
            peer.stop()


def main():
    asked = json.load(sys.stdin)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)   # PR_SET_DUMPABLE: nobody reads this memory
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    found = judge(**asked)
    os.write(out, json.dumps(found).encode())


if __name__ == "__main__":
    main()
