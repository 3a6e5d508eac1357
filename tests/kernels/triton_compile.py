"""Compiles every Triton kernel for a device that need not be there, and prints what came of it as JSON.

A script of its own: in a process in which Triton interprets, nothing can be compiled. One entry per kernel and choice
of its compile-time arguments, with the instructions that tell how it multiplies.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H200 = GPUTarget("cuda", 90, 32)
MODULES = [
    "_triton",
    "outer.triton_sum",
    "conv.triton_half",
    *(
        f"{name}.triton_impl"
        for name in (
            "outer",
            "conv",
            "diagonal",
            "scatter",
            "normalize",
            "noise",
            "discrete",
            "update",
            "decode",
        )
    ),
]
BF16 = dict.fromkeys(
    ("a_ptr", "g_ptr", "rows_ptr", "x_ptr", "dx_ptr", "images_ptr", "output_grads_ptr"), "*bf16"
)
# Of operands of half precision alone.
HALF = {"_conv_half_tile_kernel", "_conv_half_sum_kernel"}
# Of others x is fp32 whatever the operands are.
TAKE_X = {
    *(
        "_scale_kernel",
        "_layer_norm_kernel",
        "_group_norm_kernel",
        "_row_sums_kernel",
        "_group_norm_grad_kernel",
    ),
}
POINTERS = {
    **dict.fromkeys(
        ("offsets_ptr", "keys_ptr", "order_ptr", "integers_ptr", "columns_ptr", "tokens_ptr"), "*i64"
    ),
    **dict.fromkeys(("slots_ptr", "out_words_ptr", "kinds_ptr", "counts_ptr"), "*i32"),
    **dict.fromkeys(
        ("partials_ptr", "fragments_ptr", "scale_partials_ptr", "bias_partials_ptr", "release_ptr"), "*fp64"
    ),
}
FLOATS = {
    *(
        "noise_std",
        "keep",
        "l2",
        "grad_scale",
        "gain1",
        "beta2",
        "gain2",
        "step_size",
        "bias2_sqrt_inv",
        "eps",
    ),
    *("weight_decay", "lr", "momentum", "gain", "from_grad", "from_buffer", "lost_a", "lost_g"),
    *("bias2_inv", "bias_variance", "min_second_moment"),
}
# Convolutions: of three axes, whose kernels stand out over the image; and one of a single place, whose numbers Triton
# makes constants since they are 1.
PADDED = {"IN0": False, "IN1": False, "IN2": False}
POINT = {
    **{"IN0": True, "IN1": False, "IN2": False},
    **dict.fromkeys(("groups", "channels", "outputs", "places", "width", "tiles", "across"), 1),
    **dict.fromkeys((f"{letter}{axis}" for letter in "dksrpo" for axis in range(letter in "ko", 3)), 1),
}
HALF_POINT = {
    **{key: value for key, value in POINT.items() if key not in ("channels", "outputs", "width")},
    **dict.fromkeys(("chunks", "bundles", "true_channels", "true_outputs", "taps"), 1),
}
# Every row is a unit.
NO_UNITS = dict.fromkeys(("offsets_ptr", "slots_ptr", "order_ptr", "scale_partials_ptr", "bias_partials_ptr"))
# Blocks of rows as they come.
UNSORTED = dict.fromkeys(("order_ptr", "shared_ptr", "counts_ptr"))
# Noise that is not correlated over steps; and such as comes from taps alone.
PLAIN, TAPS = {"numbers_ptr": None, "state_ptr": None}, {"state_ptr": None}
# Elsewhere an order is one of rows, int64.
BLOCK_NUMBERS = {("_order_kernel", "order_ptr"), ("_sum_kernel", "order_ptr")}
FP32_PARTIALS = {"_sum_kernel", "_join_kernel"}
# Compile-time arguments; a pointer that is None is one too. Both operand types where a kernel multiplies.
CASES: dict[str, list[dict[str, Any]]] = {
    "_slots_kernel": [{"STEP": 16, "BLOCK": 64}],
    "_totals_kernel": [
        {"STEP": 0, "BLOCK": 64},
        {"STEP": 16, "BLOCK": 64},
        {"STEP": 0, "BLOCK": 64, "offsets_ptr": None},
    ],
    "_rank1_kernel": [
        {"BR": 8, "BK": 128, "roots_ptr": None, "squares_ptr": None},
        {"BR": 8, "BK": 128},
        {"BR": 8, "BK": 16, "products_ptr": None, "squares_ptr": None},
    ],
    "_gram_kernel": [{"BT": 16, "BK": 32}, {"BT": 64, "BK": 32, "num_warps": 8}],
    "_tile_kernel": [{"BP": 64, "BD": 64, "BT": 16, "grads_ptr": None}, {"BP": 16, "BD": 16, "BT": 32}],
    "_kinds_kernel": [{"BK": 64, "BLOCK": 32}],
    "_order_kernel": [{"BK": 64, "BLOCK": 1024}],
    "_sum_kernel": [
        {"BP": 64, "BD": 64, "BK": 64, "TERMS": 3, "COST": 3, "fragments_ptr": None},
        {"BP": 128, "BD": 256, "BK": 32, "TERMS": 1, "COST": 1, **UNSORTED, "num_warps": 8},
        {"BP": 16, "BD": 16, "BK": 64, "TERMS": 2, "COST": 2, **UNSORTED},
    ],
    "_join_kernel": [{"BP": 64, "BD": 64, "BR": 8}],
    "_scale_kernel": [{"BLOCK": 1024}],
    "_conv_tile_kernel": [
        {"BO": 64, "BC": 64, "BT": 32, "SPAN": 128, **PADDED, "order_ptr": None, "grads_ptr": None},
        {"BO": 1, "BC": 16, "BT": 16, "SPAN": 128, **POINT, "partials_ptr": None, "num_warps": 1},
    ],
    "_conv_sum_kernel": [
        {"BO": 64, "BC": 64, "BT": 32, "SPAN": 128, **PADDED},
        {"BO": 1, "BC": 16, "BT": 16, "SPAN": 128, **POINT, "num_warps": 1},
    ],
    "_conv_half_tile_kernel": [
        {"BC": 128, "BO": 128, "BT": 64, "VC": 8, "VO": 8, **PADDED, "grads_ptr": None, "num_warps": 8},
        {"BC": 64, "BO": 16, "BT": 16, "VC": 2, "VO": 2, **HALF_POINT},
    ],
    "_conv_half_sum_kernel": [
        {"BC": 128, "BO": 64, "BT": 64, "VC": 8, "VO": 8, **PADDED},
        {"BC": 64, "BO": 16, "BT": 16, "VC": 2, "VO": 2, **HALF_POINT},
    ],
    "_conv_squares_kernel": [
        {"SPAN": 8192, "BR": 1, "BK": 1024},
        {"SPAN": 8192, "BR": 64, "BK": 16},
    ],
    "_layer_norm_kernel": [
        {"STEP": 64, "BR": 1, "BP": 4096, "coefficients_ptr": None, "order_ptr": None, "num_warps": 16},
        {"STEP": 64, "BR": 1, "BP": 1024, "mean_ptr": None, "weight_ptr": None},
        {"STEP": 16, "BR": 16, "BP": 16, "dx_ptr": None, "bias_ptr": None, "bias_partials_ptr": None, "num_warps": 1},
        {"STEP": 16, "BR": 2, "BP": 512, "coefficients_ptr": None, **NO_UNITS},
    ],
    "_layer_norm_units_kernel": [
        {"STEP": 64, "BK": 16, "BP": 64},
        {"STEP": 16, "BK": 16, "BP": 16, "scale_ptr": None, "scale_partials_ptr": None},
    ],
    "_row_sums_kernel": [
        {"SPAN": 8192, "BR": 1, "BK": 1024},
        {"SPAN": 8192, "BR": 64, "BK": 16, "mean_ptr": None, "weight_ptr": None},
    ],
    "_row_coefficients_kernel": [
        {"CENTRED": True, "BC": 64, "BA": 16},
        {"CENTRED": False, "BC": 1, "BA": 1, "weight_ptr": None, "scale_ptr": None, "bias_ptr": None},
    ],
    "_group_norm_kernel": [
        {"BC": 2, "BL": 2048, "num_warps": 16},
        {"BC": 1, "BL": 1, "channels": 1, "length": 1, "weight_ptr": None, "dx_ptr": None, "num_warps": 1},
    ],
    "_group_norm_grad_kernel": [
        {"SPAN": 8192, "BR": 1, "BK": 1024, "weight_ptr": None},
        {"SPAN": 8192, "BR": 64, "BK": 16},
    ],
    "_rows_kernel": [{"BR": 8, "BP": 256, "factors_ptr": None}, {"BR": 8, "BP": 16}],
    "_units_kernel": [{"BR": 64, "BP": 64, "factors_ptr": None}, {"BR": 1, "BP": 16}],
    "_pieces_kernel": [{"BR": 32, "BP": 128, "factors_ptr": None}, {"BR": 1, "BP": 16}],
    "_columns_kernel": [{"BP": 128}],
    "_runs_kernel": [
        {"SPAN": 32, "BP": 256, "SQUARE": True, "weights_ptr": None},
        {"SPAN": 32, "BP": 16, "SQUARE": False},
    ],
    "_seams_kernel": [{"SPAN": 32, "BP": 256, "SQUARE": True}, {"SPAN": 32, "BP": 16, "SQUARE": False}],
    "_noise_kernel": [
        *({"GROUPS": 4, "FILL": fill, **PLAIN, "num_warps": 2} for fill in (True, False)),
        *({"GROUPS": 4, "FILL": False, **kept, "num_warps": 2} for kept in (TAPS, {})),
    ],
    "_words_kernel": [{"BLOCKS": 64}],
    "_uniform_kernel": [{"BLOCKS": 64, "num_warps": 2}],
    "_rounded_kernel": [{"GROUPS": 4, "num_warps": 2}],
    "_release_kernel": [{"GROUPS": 4, "num_warps": 2}],
    "_adam_kernel": [
        {"GROUPS": 4, "CORRECTED": False, **PLAIN, "num_warps": 2},
        {"GROUPS": 4, "CORRECTED": True, **TAPS, "num_warps": 2},
        {"GROUPS": 4, "CORRECTED": True, "num_warps": 2},
    ],
    "_adam_silent_kernel": [{"BLOCK": 1024, "CORRECTED": corrected} for corrected in (False, True)],
    "_sgd_kernel": [
        {"GROUPS": 4, "FIRST": False, **PLAIN, "num_warps": 2},
        {"GROUPS": 4, "FIRST": True, "buffer_ptr": None, **PLAIN, "num_warps": 2},
        {"GROUPS": 4, "FIRST": False, "num_warps": 2},
    ],
    "_sgd_silent_kernel": [{"BLOCK": 1024, "FIRST": True}, {"BLOCK": 1024, "FIRST": False, "buffer_ptr": None}],
    "_first_layer_kernel": [{"BR": 4, "BP": 256}, {"BR": 4, "BP": 16}],
    "_residual_kernel": [
        {"BR": 64, "BP": 64, "BK": 16, "STATISTICS": 64},
        {"BR": 64, "BP": 16, "BK": 16, "STATISTICS": 16},
    ],
    "_linear_kernel": [{"BR": 64, "BP": 64, "BK": 16}, {"BR": 64, "BP": 16, "BK": 16}],
    "_last_norm_kernel": [{"BR": 4, "BK": 256}, {"BR": 4, "BK": 16}],
    "_draw_kernel": [{"BT": 16, "BK": 64, "num_warps": 1}, {"BT": 128, "BK": 16, "num_warps": 2}],
    "_add_kernel": [{"BP": 256, "num_warps": 2}],
}  # fmt: skip


def kernels() -> Iterator[tuple[str, Any]]:
    """(name, kernel) of everything that is launched, wherever it was written."""
    for module in MODULES:
        loaded = importlib.import_module(f"synthward.kernels.{module}")
        for name, value in vars(loaded).items():
            if name.endswith("_kernel") and value.fn.__module__ == loaded.__name__:
                yield name, value


def compiled(name: str, kernel: Any, case: dict[str, Any], operands: dict[str, str]) -> dict[str, Any]:
    constants = {key: value for key, value in case.items() if key != "num_warps"}
    if "TERMS" in constants and not operands:
        constants["TERMS"] = 0
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif not argument.endswith("_ptr"):
            signature[argument] = "i32"
        elif argument == "partials_ptr" or argument == "fragments_ptr":
            signature[argument] = "*fp32" if name in FP32_PARTIALS else "*fp64"
        else:
            signature[argument] = operands.get(argument) or POINTERS.get(argument, "*fp32")
        if (name, argument) in BLOCK_NUMBERS and argument not in constants:
            signature[argument] = "*i32"
    options = {
        "num_warps": case.get("num_warps", 4),
        "enable_fp_fusion": not {"k0", "grad_ptr"} & set(kernel.arg_names),
    }
    made = triton.compile(ASTSource(kernel, signature, constants), target=H200, options=options)
    text = made.asm["ptx"]
    return {
        "operands": "bf16" if operands else "fp32",
        "tf32": "tf32" in text,
        "mma": bool(re.search(r"\bw?g?mma", text)),
        "approximate": sorted(
            set(re.findall(r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt\.approx)\S*", text))
        ),
        "fused_fp32": bool(re.search(r"\bfma\.\S*f32", text)),
        "fused_fp64": bool(re.search(r"\bfma\.\S*f64", text)),
        "divides": bool(re.search(r"\b(?:div|rcp|sqrt|rsqrt)\.\S*f\d", text)),
        "atomic": bool(re.search(r"\b(?:atom|red)\.", text)),
    }


def main() -> None:
    found = dict(kernels())
    assert found.keys() == CASES.keys(), f"without a case, or gone: {found.keys() ^ CASES.keys()}"
    result = {}
    for name, cases in CASES.items():
        reads = set(found[name].arg_names) & BF16.keys() - ({"x_ptr"} if name not in TAKE_X else set())
        operands = [{}, {key: BF16[key] for key in reads}] if reads else [{}]
        operands = operands[1:] if name in HALF else operands
        result[name] = [compiled(name, found[name], case, types) for case in cases for types in operands]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
