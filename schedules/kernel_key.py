"""Keys of kernels: the same for kernels that cost the same, in any model and any process."""

import hashlib
import re

import tvm
from tvm import tirx
from tvm.target import Target

# Raised when a change of the schedules, of how they are compiled, or of what is counted of them, makes old
# measurements worthless: part of every kernel's key.
SCHEDULES_VERSION = 5

_STORE = re.compile(r"^\s*\w+\[.*\] = ")
# Scales, zero points, clipping bounds and rounding terms: constants of a value, no extents and no strides.
_CONSTANT = re.compile(
    r"T\.(float|int|uint)(8|16|32)\([^()]*\)|T\.int64\(\d{4,}\)|(?<![\w.\"(])-?\d+\b(?![\w.\"])"
)
_BLOCK_NAME = re.compile(r'T\.sblock\("[^"]*"\)')
# Names, but neither attributes nor what stands in quotes.
_NAME = re.compile(r'"[^"]*"|(?<![\w.])[A-Za-z_]\w*')


def target_digest(target: Target) -> str:
    """Short hash of a target: part of the keys of all its kernels."""
    return hashlib.sha256(str(target).encode()).hexdigest()[:12]


def kernel_key(func: tirx.PrimFunc, target: Target) -> str:
    """Key of a scheduled kernel: its code without names and constants, its target, and the versions.

    The constants that quantization writes into a kernel differ with every calibration, its time does not.
    """
    return hashlib.sha256(normalized_code(func).encode()).hexdigest()[:16] + key_ending(target)


def key_ending(target: Target) -> str:
    """Part that the keys of all kernels for a target share: it, and the versions."""
    return f"-{target_digest(target)}-{tvm.__version__}-{SCHEDULES_VERSION}"


def normalized_code(func: tirx.PrimFunc) -> str:
    """TVMScript of a kernel with names numbered in their order, and without constants in what is stored."""
    names: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        text = match.group()
        return text if text.startswith('"') else names.setdefault(text, f"n{len(names)}")

    lines = _BLOCK_NAME.sub("T.sblock()", func.script()).splitlines()
    lines = [_CONSTANT.sub("#", line) if _STORE.match(line) else line for line in lines]
    return _NAME.sub(number, "\n".join(lines))
