"""What layer_norm_linear costs: bytes that its kernels move, counted in the interpreter, and instructions, compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import guards
import pytest
from parity import F16, assert_parity, layer_norm_inputs, randn, run
from vitriton.kernels import configs, layer_norm_linear, use_backend
from vitriton.kernels.aot import Record

pytest.importorskip("triton", reason="the compiler and the interpreter are Triton's")
pytest_plugins = ["parity"]


# ---- bytes

in_the_interpreter = pytest.mark.skipif(not guards.interpreting(), reason="bytes are counted in the interpreter only")


def launches_of(device, launch_log, m, n, k, activation):
    """The launches of a forward and a backward pass in fp16, by kernel."""
    inputs = layer_norm_inputs((m,), n, k, dtype=F16, device=device)
    with use_backend("triton"):
        run(layer_norm_linear, inputs, randn(m, n, dtype=F16, device=device), activation=activation)
    launches = {launch.kernel.strip("_").removesuffix("_kernel"): launch for launch in launch_log}
    assert len(launches) == 6 and len(launch_log) == 7  # W' is made anew for the backward pass
    return launches


@pytest.mark.parametrize("activation", [None, "gelu"])
@in_the_interpreter
def test_bytes(device, launch_log, activation):
    """Each kernel reads its tiles of x, W and the gradient once, and the statistics; at most 2% is anything else."""
    m, n, k = 256, 192, 200  # whole tiles of the outputs, a tail along K
    launches = launches_of(device, launch_log, m, n, k, activation)
    tiles = configs.tiles("prenorm", "interpreter", F16)
    over_m, over_n, over_k = m // tiles.BLOCK_M, n // tiles.BLOCK_N, -(-k // tiles.BLOCK_N)
    half, single = 2, 4  # bytes
    x, w, y = half * m * k, half * n * k, half * m * n
    z = y if activation else 0
    blocks = -(-m // configs.row_tiles(n).BLOCK_M)  # of rows, each with its part of db
    over_rows = -(-n // tiles.BLOCK_M)  # tiles of dW, each with its part of dgamma and dbeta
    needed = {  # bytes read, bytes written
        "row_statistics": (x, 2 * single * m),
        "fold": (w + half * (2 * k * (n // 4) + n), w + 2 * single * n),
        "layer_norm_linear_fwd": (over_n * x + over_m * w + 2 * single * (over_n * m + over_m * n), y + z),
        "bwd_rows": (2 * y + 2 * single * n * blocks, z + 2 * single * m + single * n * blocks),
        "layer_norm_linear_dx": (over_k * (y + 4 * single * m) + over_m * w + x, x),
        "layer_norm_linear_dw": (
            over_k * (y + 2 * single * m * over_rows + single * n) + over_rows * (x + 2 * half * k) + w,
            w + 2 * single * k * over_rows,
        ),
    }
    for name, (read, written) in needed.items():
        assert launches[name].bytes_loaded <= 1.02 * read, (name, launches[name].loaded)
        assert launches[name].bytes_stored == written, (name, launches[name].stored)


@pytest.mark.parametrize("activation", [None, "gelu"])
@in_the_interpreter
def test_no_pass_over_x_for_the_statistics_of_the_backward_pass(device, launch_log, activation):
    """Sums over a row's K features come from N: only the products read x, dx once, and nothing reads W beside them."""
    m, n, k = 256, 192, 200
    launches = launches_of(device, launch_log, m, n, k, activation)
    assert set(launches["bwd_rows"].loaded) <= {"grad_ptr", "z_ptr", "c_ptr", "d_ptr", "grad_ptr|dz_ptr"}
    backward = [name for name in launches if name not in ("row_statistics", "fold", "layer_norm_linear_fwd")]
    assert sorted(name for name in backward if "x_ptr" in launches[name].loaded) == [
        "layer_norm_linear_dw", "layer_norm_linear_dx",
    ]  # fmt: skip
    assert launches["layer_norm_linear_dx"].loaded["x_ptr"] == 2 * m * k


@pytest.mark.parametrize("n, k", [(20, 24), (24, 20), (18, 30)])
def test_widths_beside_the_alignment(device, n, k):
    """Rows of 32 elements of which 20 are used: a stride that 8 divides, a width that it does not."""
    inputs = layer_norm_inputs((9,), n, k, dtype=F16, device=device)

    def apart(t):
        return t.new_zeros(t.shape[0], 32)[:, : t.shape[1]].copy_(t.detach())

    for name in ("x", "weight"):
        inputs[name] = apart(inputs[name]).requires_grad_()
    with use_backend("triton"):
        assert_parity(layer_norm_linear, inputs, apart(randn(9, n, dtype=F16, device=device)))


# ---- instructions

ARCHS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def compiled():
    """{chip: {"plain": Record, name of a shape: Record}}"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "plain_gemm.py"), *ARCHS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        arch: {name: Record.from_dict(plain) for name, plain in records.items()}
        for arch, records in zip(ARCHS, lines, strict=True)
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_main_loop_is_that_of_a_plain_product(compiled, arch):
    """The usual loop, on x as it is; that for rows of a large mean normalises on the way, and is the dearer."""
    plain = compiled[arch]["plain"]
    for name in ("qkv", "gelu", "gelu_tanh"):
        usual, rare = compiled[arch][name].loops
        assert usual.macs == rare.macs == plain.hot.macs and usual.tensor == plain.hot.tensor
        assert usual.instructions <= 1.05 * plain.hot.instructions
        assert rare.instructions > 1.5 * usual.instructions


@pytest.mark.parametrize("shape, most", [("qkv", 200), ("gelu", 420), ("gelu_tanh", 420)])
def test_epilogue(compiled, shape, most):
    """Issue slots per 1024 outputs of a warp on sm_90, from the loop to the end; with GELU, z is stored too."""
    record = compiled["sm_90"][shape]
    outputs = record.config["BLOCK_M"] * record.config["BLOCK_N"] / record.config["num_warps"]
    assert record.config["SAVE"] == (shape != "qkv")
    assert record.epilogue * 1024 / outputs <= most
    assert record.spill_bytes == record.stack_bytes == 0
