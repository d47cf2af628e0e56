"""A race: one question, asked of every implementation that answers it; each answer is checked before it is timed.

A `Question` is its inputs and its `Rival`s by name (functions.py). A `Race` asks it about tensors of one shape, dtype
and device. Who is missing or cannot take part says why; who raises or answers wrongly is reported, and never timed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ...kernels import reference, use_backend
from ..measure import gpu, peak_memory
from ..timing import CPUClock, GPUClock, measure
from .cost import count_flops
from .sizes import Shape

__all__ = ["Case", "Contest", "Question", "Race", "Rival"]

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rival:
    """An implementation, and what it takes to take part; `compiled`: by torch.compile, for each case anew."""

    function: Callable
    package: str = ""  # that must be installed, by its name on PyPI; its module has the same, with _ for -
    devices: tuple = ("cpu", "gpu")
    backward: tuple = ("cpu", "gpu")  # the devices on which it has a gradient
    dtypes: tuple = ()  # any, if empty
    compiled: bool = False

    def missing(self):
        """Why it cannot be had here, or ""."""
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed"
        return ""

    def why_not(self, dtype, device, backward):
        """Why it takes no part in a case, whatever is installed, or ""."""
        if device not in self.devices:
            return f"is for a {' or '.join(self.devices).upper()}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' and '.join(str(d)[6:] for d in self.dtypes)} only"
        if backward and device not in self.backward:
            return f"has no gradient on a {device.upper()}"
        return ""

    def ready(self):
        return torch.compile(self.function, fullgraph=True, dynamic=False) if self.compiled else self.function


def call(rival, shape, inputs):
    """The rival is a function of the inputs, in their order."""
    return lambda: rival(*inputs.values())


@dataclass(frozen=True, eq=False)
class Question:
    """`inputs(shape)` gives named fp32 tensors on the CPU; `rivals` has a "plain" one, which says what is right.

    A rival is a Rival, or just its function. `bind(rival, shape, inputs)` gives the function of no arguments that
    computes the answer, one tensor; what it does before is not timed.
    """

    name: str
    inputs: Callable[[Shape], dict[str, Tensor]]
    rivals: dict[str, Callable | Rival]
    bind: Callable[[Callable, Shape, dict[str, Tensor]], Callable[[], Tensor]] = call

    def rival(self, name):
        rival = self.rivals[name]
        return rival if isinstance(rival, Rival) else Rival(rival)


@dataclass(frozen=True, eq=False)
class Case:
    """A question about tensors of one shape, dtype and device ("cpu" or "gpu"), forward or forward and backward."""

    question: Question
    shape: Shape
    dtype: torch.dtype
    device: str
    backward: bool

    def params(self):
        """What tells this case from others, for JSON and for --benchmark-group-by=param:NAME."""
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

    def why_not(self, rival):
        return self.question.rival(rival).why_not(self.dtype, self.device, self.backward)

    def flops(self):
        """Floating-point operations by the functions' own formulas (kernels/ops.py); None without a "vitriton"."""
        if "vitriton" not in self.question.rivals:
            return None
        with FakeTensorMode(), use_backend("auto"):
            inputs = {n: t.to(self.dtype) for n, t in self.question.inputs(self.shape).items()}
            inputs = {n: nn.Parameter(t, requires_grad=self.backward) for n, t in inputs.items()}
            forward = self.question.bind(self.question.rival("vitriton").function, self.shape, inputs)

            def step():
                output = forward()
                if self.backward:
                    torch.autograd.grad(output, list(inputs.values()), torch.empty_like(output))

            with torch.set_grad_enabled(self.backward):
                return count_flops(step)


