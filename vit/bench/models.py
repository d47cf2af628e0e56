"""A race of whole ViTs: the plain model, ours, and whoever can run the same weights on the same images.

Every model gets the plain one's weights, and its answers (logits; of a training step all gradients too) are held to the
plain one's in fp64 before anything is timed. A name like "timm:ghostnet_100" stands for another network at equal input:
it answers another question, so that its answers are not judged.
"""

import copy
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..fuse import fuse
from . import peers
from .cost import model_traffic, network_flops
from .functions import SDPAAttention
from .race import Contest
from .sizes import build

__all__ = ["PEERS", "ModelCase", "ModelRace", "missing_peers"]

OTHER = "timm:"
CHUNK = 8  # images at a time in fp64


class ModelCase(NamedTuple):
    """`batch` images of `image_size` pixels a side in a ViT of the size `model`; `training`: a step, or inference."""

    model: str
    patch_size: int
    image_size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    training: bool

    tokens = property(lambda self: (self.image_size // self.patch_size) ** 2 + 1)
    name = property(lambda self: f"ViT-{self.model.title()}/{self.patch_size}")
    what = property(lambda self: "training step" if self.training else "forward")

    def __str__(self):
        return f"{self.name}, {self.image_size} px, batch {self.batch}, {str(self.dtype)[6:]}, {self.what}"

    def params(self):
        return {
            "kind": "model",
            "name": self.name,
            "image_size": self.image_size,
            "tokens": self.tokens,
            "batch": self.batch,
            "dtype": str(self.dtype)[6:],
            "device": self.device.type,
            "what": self.what,
        }


class Peer(NamedTuple):
    """How a peer is made: `build(model, images)` takes the plain model (its own to change) and gives a callable of
    images; `packages` are what it needs; `training`: whether it is a module that autograd knows; `devices`: where its
    adapter here can run."""

    build: object
    packages: tuple = ()
    training: bool = True
    devices: tuple = ("cpu", "gpu")


def fused(model, images):
    fuse(model, strict=True)
    return model


def sdpa(model, images):
    for attention, _ in model.transformer.layers:
        attention.fn.__class__ = SDPAAttention
    return model


PEERS = {
    "vitriton": Peer(fused),
    "plain": Peer(lambda model, images: model),
    "sdpa": Peer(sdpa),
    "timm": Peer(peers.timm, ("timm",)),
    "compile": Peer(peers.compiled),
    "compile-max": Peer(peers.compiled_max, devices=("gpu",)),
    "onnxruntime": Peer(peers.onnxruntime, ("onnx", "onnxscript", "onnxruntime"), training=False, devices=("cpu",)),
    "openvino": Peer(peers.openvino, ("onnx", "onnxscript", "openvino"), training=False, devices=("cpu",)),
}


def timm_network(rival):
    import timm

    return timm.create_model(rival.removeprefix(OTHER)).eval()


def unknown_to_timm(rival):
    """Whether timm is installed and has no model of this name."""
    if not peers.version("timm"):
        return False
    import timm

    return not timm.is_model(rival.removeprefix(OTHER))


def missing_peers():
    """{peer: why it cannot be had here}."""
    found = {}
    for name, peer in PEERS.items():
        if absent := [package for package in peer.packages if not peers.version(package)]:
            found[name] = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    return found


class ModelRace(Contest):
    """`rivals` (names of PEERS, or "timm:NAME") in one ModelCase. Weights are fp32 in training, under autocast."""

    def __init__(self, case, rivals, progress=lambda rival: None):
        super().__init__(case.device, case.dtype)
        self.case = case
        self.autocast = case.training and case.dtype != torch.float32
        torch.manual_seed(0)
        self.model = build(case.model, patch_size=case.patch_size, image_size=case.image_size).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".norm." in name:  # its ones and zeros would hide errors
                    parameter.add_(0.1 * torch.randn_like(parameter))
        weights = torch.float32 if case.training else case.dtype
        self.model.to(case.device, weights).requires_grad_(case.training)
        images = torch.randn(case.batch, 3, case.image_size, case.image_size)
        self.images = images.to(case.device, weights)
        self.labels = torch.randint(1000, (case.batch,)).to(case.device)
        self.names = ("logits", "gradients") if case.training else ("logits",)

        progress("the answer in float64")
        gold = self.exact()
        base = tuple(t.detach() for t in self.step(self.model)())
        for rival in rivals:
            progress(rival)
            if why_not := self.why_not(rival):
                self.raised.add(rival)
                self.wrong[rival] = why_not
            elif rival == "plain":
                self.calls[rival], self.wrong[rival] = self.step(self.model), ""
            elif rival.startswith(OTHER):
                self.enter(rival, lambda rival=rival: self.step(self.other(rival)), lambda answers: "")
            else:
                self.enter(
                    rival, lambda rival=rival: self.prepare(rival), lambda answers: self.judge(answers, base, gold)
                )

    def why_not(self, rival):
        """Why a rival takes no part, or ""."""
        if rival.startswith(OTHER):
            return "" if peers.version("timm") else "timm is not installed"
        peer = PEERS[rival]
        if rival in (absent := missing_peers()):
            return absent[rival]
        if self.case.training and not peer.training:
            return "is for inference only"
        if ("cpu" if self.device.type == "cpu" else "gpu") not in peer.devices:
            return f"is here for a {peer.devices[0].upper()} only"
        return ""

    def prepare(self, rival):
        """The rival's call. Its parameters are the plain model's own, except where it must have another form."""
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        with torch.set_grad_enabled(self.case.training):
            return self.step(PEERS[rival].build(model, self.images))

    def other(self, rival):
        network = timm_network(rival).to(self.images.device, self.images.dtype)
        return network.requires_grad_(self.case.training)

    def step(self, model):
        """What is timed: logits, or forward, cross-entropy and all gradients."""
        if not self.case.training:

            def forward():
                with torch.no_grad():
                    return (model(self.images),)

            return forward
        parameters = getattr(model, "in_plain_order", None) or list(model.parameters())
        autocast = torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext()

        def training():
            with autocast:
                logits = model(self.images)
                loss = F.cross_entropy(logits, self.labels)
            return logits, *torch.autograd.grad(loss, parameters)

        return training

    def judge(self, answers, base, gold):
        # OpenVINO gives fp32; the gradient of timm's patch embedding is that of a convolution
        answers = [t.detach().to(b.dtype) for t, b in zip(answers, base, strict=True)]
        answers = [t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t for t in answers]
        return self.faults(self.names, self.joined(answers), self.joined(base), self.joined(gold))

    def joined(self, answers):
        """Of a training step, the logits (the rounding error of one number, the loss, is chance) and all gradients."""
        if not self.case.training:
            return answers
        return answers[0], torch.cat([g.flatten() for g in answers[1:]])

    def exact(self):
        """The answers of the plain model in fp64, a few images at a time."""
        model = copy.deepcopy(self.model).double()
        chunks = zip(self.images.double().split(CHUNK), self.labels.split(CHUNK), strict=True)
        if not self.case.training:
            with torch.no_grad():
                return (torch.cat([model(images) for images, _ in chunks]),)
        logits = []
        for images, labels in chunks:
            logits.append(model(images))
            (F.cross_entropy(logits[-1], labels, reduction="sum") / self.case.batch).backward()
        return torch.cat(logits).detach(), *(p.grad for p in model.parameters())

    def flops(self, rival="plain"):
        """Operations of the plain formulas, whatever a rival makes of them; of another network, its own."""
        case = self.case
        if rival.startswith(OTHER):
            return case.batch * network_flops(lambda: timm_network(rival), case.image_size, case.training)
        make = partial(build, case.model, patch_size=case.patch_size, image_size=case.image_size)
        return case.batch * network_flops(make, case.image_size, case.training)

    def traffic(self):
        """cost.model_traffic of the forward pass; None for a training step."""
        case = self.case
        if case.training:
            return None
        return model_traffic(case.model, case.batch, case.tokens, case.patch_size, case.dtype.itemsize)
