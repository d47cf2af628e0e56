"""A race: one question, asked of every implementation that answers it; each answer is checked before it is timed.

A `Question` is a line of a table in the bench_*.py files: its inputs, and its rivals by name. To add a rival, add it to
that table. `entries` gives pytest every case of a question (shape, dtype, device, direction) and every rival in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from vitriton.kernels import reference
from vitriton.vit import PRESETS
from vitriton.vit.timing import CPUClock, GPUClock, measure

__all__ = ["GPU", "NO_GPU", "Case", "Question", "Race", "Replay", "Shape", "entries"]

GPU = next((name for name in ("cuda", "xpu") if getattr(torch, name).is_available()), None)  # cuda: ROCm too
NO_GPU = f"no GPU here: torch {torch.__version__} sees no CUDA, ROCm or XPU device"


class Shape(NamedTuple):
    """`batch` images of `tokens` tokens in a ViT of the size `model`, a key of PRESETS. Heads are 80 in H, else 64."""

    model: str
    batch: int
    tokens: int

    dim = property(lambda self: PRESETS[self.model].dim)
    heads = property(lambda self: PRESETS[self.model].heads)
    dim_head = property(lambda self: self.dim // self.heads)
    mlp_dim = property(lambda self: PRESETS[self.model].mlp_dim)

    def __str__(self):
        return f"ViT-{self.model.title()} {self.batch}x{self.tokens}"


DTYPES = {"cpu": (torch.float32, torch.bfloat16), "gpu": (torch.bfloat16, torch.float16)}
SHAPES = {
    "cpu": [Shape("ti", 1, 197), Shape("s", 4, 197), Shape("h", 1, 257)],
    "gpu": [Shape("s", 64, 197), Shape("b", 64, 197), Shape("b", 16, 577), Shape("h", 32, 257)],
}
SLOW_BATCHES = {"cpu": (1, 8), "gpu": (1, 64)}
SLOW_SHAPES = {
    device: [Shape(m, b, n) for m in ("ti", "s", "b", "h") for b in batches for n in (197, 257, 577)]
    for device, batches in SLOW_BATCHES.items()
}


def call(rival, shape, inputs):
    """The rival is a function of the inputs, in their order."""
    return lambda: rival(*inputs.values())


@dataclass(frozen=True, eq=False)
class Question:
    """`inputs(shape)` gives named fp32 tensors on the CPU; `rivals` has a "plain" one, which says what is right.

    `bind(rival, shape, inputs)` gives the function of no arguments that computes the answer, one tensor; what it does
    before is not timed.
    """

    name: str
    inputs: Callable[[Shape], dict[str, Tensor]]
    rivals: dict[str, Callable]
    bind: Callable[[Callable, Shape, dict[str, Tensor]], Callable[[], Tensor]] = call


@dataclass(frozen=True, eq=False)
class Case:
    """A question about tensors of one shape, dtype and device ("cpu" or "gpu"), forward or forward and backward."""

    question: Question
    shape: Shape
    dtype: torch.dtype
    device: str
    backward: bool

    def params(self):
        """What tells this case from others, for pytest-benchmark's JSON and --benchmark-group-by=param:NAME."""
        return {
            "question": self.question.name,
            **self.shape._asdict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "direction": "forward+backward" if self.backward else "forward",
        }

    def __str__(self):
        params = self.params()
        return f"{self.question.name}, {self.shape}, {params['dtype']}, {self.device.upper()}, {params['direction']}"


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


def entries(*questions):
    """(case, rival) of every case of these questions, as parameters of a test; the rivals of a case are neighbours.

    Those of SLOW_SHAPES that are not in SHAPES are marked slow.
    """
    params = []
    for question in questions:
        for device in DTYPES:
            for shape in dict.fromkeys(SHAPES[device] + SLOW_SHAPES[device]):
                marks = [pytest.mark.benchmark(timer=replay)]
                marks += [pytest.mark.gpu] * (device == "gpu") + [pytest.mark.slow] * (shape not in SHAPES[device])
                for dtype in DTYPES[device]:
                    for backward in (False, True):
                        case = Case(question, shape, dtype, device, backward)
                        for rival in question.rivals:
                            name = f"{case}, {rival}".replace(", ", "-").replace(" ", "-")
                            params.append(pytest.param(case, rival, marks=marks, id=name))
    return params


class Race:
    """`rivals` (names) in one `case`: who answers wrongly, and the times of those who do not."""

    def __init__(self, case, rivals):
        self.case = case
        self.device = GPU if case.device == "gpu" else "cpu"
        torch.manual_seed(0)
        inputs = {name: t.to(self.device, case.dtype) for name, t in case.question.inputs(case.shape).items()}
        self.names = ("output", *(f"gradient of {name}" for name in inputs))
        self.grad = None
        if case.backward:
            output = case.question.bind(case.question.rivals["plain"], case.shape, inputs)()
            self.grad = torch.randn(output.shape).to(output)
        gold = self.call("plain", {name: t.double() for name, t in inputs.items()})()
        base = self.call("plain", inputs)()
        self.calls = {rival: self.call(rival, inputs) for rival in rivals}
        self.wrong = {rival: self.faults(rival, base, gold) for rival in rivals}
        self._times = self.undisturbed = None

    def call(self, rival, inputs):
        """The function of no arguments that is timed: the output and, where asked for, each input's gradient."""
        inputs = {name: nn.Parameter(t, requires_grad=self.case.backward) for name, t in inputs.items()}
        forward = self.case.question.bind(self.case.question.rivals[rival], self.case.shape, inputs)
        if not self.case.backward:
            return lambda: (forward(),)
        inputs = tuple(inputs.values())
        grad = self.grad.to(inputs[0].dtype)

        def forward_backward():
            output = forward()
            return output, *torch.autograd.grad(output, inputs, grad)

        return forward_backward

    def faults(self, rival, base, gold):
        """What is wrong with the rival's answer, a line for each tensor; empty if nothing is."""
        if rival == "plain":
            return ""  # it is what the others are held to
        faults = []
        try:
            for name, *tensors in zip(self.names, self.calls[rival](), base, gold, strict=False):
                error = reference.compare(name, *tensors, k=2 if name == "output" else 3)
                if tensors[0].dtype != self.case.dtype:
                    faults.append(f"{name}: has dtype {tensors[0].dtype}, asked was {self.case.dtype}")
                elif not error:
                    faults.append(str(error))
        except Exception as error:  # whatever it raises, the others can be timed
            faults.append(f"{type(error).__name__}: {error}")
        return "\n".join(faults)

    def times(self, **budget):
        """{rival: [seconds, ...]} of those that answer rightly, measured in turns at the first call of this method."""
        if self._times is None:
            clock = GPUClock(self.device) if self.case.device == "gpu" else CPUClock()
            right = {rival: call for rival, call in self.calls.items() if not self.wrong[rival]}
            self._times, self.undisturbed = measure(right, clock, **budget)
        return self._times
