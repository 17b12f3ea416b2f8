"""
Where students' tests are run. It imports what takes long, then makes a process for each test, which
gets files and a test, locks itself in, and gives a verdict as its exit code. It is told nothing
else: not which files these are, whose, or what is expected of them.

    python bench.py FD

FD is the socket to the judge (bugs.py). A request is {"files", "test", "seed", "seconds"}, or with
"killer" in place of "test" one of the project's own tests, over files of which a student has
changed some lines.
"""

import os
import select
import signal
import socket
import sys
import tempfile
import time

import trial   # its neighbours: this file is run as a script
import wire
import worker

PASSED, FAILED = 80, 81   # exit codes that nothing else uses
WORDS = 200               # bytes that are kept of why a test failed


def student_test(message):
    worker.lock()
    trial.load(message["files"])
    return trial.verdict(message["test"], message["seed"])


def own_test(message):
    """A withheld test, from the project's folder, which may be read; one folder may be written."""
    import pytest
    root, folder = message["root"], message["folder"]
    worker.lock([root, "/dev"], folder)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.chdir(folder)
    sys.path[:0] = [root, f"{root}/tests"]
    trial.load(message["files"])
    code = pytest.main(["-qx", "-p", "no:cacheprovider", "-p", "no:logging", "-p",
                        "no:unraisableexception", "--rootdir", root, "--basetemp", f"{folder}/tmp",
                        f"{root}/tests/{message['killer']}"])
    return "passed" if code == 0 else "failed", ""


def child(message, pipe, *others):
    """The process of one test: everything that it opens, prints and starts ends with it."""
    os.setsid()
    for number in others:
        os.close(number)
    out = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(out, number)
    code = 1
    try:
        verdict, why = (own_test if "killer" in message else student_test)(message)
        os.write(pipe, why.encode()[:WORDS])
        code = PASSED if verdict == "passed" else FAILED
    finally:
        os._exit(code)


def run(message, connection):
    """-> {"verdict": "passed", "failed" or "neither", "why": a line}"""
    read, write = os.pipe()
    process, end = os.fork(), time.monotonic() + message["seconds"]
    if process == 0:
        child(message, write, read, connection.fileno())
    os.close(write)
    status = None
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(process, os.WNOHANG)
        status = code if found else time.sleep(0.005)
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(process, 0)
        os.close(read)
        return {"verdict": "neither", "why": f"it took longer than {message['seconds']:g} seconds"}
    words = os.read(read, WORDS) if select.select([read], [], [], 0)[0] else b""
    os.close(read)
    verdict = {PASSED: "passed", FAILED: "failed"}.get(os.waitstatus_to_exitcode(status), "neither")
    why = " ".join(words.decode(errors="replace").split())
    return {"verdict": verdict, "why": why or ("its process ended" if verdict == "neither" else "")}


def main(fd):
    import pytest
    import torch
    for name in worker.LOADED + ("tiktoken", "tqdm"):
        __import__(name)
    assert pytest and torch
    torch.set_num_threads(1)
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(
        os.path.abspath(__file__))]
    connection = socket.socket(fileno=int(fd))
    wire.send(connection, {"kind": "ready"})
    try:
        while True:
            wire.send(connection, run(wire.receive(connection)[0], connection))
    except wire.Broken:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
