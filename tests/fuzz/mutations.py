"""Small damages to bytes and to pickles."""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from random import Random

_NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 1000, 32767, 65535, 65536, 10**6, 2**24, 2**31 - 1,
            2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip


def number(rng: Random) -> int:
    """One of those at which programs go wrong."""
    return rng.choice(_NUMBERS)


def damaged(content: bytes, rng: Random) -> bytes:
    """One to four damages one after the other."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(_DAMAGES)(content, rng)
    return content


def _flip(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(changed), rng.choice((1, 1, 2, 8)))):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[_place(content, rng)] = rng.randrange(256)
    return bytes(changed)


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _drop(content: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 4, 16, 100)) :]


def _splice(content: bytes, rng: Random) -> bytes:
    start, to = (rng.randrange(len(content) + 1) for _ in range(2))
    return content[:to] + content[start : start + rng.choice((1, 4, 30, 300))] + content[to:]


def _insert(content: bytes, rng: Random) -> bytes:
    to = rng.randrange(len(content) + 1)
    return content[:to] + rng.randbytes(rng.choice((1, 4, 50))) + content[to:]


def _length(content: bytes, rng: Random) -> bytes:
    """A number over what may be a length or an offset."""
    form = rng.choice("<>") + rng.choice("BHIQ")
    value = number(rng) % 256 ** struct.calcsize(form)
    start = _place(content, rng) if content else 0
    packed = struct.pack(form, value)
    return content[:start] + packed + content[start + len(packed) :]


def _append(content: bytes, rng: Random) -> bytes:
    return content + (content if rng.random() < 0.5 else rng.randbytes(20))


def _place(content: bytes, rng: Random) -> int:
    """Anywhere, with a liking for heads and tails, where the lengths are."""
    near = min(len(content), 100)
    return rng.choice(
        (rng.randrange(len(content)), rng.randrange(near), len(content) - 1 - rng.randrange(near))
    )


_DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip, _replace, _cut, _drop, _splice, _insert, _length, _append,
)  # fmt: skip


def damaged_pickle(content: bytes, rng: Random, canary: str) -> bytes:
    """Some operations dropped, doubled, moved or replaced by hostile ones; the rest is a pickle."""
    try:
        starts = [position for _, _, position in pickletools.genops(io.BytesIO(content))]
    except Exception:
        return content
    ends = [*starts[1:], len(content)]
    operations = [content[a:b] for a, b in zip(starts, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(operations))
        match rng.randrange(5):
            case 0 if len(operations) > 1:
                del operations[at]
            case 1:
                operations.insert(at, rng.choice(operations))
            case 2:
                other = rng.randrange(len(operations))
                operations[at], operations[other] = operations[other], operations[at]
            case 3:
                operations[at] = hostile_operations(rng, canary)
            case _:
                operations.insert(at, hostile_operations(rng, canary))
    return b"".join(operations)


def random_pickle(rng: Random, canary: str) -> bytes:
    """A program of hostile operations."""
    program = [hostile_operations(rng, canary) for _ in range(rng.randrange(1, 30))]
    return b"\x80" + bytes([rng.choice((2, 2, 3, 4, 5))]) + b"".join(program) + b"."


def hostile_operations(rng: Random, canary: str) -> bytes:
    """Operations that run code, take memory, or upset the machine that reads pickles."""
    value = number(rng)
    text = f"touch {canary}".encode()
    name = rng.choice(_NAMES)
    called = b"c" + name.replace(b" ", b"\n") + b"\n"
    return rng.choice(
        (
            called,
            called + b"(X" + struct.pack("<I", len(text)) + text + b"tR",
            called + b")R",
            called + b")\x81",
            called + b"}b",
            called + b"N}X\x01\0\0\0aK\x01s\x86b",  # attributes by way of the state's second half
            called + b"(K" + bytes([value % 256]) + b"tR",
            called + b"J" + struct.pack("<i", value % 2**31) + b"\x85R",
            called + b"(J" + struct.pack("<i", value % 2**31) + b"J\0\0\0\x01ttR",
            b"r" + struct.pack("<I", value % 2**32),
            b"q" + bytes([value % 256]),
            b"j" + struct.pack("<I", value % 2**32),
            b"h" + bytes([value % 256]),
            b"\x8e" + struct.pack("<Q", value % 2**64),
            b"\x8d" + struct.pack("<Q", value % 2**64),
            b"\x95" + struct.pack("<Q", value % 2**64),
            b"\x8b" + struct.pack("<I", value % 2**31),
            b"X" + struct.pack("<I", value % 2**32),
            b"T" + struct.pack("<i", value % 2**31),
            b"J" + struct.pack("<i", value % 2**31),
            b"\x8a\x09" + rng.randbytes(9),
            b"(" + b"N" * 20 + b"t",
            b"]" * rng.choice((1, 200)) + b"a" * rng.choice((0, 1, 199)),
            b"]q\x00(" + b"h\x00" * 10 + b"e",  # a list that holds itself
            b"".join(b"]q%c(" % i + b"h%c" % (i - 1) * 10 + b"e" for i in range(1, 12)),
            bytes(
                [rng.choice(b"(0123NPQRbdeilopstu)]}\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x93\x94")]
            ),
            rng.randbytes(rng.randrange(1, 6)),
        )
    )


_NAMES = (
    b"os system", b"posix system", b"nt system", b"subprocess Popen", b"builtins eval",
    b"builtins exec", b"builtins getattr", b"builtins bytearray", b"builtins set",
    b"__builtin__ set",
    b"builtins open", b"__main__ Violation", b"runpy run_path", b"pickle loads",
    b"copyreg __newobj__",
    b"_codecs encode", b"codecs decode", b"collections OrderedDict", b"collections Counter",
    b"collections namedtuple", b"numpy dtype", b"numpy ndarray",
    b"numpy.core.multiarray _reconstruct", b"numpy.core.multiarray scalar",
    b"numpy._core.multiarray _reconstruct", b"numpy load",
    b"torch load", b"torch FloatStorage", b"torch LongStorage", b"torch ByteStorage", b"torch Size",
    b"torch Tensor", b"torch device", b"torch float32", b"torch.storage UntypedStorage",
    b"torch.storage TypedStorage", b"torch FloatTensor", b"torch._utils _rebuild_tensor_v2",
    b"torch._utils _rebuild_tensor", b"torch._utils _rebuild_parameter",
    b"torch._utils _rebuild_sparse_tensor", b"torch._utils _rebuild_wrapper_subclass",
    b"torch._utils _rebuild_meta_tensor_no_storage", b"torch._tensor _rebuild_from_type_v2",
    b"torch.nn.parameter Parameter", b"torch.nn.modules.linear Linear", b"torch.hub load",
)  # fmt: skip
