"""What the compiler makes of the outer family's Triton kernels for an H200, which need not be here.

`python -m benchmarks.gpu.static` runs each operation at the shapes of `benchmarks.gpu` on tensors without numbers,
notes what it would launch, compiles that, and reads off the machine code: registers and spills, shared memory, blocks
that fit on a multiprocessor at once, tensor instructions, the widest load. Facts about code, not times.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from synthward.kernels import _triton
from synthward.kernels.outer import triton_impl as outer
from synthward.kernels.outer import triton_sum

H200, PROCESSORS = GPUTarget("cuda", 90, 32), 132
# Of one multiprocessor.
REGISTERS, SHARED, THREADS, BLOCKS = 1 << 16, 228 << 10, 2048, 32
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and how it is compiled."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Code:
    """Machine code of one launch, in counts of instructions unless said otherwise."""

    operation: str
    kernel: str
    blocks: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks_per_processor: int
    wgmma: int
    mma: int
    tf32: int
    ffma: int
    to_fp64: int
    widest_load_bytes: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels of the outer family are noted and not launched."""
    found: list[Launch] = []
    kernels = [
        (module, name)
        for module in (outer, triton_sum, _triton)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    ]
    before = [(vars(module)[name], module, name) for module, name in kernels]
    processors = triton_sum.processors
    for kernel, module, name in before:
        setattr(module, name, _Recorder(kernel, found))
    triton_sum.processors = lambda _: PROCESSORS
    try:
        yield found
    finally:
        triton_sum.processors = processors
        for kernel, module, name in before:
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {
                k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs
            }
            arguments = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
            self._found.append(Launch(self._kernel, arguments, options))

        return launch


def compiled(operation: str, launch: Launch) -> Code:
    """The launch as Triton specialises it: numbers that are 1 are constants, others may be known multiples of 16."""
    signature, constants, hints = {}, {}, {}
    declared = {p.name for p in launch.kernel.params if p.is_constexpr}
    for place, (name, value) in enumerate(launch.arguments.items()):
        if name in declared or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, hints)
    made = triton.compile(source, target=H200, options=launch.options)
    shown = {k: v for k, v in constants.items() if k in declared}
    return _read(operation, launch, shown, made)


def _read(operation: str, launch: Launch, constants: dict[str, Any], made: Any) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    # The stack of a kernel that calls nothing holds what registers did not.
    spilled = used["STACK"] + used["LOCAL"]
    warps = launch.options.get("num_warps", 4)
    shared = max(made.metadata.shared, used["SHARED"])
    return Code(
        operation,
        launch.kernel.fn.__name__,
        " ".join(f"{key}={value}" for key, value in constants.items()),
        warps,
        used["REG"],
        spilled,
        shared,
        _fitting(32 * warps, used["REG"], shared),
        wgmma=sum(op.startswith("HGMMA") for op in opcodes),
        mma=sum(op.startswith("HMMA") for op in opcodes),
        tf32=sum("TF32" in op for op in opcodes) + made.asm["ptx"].count("tf32"),
        ffma=sum(op.startswith("FFMA") for op in opcodes),
        to_fp64=sum(op.startswith("F2F.F64") for op in opcodes),
        widest_load_bytes=max(map(_width, opcodes), default=0),
    )


def _width(opcode: str) -> int:
    """Bytes that one thread loads from global memory by this instruction."""
    if not re.match(r"LDG(STS)?\b", opcode):
        return 0
    bits = re.search(
        r"\.(8|16|32|64|128)\b", opcode.replace("U8", "8").replace("U16", "16").replace("S8", "8")
    )
    return int(bits.group(1)) // 8 if bits else 4


