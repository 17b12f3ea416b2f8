"""
The student's code, in a process of its own. It is given the arguments of a call and answers with
values; it has no test, no reference and no way to say that something holds.

    python worker.py FOLDER FD BODY [BODY ...]

FOLDER holds a student's copy whose named bodies are the student's; FD is the socket to the judge
(judge.py). Everything is imported first; then the process gives up what it can: files, network,
processes, memory, and as root its rights.
"""

import ctypes
import importlib
import os
import resource
import socket
import struct
import sys

import torch
import wire   # its neighbour: this file is run as a script

MEMORY, CPU_SECONDS, NOBODY = 2 << 30, 120, 65534
WRITTEN = 16 << 20   # bytes of a file, where one may be written
# What a body is likely to import, loaded before the disk is closed.
LOADED = ("bisect", "collections", "copy", "dataclasses", "functools", "itertools", "math", "numpy",
          "operator", "random", "statistics", "torch.nn.functional", "typing", "warnings")


# -- what it may not do ---------------------------------------------------------------------------


def lock(readable=(), writable=None):
    """No more memory than now and 2 GB, no file grows, no process is started, none is signalled,
    the disk is closed but for Python's own folders, and so is TCP. What a system does not offer is
    left out: the limits are POSIX, the rest is Linux (Landlock, from 5.13 on). readable: folders
    that may be read besides. writable: one in which files may be written, as the present user."""
    def limit(what, value):
        resource.setrlimit(what, (value, value))
    if sys.platform == "linux":
        pages = int(open("/proc/self/statm").read().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
        landlock(ctypes.CDLL(None, use_errno=True), readable, writable)
    limit(resource.RLIMIT_CPU, CPU_SECONDS)
    limit(resource.RLIMIT_FSIZE, WRITTEN if writable else 0)
    limit(resource.RLIMIT_CORE, 0)
    if os.getuid() == 0 and not writable:   # which no limit on processes binds
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    limit(resource.RLIMIT_NPROC, 0)


def landlock(libc, readable=(), writable=None):
    """The kernel's sandbox without privileges: https://docs.kernel.org/userspace-api/landlock.html.
    Files may be read below Python's folders alone; what is not allowed by a rule is denied."""
    create, add, restrict = 444, 445, 446   # the same numbers on every architecture
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return
    execute, read_file, read_folder = 1, 4, 8
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    tcp, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)   # scopes: signals
    attributes = struct.pack("<QQQ", rights, tcp, scopes)[:8 if version < 4 else
                                                          16 if version < 6 else 24]
    rules = libc.syscall(create, attributes, len(attributes), 0)
    folders = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(torch.__file__))}
    allowed = dict.fromkeys([*folders, *readable], execute | read_file | read_folder)
    for path, what in {**allowed, **({writable: rights} if writable else {})}.items():
        folder = os.open(path, os.O_PATH)
        rule = struct.pack("<Qi", what, folder)
        libc.syscall(add, rules, 1, rule, 0)
        os.close(folder)
    libc.prctl(38, 1, 0, 0, 0)   # PR_SET_NO_NEW_PRIVS
    if libc.syscall(restrict, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(rules)


# -- calls ----------------------------------------------------------------------------------------


class Remote:
    """Something that the judge keeps: `model.completion_logits(...)` asks it."""

    def __init__(self, worker, number, call):
        self.__dict__.update(_worker=worker, _number=number, _call=call)

    def __getattr__(self, name):
        return self._worker.ask({"get": name, "of": self._number}, self._call)

    def __call__(self, *args, **kwargs):
        return self._worker.ask({"invoke": self._number}, self._call, [args, kwargs])


class Worker:

    def __init__(self, socket, functions):
        self.socket, self.functions, self.graphs, self.kept = socket, functions, {}, {}

    def say(self, message, blobs=()):
        wire.send(self.socket, message, blobs)

    def read(self, entry, blob, call):
        """A value of the judge's; tensors with a gradient become leaves of the call. What it may
        write to is kept, for the judge wants it back."""
        def tensor(value, entry):
            if "leaf" in entry:
                self.graphs[call][1].append(value.requires_grad_())
            if "written" in entry:
                self.kept[call][0].append(value)
            return value

        def other(kind, inner):
            if kind == "remote":
                return Remote(self, inner, call)
            inner = wire.unpack(inner, blob, tensor, other)
            if kind == "generator":
                generator = torch.Generator()
                generator.set_state(inner)
                self.kept[call][1].append(generator)
                return generator
            file, name, *rest = inner
            made = getattr(importlib.import_module(file), name)
            return made(*rest) if kind == "named" else module(made, *rest)
        return wire.unpack(entry, blob, tensor, other)

    def ask(self, message, call, arguments=((), {})):
        """Ask the judge in the middle of a call, which may answer with a call of its own."""
        blobs = []

        def handle(value):
            if isinstance(value, Remote):
                return {"remote": value._number}
            raise TypeError(f"a {type(value).__name__} cannot be passed on")
        packed = wire.pack([list(arguments[0]), dict(arguments[1])], blobs, other=handle)
        self.say({**message, "kind": "ask", "call": call, "arguments": packed}, blobs)
        reply, blob = self.serve(until="reply")
        if "error" in reply:
            raise AttributeError(reply["error"])
        return self.read(reply["value"], blob, call)

    def serve(self, until=None):
        while True:
            message, blob = wire.receive(self.socket)
            if message["kind"] == until:
                return message, blob
            try:
                result, blobs = getattr(self, message["kind"])(message, blob)
            except BaseException as error:
                result, blobs = {"error": type(error).__name__, "words": str(error)[:500]}, []
            self.say({"kind": "result", **result}, blobs)

    def call(self, message, blob):
        """Call a function; remember the graph from what it was given to what it returns."""
        number, blobs, outputs = message["number"], [], []
        double = message["double"]
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        torch.Tensor.float = torch.Tensor.double if double else FLOAT   # as the tests' fixture does
        self.graphs[number], self.kept[number] = (outputs, []), ([], [])
        args, kwargs = self.read(message["arguments"], blob, number)
        with torch.set_grad_enabled(message["grad"]):
            value = self.functions[message["name"]](*args, **kwargs)

        def tensor(t):
            if t.requires_grad:
                outputs.append(t)
            return {"grad": bool(t.requires_grad)}

        def other(value):
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                named = [type(value).__name__, *value]
                return {"named": wire.pack(named, blobs, tensor, other)}
            raise TypeError(f"it returned a value of type {type(value).__name__}"[:100])
        packed = wire.pack(value, blobs, tensor, other)
        written, generators = self.kept.pop(number)
        kept = wire.pack([written, [g.get_state() for g in generators]], blobs)
        if not outputs:
            del self.graphs[number]
        return {"value": packed, "kept": kept}, blobs

    def backward(self, message, blob):
        """The gradients of a call's leaves from those of what it returned."""
        outputs, leaves = self.graphs[message["number"]]
        gradients = wire.unpack(message["gradients"], blob)
        found = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True,
                                    allow_unused=True)
        blobs = []
        return {"value": wire.pack(list(found), blobs)}, blobs


