"""The kernels of a compiled GPU program, read from XLA's text.

Every kernel has the bytes that it reads and writes in the device's memory and the FLOPs
of its matrix products. An operand of which a kernel reads a slice counts as that slice,
the body of a loop as often as it runs. Caches are not modeled.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# The kinds of kernels, by what bounds or explains them.
PRODUCTS, CONVOLUTIONS, COLLECTIVES = "products", "convolutions", "collectives"
TRANSPOSES, COPIES, SCATTERS = "transposes", "copies", "scatters"
REDUCTIONS, FUSIONS = "reductions", "fusions"
KINDS = (
    CONVOLUTIONS,
    PRODUCTS,
    FUSIONS,
    REDUCTIONS,
    TRANSPOSES,
    COPIES,
    SCATTERS,
    COLLECTIVES,
)

# XLA names a fusion after the operation whose code generator it uses.
_NAMED = (
    ("scatter", SCATTERS),
    ("transpose", TRANSPOSES),
    ("reduce", REDUCTIONS),
    ("copy", COPIES),
)
_COLLECTIVE = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Nothing is launched for these.
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array of a program."""

    dtype: str
    sides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.sides)

    @property
    def bytes(self) -> float:
        """Bytes in memory; a truth value takes one."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits.group()) if bits else 8) / 8


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      results: its arrays, more than one for a tuple.
      attributes: the text behind the operands.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Kernel(NamedTuple):
    """A kernel, or what it is launched as.

    Attributes:
      kind: one of `KINDS`.
      name: that of its instruction.
      source: the operation of the source, by its path.
      result: its first array.
      operands: dtype of the arrays that a product or convolution multiplies.
      exact: whether a product of float32 must not be rounded to TF32.
      bytes, flops: of one run.
      runs: how often a step runs it.
      window: the longer side of a convolution's window.
    """

    kind: str
    name: str
    source: str
    result: Array
    operands: str
    exact: bool
    bytes: float
    flops: float
    runs: int = 1
    window: int = 0


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def kernels(text: str) -> list[Kernel]:
    """Lists the kernels of a program in the order in which it runs them.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = parse(text)
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    return list(_walk(computations, entry, 1))


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if found is None:
        return None
    rest = _COMMENT.sub("", line[found.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    begin = rest.index("(", end)
    close = _closing(rest, begin)
    return Instruction(
        name=found.group(2),
        opcode=rest[end:begin].strip(),
        results=tuple(_arrays(rest[:end])),
        operands=tuple(_OPERAND.findall(rest[begin:close])),
        attributes=rest[close + 1 :],
        root=bool(found.group(1)),
    )


def _closing(text: str, begin: int) -> int:
    """Finds the parenthesis that closes the one at `begin`."""
    depth = 0
    for index in range(begin, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"a parenthesis is not closed: {text[begin : begin + 80]}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, _, sides in _SHAPE.findall(text):
        yield Array(dtype, tuple(int(side) for side in sides.split(",") if side))


def _called(instruction: Instruction, attribute: str) -> list[str]:
    found = re.search(
        rf"\b{attribute}=\{{?([^}},]*(?:, ?%[^}},]*)*)", instruction.attributes
    )
    return _OPERAND.findall(found.group(1)) if found else []


def _walk(
    computations: dict[str, Computation], name: str, runs: int
) -> Iterator[Kernel]:
    computation = computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "while":
            count = re.search(
                r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes
            )
            times = runs * int(count.group(1)) if count else runs
            for part in ("condition", "body"):
                for called in _called(instruction, part):
                    yield from _walk(computations, called, times)
        elif opcode in ("call", "conditional", "async-start"):
            for called in _branches(instruction):
                yield from _walk(computations, called, runs)
        else:
            yield _kernel(computations, computation, instruction, runs)


def _branches(instruction: Instruction) -> list[str]:
    """Names what a call runs; of a conditional the last branch."""
    for attribute in ("to_apply", "calls", "branch_computations", "true_computation"):
        if called := _called(instruction, attribute):
            return called[-1:]
    return []


def _kernel(
    computations: dict[str, Computation],
    computation: Computation,
    instruction: Instruction,
    runs: int,
) -> Kernel:
    inside = _called(instruction, "calls") if instruction.opcode == "fusion" else []
    given = [
        computation[name].results
        for name in instruction.operands
        if name in computation
    ]
    inputs = [array for arrays in given for array in arrays]
    outputs = _without_workspace(instruction)
    if inside:
        fused = computations[inside[0]]
        read, written = _fused_bytes(fused)
    else:
        fused = {}
        read, written = (sum(a.bytes for a in arrays) for arrays in (inputs, outputs))
    kind, flops, exact, window = _work(instruction, fused, inputs, outputs)
    multiplied = [a.dtype for a in inputs if len(a.sides) > 1] or ["f32"]
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Kernel(
        kind=kind,
        name=instruction.name,
        source=source.group(1) if source else "",
        result=outputs[0] if outputs else Array("pred", (0,)),
        operands=max(multiplied, key=lambda dtype: dtype == "f32"),
        exact=exact,
        bytes=read + written,
        flops=flops,
        runs=runs,
        window=window,
    )


def _without_workspace(instruction: Instruction) -> tuple[Array, ...]:
    """Returns the results without a library's scratch memory, which comes last."""
    results = instruction.results
    if instruction.opcode == "custom-call" and len(results) > 1:
        *arrays, last = results
        return tuple(arrays) if last.dtype in ("u8", "s8") else results
    return results


def _work(
    instruction: Instruction,
    fused: Computation,
    inputs: list[Array],
    outputs: tuple[Array, ...],
) -> tuple[str, float, bool, int]:
    """Returns kind, FLOPs, whether float32 stays exact, and the window's side."""
    opcode, attributes = instruction.opcode, instruction.attributes
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    called = target.group(1) if target else ""
    exact = '"HIGHEST"' in attributes or "highest" in attributes
    if opcode == "convolution" or "$conv" in called:
        flops, window = _convolution(called, attributes, inputs, outputs)
        return CONVOLUTIONS, flops, exact, window
    if opcode == "dot" or "gemm" in called or "matmul" in called:
        return PRODUCTS, _product(attributes, inputs, outputs[0]), exact, 0
    if "fmha" in called:
        return PRODUCTS, _attention(called, inputs), exact, 0
    for inner in fused.values():
        if inner.opcode == "dot":
            given = [fused[name].results[0] for name in inner.operands]
            flops = _product(inner.attributes, given, inner.results[0])
            return PRODUCTS, flops, "highest" in inner.attributes, 0
    if opcode.startswith(_COLLECTIVE):
        return COLLECTIVES, 0.0, False, 0
    name = instruction.name if opcode == "fusion" else opcode
    kind = next((kind for word, kind in _NAMED if word in name), FUSIONS)
    return kind, 0.0, False, 0


def _convolution(
    target: str, attributes: str, inputs: list[Array], outputs: tuple[Array, ...]
) -> tuple[float, int]:
    """Returns the FLOPs and the window's longer side.

    All three convolutions of a layer multiply each output of the forward pass with each
    weight that one of its channels has, products with padding included.
    """
    first, second, result = *inputs[:2], outputs[0]
    if "BackwardInput" in target:
        forward, kernel = first, second
    elif "BackwardFilter" in target:
        forward, kernel = second, result
    else:
        forward, kernel = result, second
    labels = re.search(r"dim_labels=\w+_(\w+)->", attributes)
    features = kernel.sides[labels.group(1).index("o")] if labels else 1
    size = re.search(r"window=\{size=([\dx]+)", attributes)
    window = max(map(int, size.group(1).split("x"))) if size else 1
    return 2 * forward.size * kernel.size / features, window


def _product(attributes: str, inputs: list[Array], result: Array) -> float:
    found = re.search(
        r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([\d",]*)[\]}]', attributes
    )
    axes = [int(axis) for axis in re.findall(r"\d+", found.group(1))] if found else []
    return 2 * result.size * math.prod(inputs[0].sides[axis] for axis in axes)


def _attention(target: str, inputs: list[Array]) -> float:
    """Returns the FLOPs of cuDNN's fused attention on (b,n,h,d) queries and keys.

    Two products of all pairs forward; five backward, one of which is computed anew.
    """
    queries, keys = inputs[:2]
    return (10 if "Backward" in target else 4) * queries.size * keys.sides[1]


def _fused_bytes(fused: Computation) -> tuple[float, float]:
    """Returns the bytes that a fusion reads and writes.

    How much of every array is needed follows from the results backwards. An array of
    which only slices are used is read as far as they reach, and one that is updated in
    place is written as far as it is updated.
    """
    used: dict[str, float] = {}
    written = 0.0

    def add(name: str, elements: float) -> None:
        size = sum(array.size for array in fused[name].results)
        used[name] = min(size, used.get(name, 0.0) + elements)

    for instruction in reversed(list(fused.values())):
        opcode, operands = instruction.opcode, instruction.operands
        size = sum(array.size for array in instruction.results)
        if instruction.root:
            used[instruction.name] = size
            written = sum(_written(fused, name) for name in _roots(instruction))
        needed = used.get(instruction.name, 0.0)
        for place, name in enumerate(operands):
            whole = sum(array.size for array in fused[name].results)
            if opcode in _SLICES and place == 0:
                add(name, needed)
            elif opcode == "dynamic-update-slice" and place == 0:
                continue
            elif needed:
                add(name, whole * min(1.0, needed / max(size, 1)))
    read = sum(
        used.get(each.name, 0.0) * each.results[0].bytes / max(each.results[0].size, 1)
        for each in fused.values()
        if each.opcode == "parameter"
    )
    return read, written


def _roots(root: Instruction) -> tuple[str, ...]:
    return root.operands if root.opcode == "tuple" else (root.name,)


def _written(fused: Computation, name: str) -> float:
    instruction = fused[name]
    while instruction.opcode == "bitcast":
        instruction = fused[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        instruction = fused[instruction.operands[1]]
    return sum(array.bytes for array in instruction.results)
