"""What layer_norm_linear moves: each kernel's bytes, counted in the interpreter. test_aot.py has its machine code."""

import guards
import pytest
from parity import F16, assert_parity, layer_norm_inputs, randn, run
from vitriton.kernels import configs, layer_norm_linear, use_backend

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