def _fitting(threads: int, registers: int, shared: int) -> int:
    """Blocks on a multiprocessor at once: registers come in 256 a warp, shared memory in 128 bytes and 1 KiB extra."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * threads // 32)
    by_shared = SHARED // (-(-shared // 128) * 128 + 1024)
    return min(BLOCKS, THREADS // threads, by_registers, by_shared)


def operations() -> Iterator[tuple[str, Callable[[], object]]]:
    """The shapes of `benchmarks.gpu` and what each runs, on tensors without numbers."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for name, units, length, d, p in (
            ("gram_norms", 4096, 16, 512, 512),
            ("gram_norms", 512, 64, 1024, 1024),
            ("gram_norms", 16, 512, 4096, 4096),
            ("tile_norms", 64, 512, 768, 768),
            ("tile_norms", 8, 8192, 768, 768),
        ):
            yield f"{name} {kind} {units} x {length}, {d} x {p}", _norms(name, units, length, d, p, dtype)
        yield f"rank1_norms {kind} 65536, 1024 x 1024", _rank1(65536, 1024, 1024, dtype)
        for rows, d, p in ((65536, 1024, 1024), (8192, 4096, 4096), (8192, 105, 77)):
            for terms, run in ((3, None),) if dtype == torch.float32 else ((3, None), (2, None), (1, 1)):
                name = (
                    f"outer_sum {kind} {rows}, {d} x {p}, {terms} terms, units of {run or 'any number'} rows"
                )
                yield name, _sum(rows, d, p, dtype, terms, run)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(name: str, units: int, length: int, d: int, p: int, dtype: torch.dtype) -> Callable[[], object]:
    rows = units * length
    a, g, offsets = (
        _empty(rows, d, dtype=dtype),
        _empty(rows, p, dtype=dtype),
        _empty(units + 1, dtype=torch.int64),
    )
    return lambda: getattr(outer, name)(a, g, offsets, _empty(units))


def _rank1(rows: int, d: int, p: int, dtype: torch.dtype) -> Callable[[], object]:
    a, g = _empty(rows, d, dtype=dtype), _empty(rows, p, dtype=dtype)
    return lambda: outer.rank1_norms(a, g, _empty(rows), _empty(rows))


def _sum(rows: int, d: int, p: int, dtype: torch.dtype, terms: int, run: int | None) -> Callable[[], object]:
    a, g = _empty(rows, d, dtype=dtype), _empty(rows, p, dtype=dtype)
    return lambda: triton_sum.outer_sum(a, g, _empty(rows), _empty(p, d), terms=terms, run=run)


def report(only: str = "") -> list[Code]:
    """The code of every launch of the operations whose name has `only` in it; of equal ones the first."""
    found: list[Code] = []
    for operation, run in operations():
        if only not in operation:
            continue
        with recorded() as launches:
            run()
        found += [compiled(operation, launch) for launch in launches]
    return found


def table(codes: list[Code]) -> str:
    head = ("regs", "spill", "shared", "blocks", "wgmma", "mma", "tf32", "ffma", "to f64", "load")
    lines, before = [], ""
    for code in codes:
        if code.operation != before:
            lines.append(code.operation)
            before = code.operation
        numbers = (
            *(code.registers, code.spilled_bytes, code.shared_bytes, code.blocks_per_processor, code.wgmma),
            *(code.mma, code.tf32, code.ffma, code.to_fp64, code.widest_load_bytes),
        )
        cells = "  ".join(f"{name} {number:>5d}" for name, number in zip(head, numbers, strict=True))
        lines.append(f"  {code.kernel:18s} {cells}  {code.blocks} warps={code.warps}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operations whose name has this in it")
    parser.add_argument("--json", action="store_true", help="as JSON instead of a table")
    options = parser.parse_args()
    if _triton.INTERPRETED:
        raise SystemExit(
            "benchmarks.gpu.static: TRITON_INTERPRET is set, and then nothing is compiled; unset it"
        )
    codes = report(options.only)
    print(json.dumps([asdict(code) for code in codes]) if options.json else table(codes))


if __name__ == "__main__":
    main()
