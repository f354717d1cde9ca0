"""Reading what a kernel was compiled to: its PTX, and how the host launches it."""

import re
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """An instruction.

    Attributes:
      name: with its modifiers, such as `add.s32`.
      operands: registers, numbers and symbols; addresses in brackets, lists in braces.
      guard: the predicate that it depends on, or "".
      expected: the value of the predicate with which it is executed.
    """

    name: str
    operands: tuple[str, ...]
    guard: str
    expected: bool


class Program(NamedTuple):
    """The instructions of a kernel.

    Attributes:
      instructions: in order.
      labels: by name, the index of the instruction that follows.
    """

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """Reads the PTX of a module with one kernel."""
    body = text[text.index("\n{") + 2 : text.rindex("}")]
    body = re.sub(r"//.*|^\s*\.loc.*", "", body, flags=re.MULTILINE)
    program = Program([], {})
    blocks, count, statement, in_list = [""], 0, "", False
    for piece in re.split(r"([{};])", body):
        opens_block = piece == "{" and not statement.strip()
        closes_block = piece == "}" and not in_list
        if opens_block:
            count += 1
            blocks.append(f"#{count}")
        elif closes_block or piece == ";":
            _add(program, statement, blocks[-1])
            statement = ""
            if closes_block:
                blocks.pop()
        else:
            statement += piece
            in_list = piece == "{" or (in_list and piece != "}")
    return program


def _add(program: Program, statement: str, block: str) -> None:
    """Adds a statement; labels and predicates of a block get its suffix."""
    statement = statement.strip()
    while label := re.match(r"([$\w]+):\s*", statement):
        program.labels[label[1] + block] = len(program.instructions)
        statement = statement[label.end() :]
    if not statement or statement.startswith("."):
        return
    found = re.match(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL)
    assert found, statement
    negated, guard, name, rest = found.groups()
    operands = re.findall(r"\[.*?\]|\{.*?\}|[^\s,\[\]{}]+", rest)
    if block:
        operands = [re.sub(r"^[A-Za-z]\w*$", rf"\g<0>{block}", x) for x in operands]
        guard = guard and re.sub(r"^[A-Za-z]\w*$", rf"\g<0>{block}", guard)
    program.instructions.append(
        Instruction(name, tuple(operands), guard or "", not negated)
    )


class TensorMap(NamedTuple):
    """What the copies of tiles of an array need to know.

    Attributes:
      argument: which of the kernel's arrays.
      itemsize: bytes of a number.
      sizes: of the array, as seen by copies.
      strides: likewise, in numbers.
      box: the shape of a tile.
      swizzle: bytes in which the 16 byte pieces of tiles are permuted; 16 for none.
    """

    argument: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Launch(NamedTuple):
    """How the host starts a kernel.

    Attributes:
      blocks: how many, along each axis.
      threads: of a block.
      shared: bytes of shared memory.
      arguments: for each parameter, which of the kernel's arrays.
      maps: by their offset in the last parameter.
    """

    blocks: tuple[int, ...]
    threads: int
    shared: int
    arguments: tuple[int, ...]
    maps: dict[int, TensorMap]


# The host's names of types of numbers: int32, float32 and bfloat16.
_ITEMSIZES = {3: 4, 6: 4, 7: 2}
_PARAMETERS = "parameters"


class _Host:
    """The host's program, evaluated.

    An address is a pair of what it is in and an index; what arrays are described by is
    a dictionary.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.stored: dict[Any, Any] = {}
        self.maps: dict[int, TensorMap] = {}

    def execute(self, line: str) -> None:
        """Executes an operation but the launch."""
        used = re.findall(r"%[\w$]+(?:#\d+)?", line)
        if "func.func @" in line and used:
            # Its parameters are a stream and the addresses of the arrays.
            self.values[used[1]] = _PARAMETERS, 0
        elif "call @mosaic_gpu_init_tma_desc(" in line:
            self._add_map(*(self.values[x] for x in used))
        elif "llvm.store" in line:
            self.stored[self.values[used[1]]] = self.values[used[0]]
        elif "memref.store" in line:
            value, array, index = (self.values[x] for x in used)
            self.stored[array[1,][0], index] = value
        elif found := re.match(r"\s*(%[\w$]+)(?::\d+)? = ([\w.]+)", line):
            name, operation = found.groups()
            given = [self.values.get(x) for x in used[1:]]
            path = re.search(r"\[([\d, ]+)\]", line)
            numbers = tuple(map(int, path[1].split(","))) if path else ()
            self.values[name] = self._value(name, operation, line, given, numbers)

    def _value(self, name: str, operation: str, line: str, given, path) -> Any:
        match operation:
            case "llvm.mlir.constant":
                found = re.search(r"\((-?\d+) :", line)
                return int(found[1]) if found else None
            case "llvm.alloca":
                return name, 0
            case "memref.alloca":
                return {(1,): (name, 0), (2,): 0}
            case "llvm.getelementptr":
                (place, index), *more = given
                return place, index + (more[0] if more else path[0])
            case "llvm.load":
                place, index = given[0]
                return ((index,), 0) if place == _PARAMETERS else given[0]
            case "llvm.mlir.undef" | "llvm.mlir.poison":
                return {}
            case "llvm.insertvalue":
                value, whole = given
                return whole | {path: value}
            case "llvm.extractvalue":
                return given[0][path]
            case "memref.extract_aligned_pointer_as_index":
                return given[0][(1,)]
            case "llvm.mul":
                return given[0] * given[1]
            case "llvm.add":
                (place, index), offset = given
                return place, index + offset
        # Conversions and views.
        return given[0] if given else None

    def _add_map(self, place, array, kind, rank, sizes, strides, swizzle, box) -> None:
        ((argument,), start), (_, offset) = array, place
        assert start == 0, "a copy from the middle of an array"

        def numbers(place: tuple[str, int]) -> tuple[int, ...]:
            return tuple(self.stored[place[0], i] for i in range(rank))

        self.maps[offset] = TensorMap(
            argument,
            _ITEMSIZES[kind],
            numbers(sizes),
            numbers(strides),
            numbers(box),
            swizzle,
        )

    def launch(self, line: str) -> Launch:
        """Returns what the launch says."""

        def numbers(pattern: str) -> list[Any]:
            found = re.search(pattern, line)
            assert found, line
            return [self.values[x] for x in re.findall(r"%[\w$]+", found[1])]

        arrays = numbers(r"args\((.*)\)")[:-1]
        return Launch(
            blocks=tuple(numbers(r"blocks in \((.*?)\)")),
            threads=numbers(r"threads in \((.*?)\)")[0],
            shared=numbers(r"dynamic_shared_memory_size (%\w+)")[0],
            arguments=tuple(argument for (argument,), _ in arrays),
            maps=self.maps,
        )


def parse_host(text: str) -> Launch:
    """Reads the host's program, in MLIR's `llvm` dialect, after all other passes."""
    end = text.rindex("gpu.launch_func")
    host = _Host()
    for line in text[text.rindex("IR Dump Before", 0, end) :].splitlines():
        if "gpu.launch_func" in line:
            return host.launch(line)
        host.execute(line)
    raise AssertionError("no launch")
