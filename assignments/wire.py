"""
What judge and worker say to each other: JSON and the bytes of tensors, over a socket. Nothing is
unpickled, so that what the student's process sends can be wrong, but it can run nothing.

A message is two lengths (8 bytes each), a JSON text and the tensors' bytes. Values are None, bool,
int, float, str, torch.dtype, torch.device, tensors, and lists, tuples and dicts of them. Random
generators, named tuples and some modules are sent as what they are made of; whatever else the judge
has (an algorithm, a tokenizer) as a number under which it can be asked for.
"""

import json
import math
import struct
import time

import numpy as np
import torch

LARGEST = 16 << 20   # bytes of a message
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}


class Broken(Exception):
    """The other side is gone, says too much, or says nothing in time."""


def send(socket, message, blobs=(), seconds=None):
    text = json.dumps(message).encode()
    socket.settimeout(seconds)
    try:
        socket.sendall(struct.pack("<QQ", len(text), sum(map(len, blobs))) + text + b"".join(blobs))
    except OSError as error:
        raise Broken(str(error)) from None


def receive(socket, seconds=None):
    """-> message, bytes of its tensors"""
    end = None if seconds is None else time.monotonic() + seconds
    lengths = struct.unpack("<QQ", exactly(socket, 16, end))
    if max(lengths) > LARGEST:
        raise Broken("it returned more than 16 MB")
    text, blob = exactly(socket, lengths[0], end), exactly(socket, lengths[1], end)
    try:
        return json.loads(text), blob
    except (ValueError, RecursionError):
        raise Broken("it sent what is no message") from None


def exactly(socket, length, end):
    parts = bytearray()
    while len(parts) < length:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        socket.settimeout(left)
        try:
            part = socket.recv(min(length - len(parts), 1 << 20))
        except TimeoutError:
            raise
        except OSError as error:
            raise Broken(str(error)) from None
        if not part:
            raise Broken("its process ended")
        parts += part
    return bytes(parts)


def pack(value, blobs, tensor=None, other=None):
    """A value as JSON; the bytes of its tensors are appended to blobs. tensor(t): what to add to a
    tensor's entry; other(value): how to send anything else, which by default is refused."""
    def again(x):
        return pack(x, blobs, tensor, other)
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list or kind is tuple:
        return {kind.__name__: [again(x) for x in value]}
    if kind is dict:
        return {"dict": [[again(k), again(v)] for k, v in value.items()]}
    if kind is torch.dtype or kind is torch.device:
        return {kind.__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous().numpy()
        entry = {"tensor": str(array.dtype), "shape": list(value.shape),
                 "at": sum(map(len, blobs)), **(tensor(value) if tensor else {})}
        blobs.append(array.tobytes())
        return entry
    if other is None:
        raise TypeError(f"it returned a value of type {kind.__name__}"[:100])
    return other(value)


def unpack(entry, blob, tensor=None, other=None):
    """The value of a JSON entry. tensor(t, entry): what to do with each tensor. Raises Broken for
    what is no value."""
    def again(x):
        return unpack(x, blob, tensor, other)
    try:
        if entry is None or isinstance(entry, (bool, int, float, str)):
            return entry
        [kind, *_] = entry
        inner = entry[kind]
        if kind == "list":
            return [again(x) for x in inner]
        if kind == "tuple":
            return tuple(again(x) for x in inner)
        if kind == "dict":
            return {again(k): again(v) for k, v in inner}
        if kind == "dtype":
            return DTYPES[inner]
        if kind == "device":
            return torch.device("cpu")
        if kind == "tensor":
            dtype, shape, at = np.dtype(inner), entry["shape"], entry["at"]
            if str(dtype) not in DTYPES or min(shape, default=0) < 0:
                raise ValueError
            size = math.prod(shape) * dtype.itemsize
            array = np.frombuffer(blob[at:at + size], dtype).reshape(shape).copy()
            value = torch.from_numpy(array)
            return tensor(value, entry) if tensor else value
        return other(kind, inner)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError,
            AttributeError):
        raise Broken("it sent what is no value") from None