def module(kind, config, tensors, plain):
    """A module of the student's copy, with the judge's numbers in the place of its parameters: they
    are leaves of the call, as parameters would be."""
    made = kind(getattr(importlib.import_module(kind.__module__), config[0])(**config[1]))
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = made.get_submodule(path)
        delattr(owner, last)
        setattr(owner, last, tensor)
    for name, value in plain.items():
        setattr(made, name, value)
    return made


FLOAT = torch.Tensor.float


def main(folder, fd, *names):
    sys.path[0] = folder
    os.chdir(folder)
    torch.set_num_threads(1)
    functions = {}
    for name in names:   # `sft.token_logprobs`
        file, *path = name.split(".")
        found = __import__(file)
        for part in path:
            found = getattr(found, part)
        functions[name] = found
    for name in LOADED:
        __import__(name)
    x = torch.ones(1, requires_grad=True)
    y = (2 * x.exp()).log_softmax(-1)   # what autograd imports and starts, before it is too late
    torch.autograd.grad([y], [x], [torch.ones(1)], retain_graph=True, allow_unused=True)
    connection = socket.socket(fileno=int(fd))
    lock()
    worker = Worker(connection, functions)
    worker.say({"kind": "ready"})
    try:
        worker.serve()
    except wire.Broken:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
