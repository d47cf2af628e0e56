"""What `pytest benchmarks` runs: the shapes, and each case and rival as parameters of a test.

The questions and their rivals are in vitriton.vit.bench: functions.py for functions, models.py for whole ViTs.
"""

import pytest
import torch
from vitriton.vit.bench.models import PEERS, ModelCase
from vitriton.vit.bench.race import Case
from vitriton.vit.bench.sizes import SIZES, Shape
from vitriton.vit.measure import gpu

__all__ = ["GPU", "NO_GPU", "Replay", "entries", "model_entries", "replay"]

GPU = gpu()
NO_GPU = f"no GPU here: torch {torch.__version__} sees no CUDA, ROCm or XPU device"

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "gpu": (torch.bfloat16, torch.float16)}
SHAPES = {
    "cpu": [Shape("s", 4, 197), Shape("ti", 1, 197), Shape("h", 1, 257)],
    "gpu": [
        Shape("b", 64, 197), Shape("s", 64, 197), Shape("b", 16, 577), Shape("h", 32, 257), Shape("so400m", 32, 257)
    ],
}  # fmt: skip
SLOW_BATCHES = {"cpu": (1, 8), "gpu": (1, 64)}
TOKENS = (50, 197, 257, 577, 1025)
SLOW_SHAPES = {
    device: [Shape(m, b, n) for m in SIZES for b in batches for n in TOKENS] for device, batches in SLOW_BATCHES.items()
}
MODELS = {"cpu": ("ti", 1), "gpu": ("b", 64)}
GHOSTNET = "timm:ghostnet_100"  # Han et al. 2020: at equal input


class Replay:
    """A timer for pytest-benchmark, which measures one rival after another, that gives it times measured in turns."""

    def __init__(self):
        self.ticks = iter(())

    def load(self, times):
        """Let the next rounds take these seconds, one each."""
        self.ticks = (tick for seconds in times for tick in (0.0, seconds))

    def __call__(self):
        return next(self.ticks)


replay = Replay()


def marks(device, slow):
    return [pytest.mark.benchmark(timer=replay)] + [pytest.mark.gpu] * (device == "gpu") + [pytest.mark.slow] * slow


def identifier(case, rival):
    return f"{case}, {rival}".replace(", ", "-").replace(" ", "-")


def entries(*questions):
    """(case, rival) of every case of these questions, as parameters of a test; the rivals of a case are neighbours.

    Slow are those of SLOW_SHAPES that are not in SHAPES and, on a CPU, whoever must be compiled for each case, but for
    the first of the shapes. Left out is who does not run on such a device, whatever is installed.
    """
    params = []
    for question in questions:
        for device in DTYPES:
            for shape in dict.fromkeys(SHAPES[device] + SLOW_SHAPES[device]):
                for dtype in DTYPES[device]:
                    for backward in (False, True):
                        case = Case(question, shape, dtype, device, backward)
                        for rival in question.rivals:
                            if case.why_not(rival):
                                continue
                            compiles = device == "cpu" and (rival == "compile" or question.rival(rival).compiled)
                            slow = shape not in SHAPES[device] or (compiles and shape != SHAPES[device][0])
                            where = marks(device, slow)
                            params.append(pytest.param(case, rival, marks=where, id=identifier(case, rival)))
    return params


def model_entries():
    """(case, rival) of whole ViTs at 224 px, inference and a training step, and GhostNet at the same input."""
    params = []
    for device, (small, batch) in MODELS.items():
        for model in dict.fromkeys((small, "b")):
            for dtype in DTYPES[device][: 2 if device == "cpu" else 1]:
                for training in (False, True):
                    where = torch.device("cpu" if device == "cpu" else GPU or "cuda")
                    case = ModelCase(model, SIZES[model].patch_size, 224, batch, dtype, where, training)
                    for rival in (*PEERS, GHOSTNET):
                        peer = PEERS.get(rival)
                        if peer and (device not in peer.devices or (training and not peer.training)):
                            continue
                        heavy = rival.startswith("compile") or rival in ("onnxruntime", "openvino")
                        slow = model != small or (device == "cpu" and (heavy or training))
                        params.append(pytest.param(case, rival, marks=marks(device, slow), id=identifier(case, rival)))
    return params
