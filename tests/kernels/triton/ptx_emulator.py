"""Run the PTX of a compiled kernel on numpy: what Triton's interpreter is for its own language, for Gluon's kernels.

A block's threads go through the program in lock step, each register a vector of all threads; so a branch has to be
taken by all or by none, and barriers, fences and waits for copies have nothing to do. What is known is what Triton
writes for the kernels that are tried so: an instruction beyond that is an error, as is a load that is not aligned.
Instructions mean what the PTX ISA says; products of the matrix units are summed in float64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
SHARED_BASE = 1024  # where `global_smem` begins; Hopper keeps the first KiB for itself
_IGNORED = ("bar", "griddepcontrol", "createpolicy", "fence", "membar")
_NUMBER = re.compile(r"-?(0x[0-9A-Fa-f]+|\d+)U?")


class Instruction(NamedTuple):
    """`@guard opcode operands`; the guard's first part says whether it is turned around."""

    guard: tuple[bool, str] | None
    opcode: list[str]
    operands: list[str]
    text: str


class Memory:
    """The device's memory, in which tensors are put and found again by address."""

    def __init__(self) -> None:
        self.data = np.zeros(1 << 16, np.uint8)
        self.taken = np.zeros(1 << 16, np.bool_)  # which bytes belong to what was put here
        self._top = 4096

    def put(self, values: npt.NDArray[Any]) -> int:
        """The address of a copy of `values`; a multiple of 256, with room behind it."""
        raw = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        address = -(-self._top // 256) * 256
        self._top = address + len(raw) + 256
        if self._top > len(self.data):
            more = 2 * self._top - len(self.data)
            self.data = np.concatenate([self.data, np.zeros(more, np.uint8)])
            self.taken = np.concatenate([self.taken, np.zeros(more, np.bool_)])
        self.taken[address : address + len(raw)] = True
        self.data[address : address + len(raw)] = raw
        return address

    def get(self, address: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What lies at `address` now, of the type and shape of `like`."""
        raw = self.data[address : address + like.nbytes].tobytes()
        return np.frombuffer(raw, like.dtype).reshape(like.shape).copy()


def run_ptx(
    ptx: str, warps: int, shared: int, grid: tuple[int, int], arguments: Sequence[int | float], memory: Memory
) -> None:
    """Launch the one kernel of `ptx`, block after block, with `arguments` in the order of its parameters.

    Args:
        shared: bytes of shared memory that a block has.
    """
    names, instructions, labels = _parse(ptx)
    values = list(arguments) + [0] * (len(names) - len(arguments))  # Triton's own scratch
    for y in range(grid[1]):
        for x in range(grid[0]):
            parameters = dict(zip(names, values, strict=True))
            _Block(warps, shared, (x, y), grid, parameters, memory).run(instructions, labels)


def _parse(ptx: str) -> tuple[list[str], list[Instruction], dict[str, int]]:
    entry = ptx[ptx.index(".entry") :]
    head, body = entry.split("{", 1)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    rest = ""
    for line in body.split("\n"):
        code = line.split("//")[0].strip()
        if code.startswith(".section"):
            break
        if re.fullmatch(r"\$\w+:", code):
            labels[code[:-1]] = len(instructions)
        elif code and not code.startswith((".loc", ".reg", ".pragma")):
            rest += " " + code
        while ";" in rest:
            statement, rest = rest.split(";", 1)
            # Blocks around inline assembly; braces of vectors lie behind the opcode.
            statement = re.sub(r"^[\s{}]+", "", statement)
            if statement and not statement.startswith("."):
                instructions.append(_decoded(statement))
    return re.findall(r"(\w+_param_\d+)", head), instructions, labels


def _decoded(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", text.strip(), re.DOTALL)
    if found is None:
        raise ValueError(f"not understood: {text}")
    guard = None if found[2] is None else (found[1] == "!", found[2])
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    return Instruction(guard, found[3].replace("::", ":").split("."), [part.strip() for part in operands], text)


def _floats(words: Words, kind: str) -> npt.NDArray[Any]:
    """The numbers that the lowest bits of `words` are."""
    if kind == "f32":
        return words.astype(np.uint32).view(np.float32)
    if kind == "f16":
        return words.astype(np.uint16).view(np.float16)
    return (words.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _bits(numbers: npt.NDArray[Any], kind: str) -> Words:
    """`numbers` rounded to `kind`, as bits."""
    if kind == "f32":
        return numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16).astype(np.uint64)
    wide = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16 & 0xFFFF


def _low(words: Words, bits: int) -> Words:
    return words if bits >= 64 else words & ((1 << bits) - 1)


def _signed(words: Words, bits: int) -> npt.NDArray[np.int64]:
    if bits >= 64:
        return words.view(np.int64)
    return (_low(words, bits).astype(np.int64) ^ (1 << (bits - 1))) - (1 << (bits - 1))


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _width(kind: str) -> int:
    """Bits of a type, 1 of predicates."""
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int(re.sub(r"\D+", "", kind))


_FLOATING: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "max": np.fmax,
    "min": np.fmin,
}
_INTEGER: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: 0 - a,
    "max": np.maximum,
    "min": np.minimum,
}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class _Block:
    """One block: its threads' registers, and its shared memory."""

    def __init__(
        self,
        warps: int,
        shared: int,
        place: tuple[int, int],
        grid: tuple[int, int],
        parameters: dict[str, Any],
        memory: Memory,
    ) -> None:
        self.threads = 32 * warps
        thread = np.arange(self.threads, dtype=np.uint64)
        self.registers: dict[str, Any] = {"%tid.x": thread, "%laneid": thread % 32}
        self.registers["global_smem"] = self._constant(SHARED_BASE)
        for axis, at, count in zip("xy", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"], self.registers[f"%nctaid.{axis}"] = map(self._constant, (at, count))
        for name, value in parameters.items():
            bits = int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value
            self.registers[name] = self._constant(bits)
        self.memory, self.taken = memory.data, memory.taken
        self.shared = np.zeros(SHARED_BASE + shared, np.uint8)
        self.shared_taken = np.arange(SHARED_BASE + shared) >= SHARED_BASE

    def run(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        at = 0
        while at < len(instructions):
            instruction = instructions[at]
            at += 1
            active = self._active(instruction)
            name = instruction.opcode[0]
            if name in ("bra", "ret"):
                if active.any() and not active.all():
                    raise ValueError(f"threads part at: {instruction.text}")
                if active.all():
                    at = len(instructions) if name == "ret" else labels[instruction.operands[0]]
            elif name not in _IGNORED:
                with np.errstate(all="ignore"):
                    self._step(instruction, active)

    def _constant(self, value: int) -> Words:
        return np.full(self.threads, value & (2**64 - 1), np.uint64)

    def _active(self, instruction: Instruction) -> npt.NDArray[np.bool_]:
        if instruction.guard is None:
            return np.ones(self.threads, np.bool_)
        turned, name = instruction.guard
        return (self.registers[name] != 0) ^ turned

    def _value(self, operand: str) -> Any:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return self._constant(int(operand[2:], 16))
        if _NUMBER.fullmatch(operand):
            return self._constant(int(operand.rstrip("U"), 0))
        if operand.startswith("%"):  # never written: of a value that nobody wants
            return self._constant(0)
        raise ValueError(f"no operand: {operand}")

    def _put(self, name: str, value: Any, active: Any) -> None:
        if name != "_":
            self.registers[name] = np.where(active, np.asarray(value, np.uint64), self.registers.get(name, 0))

    def _address(self, operand: str) -> npt.NDArray[np.int64]:
        name, _, offset = operand.strip("[] ").partition("+")
        return self._value(name.strip()).astype(np.int64) + int(offset or 0)

    def _step(self, instruction: Instruction, active: Any) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        kind = opcode[-1]
        if opcode[0] in _FLOATING and "f" in kind:
            self._put(operands[0], self._floating(opcode[0], kind, operands[1:]), active)
        elif hasattr(self, f"_{opcode[0]}"):
            getattr(self, f"_{opcode[0]}")(opcode, operands, active)
        elif opcode[0] in _INTEGER:
            values = [self._integer(operand, kind) for operand in operands[1:]]
            result = _INTEGER[opcode[0]](*values).astype(np.int64).view(np.uint64)
            self._put(operands[0], _low(result, _width(kind)), active)
        else:
            raise ValueError(f"no instruction: {instruction.text}")

    def _floating(self, name: str, kind: str, operands: list[str]) -> Words:
        values = [self._value(operand) for operand in operands]
        if not kind.endswith("x2"):
            return _bits(_FLOATING[name](*(_floats(value, kind) for value in values)), kind)
        lower, upper = (
            _bits(_FLOATING[name](*(_floats(value >> 16 * half, kind[:-2]) for value in values)), kind[:-2])
            for half in range(2)
        )
        return lower | upper << 16

    def _integer(self, operand: str, kind: str) -> Any:
        value, bits = self._value(operand), _width(kind)
        return _signed(value, bits) if kind[0] == "s" else _low(value, bits)

    def _mov(self, opcode: list[str], operands: list[str], active: Any) -> None:
        bits = _width(opcode[-1])
        target, source = operands
        if target.startswith("{"):
            names, value = _vector(target), self._value(source)
            for place, name in enumerate(names):
                part = bits // len(names)
                self._put(name, _low(value >> (place * part), part), active)
            return
        if source.startswith("{"):
            parts = _vector(source)
            part = bits // len(parts)
            value = self._constant(0)
            for place, name in enumerate(parts):
                value = value | _low(self._value(name), part) << (place * part)
        else:
            value = _low(self._value(source), bits)
        self._put(target, value, active)

    def _memory_of(self, opcode: list[str]) -> npt.NDArray[np.uint8]:
        return self.shared if opcode[1] == "shared" else self.memory

    def _places(self, operand: str, active: Any, size: int, taken: Any) -> npt.NDArray[np.int64]:
        """Addresses of `size` bytes each, 0 where a thread is not active; they have to be memory of somebody's."""
        address = self._address(operand)
        wanted = address[active]
        if (wanted % size).any():
            raise ValueError(f"not a multiple of {size}: {operand}")
        if (
            (wanted < 0).any()
            or (wanted + size > len(taken)).any()
            or not taken[wanted[:, None] + np.arange(size)].all()
        ):
            raise ValueError(f"nobody's memory: {operand}")
        return np.where(active, address, 0)

    def _taken(self, opcode: list[str]) -> Any:
        return self.shared_taken if opcode[1] == "shared" else self.taken

    def _ld(self, opcode: list[str], operands: list[str], active: Any) -> None:
        if opcode[1] == "param":
            self._put(operands[0], self._value(operands[1].strip("[]")), active)
            return
        names, size = _vector(operands[0]), _width(opcode[-1]) // 8
        address = self._places(operands[1], active, size * len(names), self._taken(opcode))
        for place, name in enumerate(names):
            raw = self._memory_of(opcode)[address[:, None] + place * size + np.arange(size)].astype(np.uint64)
            self._put(name, (raw << (8 * np.arange(size)).astype(np.uint64)).sum(axis=1, dtype=np.uint64), active)

    def _st(self, opcode: list[str], operands: list[str], active: Any) -> None:
        names, size = _vector(operands[1]), _width(opcode[-1]) // 8
        address = self._places(operands[0], active, size * len(names), self._taken(opcode))[active]
        for place, name in enumerate(names):
            for byte in range(size):
                value = self._value(name)[active] >> (8 * byte)
                self._memory_of(opcode)[address + place * size + byte] = value.astype(np.uint8)

    def _atom(self, opcode: list[str], operands: list[str], active: Any) -> None:
        if "add" not in opcode or opcode[-1] not in ("u32", "s32"):
            raise ValueError(f"no instruction: {opcode}")
        place, value, before = self._address(operands[1]), self._value(operands[2]), self._constant(0)
        for thread in np.nonzero(active)[0]:
            word = self.memory[place[thread] : place[thread] + 4].view(np.uint32)
            before[thread] = word[0]
            word[0] = int(word[0]) + int(value[thread]) & (2**32 - 1)
        self._put(operands[0], before, active)

    def _cp(self, opcode: list[str], operands: list[str], active: Any) -> None:
        """Asynchronous copies, which have ended when they begin."""
        if opcode[2] not in ("ca", "cg"):
            return
        size = int(operands[2], 0)
        taken = self._value(operands[3]).astype(np.int64) if len(operands) > 3 else np.full(self.threads, size)
        target = self._places(operands[0], active, size, self.shared_taken)
        source = self._places(operands[1], active & (taken > 0), size, self.taken)
        for thread in np.nonzero(active)[0]:
            place, count = target[thread], taken[thread]
            self.shared[place : place + size] = 0
            self.shared[place : place + count] = self.memory[source[thread] : source[thread] + count]

    def _stmatrix(self, opcode: list[str], operands: list[str], active: Any) -> None:
        """Eight rows of a matrix of 16-bit values, whose addresses the first eight lanes have."""
        if "x1" not in opcode or "trans" in opcode:
            raise ValueError(f"no instruction: {opcode}")
        lane = np.arange(self.threads)
        place = self._address(operands[0])[lane // 32 * 32 + lane % 32 // 4] + lane % 4 * 4
        for byte in range(4):
            value = self._value(_vector(operands[1])[0]) >> (8 * byte)
            self.shared[place + byte] = value.astype(np.uint8)

    def _shfl(self, opcode: list[str], operands: list[str], active: Any) -> None:
        if opcode[2] != "bfly":
            raise ValueError(f"no instruction: {opcode}")
        self._put(operands[0], self._value(operands[1])[np.arange(self.threads) ^ int(operands[2])], active)

    def _mma(self, opcode: list[str], operands: list[str], active: Any) -> None:
        """A product of 16 x 16 and 16 x 8 values a warp, 16-bit floats, added to float32."""
        if opcode[3] != "m16n8k16":
            raise ValueError(f"no instruction: {opcode}")
        kind = opcode[-2]
        results, left, right, sums = map(_vector, operands)
        lane, warps = np.arange(32), self.threads // 32
        g, t = lane // 4, lane % 4

        def of_warps(name: str, kind: str, half: int = 0) -> Any:
            return _floats(self._value(name) >> (16 * half), kind).reshape(warps, 32)

        a, b = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        c = np.zeros((warps, 16, 8))
        for half in range(2):
            for place, name in enumerate(left):
                a[:, g + place % 2 * 8, 2 * t + place // 2 * 8 + half] = of_warps(name, kind, half)
            for place, name in enumerate(right):
                b[:, 2 * t + place * 8 + half, g] = of_warps(name, kind, half)
        for place, name in enumerate(sums):
            c[:, g + place // 2 * 8, 2 * t + place % 2] = of_warps(name, "f32")
        c += a @ b
        for place, name in enumerate(results):
            value = c[:, g + place // 2 * 8, 2 * t + place % 2].reshape(-1)
            self._put(name, _bits(np.ascontiguousarray(value), "f32"), active)

    def _setp(self, opcode: list[str], operands: list[str], active: Any) -> None:
        kind = opcode[-1]
        first, second = (
            _floats(self._value(operand), kind) if "f" in kind else self._integer(operand, kind)
            for operand in operands[1:3]
        )
        self._put(operands[0], _COMPARISONS[opcode[1]](first, second), active)

    def _selp(self, opcode: list[str], operands: list[str], active: Any) -> None:
        first, second, which = (self._value(operand) for operand in operands[1:])
        self._put(operands[0], np.where(which != 0, first, second), active)

    def _cvt(self, opcode: list[str], operands: list[str], active: Any) -> None:
        target, source = opcode[-2], opcode[-1]
        if target.endswith("x2"):  # the first one is the upper half
            upper, lower = (_bits(_floats(self._value(operand), source), target[:-2]) for operand in operands[1:])
            self._put(operands[0], upper << 16 | lower, active)
            return
        value = _floats(self._value(operands[1]), source) if "f" in source else self._integer(operands[1], source)
        if "f" in target:
            self._put(operands[0], _bits(value, target), active)
        else:
            self._put(operands[0], _low(value.astype(np.int64).view(np.uint64), _width(target)), active)

    def _lop3(self, opcode: list[str], operands: list[str], active: Any) -> None:
        table = int(operands[4], 0)
        result = self._constant(0)
        for row in range(8):
            if table >> row & 1:
                both = self._constant(-1)
                for place, name in zip((2, 1, 0), operands[1:4], strict=True):
                    both = both & (self._value(name) if row >> place & 1 else ~self._value(name))
                result = result | both
        self._put(operands[0], _low(result, 32), active)

    def _prmt(self, opcode: list[str], operands: list[str], active: Any) -> None:
        selected = int(operands[3].rstrip("U"), 0)
        both = _low(self._value(operands[1]), 32) | self._value(operands[2]) << 32
        result = self._constant(0)
        for place in range(4):
            which = selected >> 4 * place & 15
            byte = _low(both >> 8 * (which & 7), 8)
            if which > 7:  # eight times its sign
                byte = (byte >> 7) * 255
            result = result | byte << 8 * place
        self._put(operands[0], result, active)

    def _bfe(self, opcode: list[str], operands: list[str], active: Any) -> None:
        bits, count = _width(opcode[-1]), int(operands[3], 0)
        value = _low(_low(self._value(operands[1]), bits) >> self._value(operands[2]), count)
        self._put(
            operands[0], _low(_signed(value, count).view(np.uint64), bits) if opcode[1][0] == "s" else value, active
        )

    def _shl(self, opcode: list[str], operands: list[str], active: Any) -> None:
        bits = _width(opcode[-1])
        value, count = _low(self._value(operands[1]), bits), _low(self._value(operands[2]), 32)
        self._put(operands[0], np.where(count < bits, _low(value << np.minimum(count, 63), bits), 0), active)

    def _shr(self, opcode: list[str], operands: list[str], active: Any) -> None:
        bits = _width(opcode[-1])
        count = np.minimum(_low(self._value(operands[2]), 32), 63)
        if opcode[-1][0] == "s":
            value = (_signed(self._value(operands[1]), bits) >> count.astype(np.int64)).view(np.uint64)
        else:
            value = _low(self._value(operands[1]), bits) >> count
        self._put(operands[0], _low(value, bits), active)

    def _mul(self, opcode: list[str], operands: list[str], active: Any) -> None:
        self._product(opcode, operands, active, None)

    def _mad(self, opcode: list[str], operands: list[str], active: Any) -> None:
        self._product(opcode, operands, active, self._value(operands[3]))

    def _product(self, opcode: list[str], operands: list[str], active: Any, addend: Any) -> None:
        bits = _width(opcode[-1])
        first, second = (self._integer(operand, opcode[-1]) for operand in operands[1:3])
        if opcode[1] == "hi":
            exact = [int(x) * int(y) >> bits for x, y in zip(first, second, strict=True)]
            result = np.array([value & (2**64 - 1) for value in exact], np.uint64)
        else:
            result = (first * second).astype(np.int64).view(np.uint64)
        if addend is not None:
            result = result + addend
        self._put(operands[0], _low(result, 2 * bits if opcode[1] == "wide" else bits), active)

    def _div(self, opcode: list[str], operands: list[str], active: Any) -> None:
        first, second = (self._integer(operand, opcode[-1]).astype(np.int64) for operand in operands[1:])
        quotient = np.abs(first) // np.maximum(np.abs(second), 1) * np.sign(first) * np.sign(second)
        self._put(operands[0], _low(quotient.view(np.uint64), _width(opcode[-1])), active)