class Contest:
    """What a race of functions and one of models share: `calls` {rival: function of no arguments -> answers}, each
    answer a tensor of `names`; those who raise (`raised`) or answer wrongly (`wrong`, which holds both) are not timed.
    """

    def __init__(self, device, dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.calls, self.wrong, self.raised = {}, {}, set()
        self._times = self.undisturbed = None

    def enter(self, rival, prepare, judge):
        """Let `prepare()` give the rival's call, and `judge(answers)` what is wrong with them, in words, or ""."""
        try:
            self.calls[rival] = prepare()
            self.wrong[rival] = judge(self.calls[rival]())
        except Exception as error:  # whatever it raises, the others can be timed
            self.calls.pop(rival, None)
            self.raised.add(rival)
            lines = str(error).strip().splitlines() or [""]
            self.wrong[rival] = f"{type(error).__name__}: {lines[0]}"

    def faults(self, names, answers, base, gold, k=2):
        """What the tolerance rule finds wrong, a line for each answer; k is that of the first, the others have 3."""
        faults = []
        for name, *tensors in zip(names, answers, base, gold, strict=False):
            error = reference.compare(name, *tensors, k=k if name == names[0] else 3)
            if not error:
                faults.append(str(error))
        return "\n".join(faults)

    def right(self):
        """{rival: call} of those that answer rightly."""
        return {rival: call for rival, call in self.calls.items() if not self.wrong[rival]}

    def clock(self):
        return CPUClock() if self.device.type == "cpu" else GPUClock(self.device)

    def times(self, **budget):
        """{rival: [seconds, ...]} of those that answer rightly, measured in turns at the first call of this method."""
        if self._times is None:
            self._times, self.undisturbed = measure(self.right(), self.clock(), **budget)
        return self._times

    def peaks(self):
        """{rival: bytes} of those that answer rightly: what PyTorch's allocator held at most during a call."""
        return {rival: peak_memory(call, self.device) for rival, call in self.right().items()}


class Race(Contest):
    """`rivals` (names) in one `case`."""

    def __init__(self, case, rivals):
        super().__init__(gpu() if case.device == "gpu" else "cpu", case.dtype)
        self.case = case
        torch.manual_seed(0)
        if any(case.question.rival(rival).compiled for rival in rivals):
            torch.compiler.reset()  # or torch.compile runs a function in silence as it is, after eight shapes
        inputs = {name: t.to(self.device, case.dtype) for name, t in case.question.inputs(case.shape).items()}
        self.names = ("output", *(f"gradient of {name}" for name in inputs))
        self.grad = None
        plain = case.question.rival("plain").function
        if case.backward:
            output = case.question.bind(plain, case.shape, inputs)()
            self.grad = torch.randn(output.shape).to(output)
        self.gold = self.call(plain, {name: t.double() for name, t in inputs.items()})()
        self.base = self.call(plain, inputs)()
        self.input_bytes, self.output_bytes = sum(t.nbytes for t in inputs.values()), self.base[0].nbytes

        for name in rivals:
            rival = case.question.rival(name)
            if why_not := rival.missing() or rival.why_not(case.dtype, case.device, case.backward):
                self.wrong[name] = why_not
                self.raised.add(name)
            elif name == "plain":  # what the others are held to
                self.calls[name], self.wrong[name] = self.call(plain, inputs), ""
            else:
                self.enter(name, lambda rival=rival: self.call(rival.ready(), inputs), self.judge)

    def judge(self, answers):
        """What is wrong with them, in words, or ""."""
        for name, answer in zip(self.names, answers, strict=False):
            if answer.dtype != self.dtype:
                return f"{name}: has dtype {answer.dtype}, asked was {self.dtype}"
        try:
            return self.faults(self.names, answers, self.base, self.gold)
        except ValueError as error:  # of another shape
            return str(error)

    def call(self, function, inputs):
        """The function of no arguments that is timed: the output and, where asked for, each input's gradient."""
        inputs = {name: nn.Parameter(t, requires_grad=self.case.backward) for name, t in inputs.items()}
        forward = self.case.question.bind(function, self.case.shape, inputs)
        if not self.case.backward:
            return lambda: (forward(),)
        inputs = tuple(inputs.values())
        grad = self.grad.to(inputs[0].dtype)

        def forward_backward():
            output = forward()
            return output, *torch.autograd.grad(output, inputs, grad)

        return forward_backward

    def traffic(self):
        """Bytes that must move if every tensor is read or written once: inputs and output; with a backward pass the
        inputs, the output and its gradient again, and the gradients of the inputs."""
        moved = self.input_bytes + self.output_bytes
        return moved if not self.case.backward else moved + 2 * self.input_bytes + 2 * self.output_bytes
