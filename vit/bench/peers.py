"""How the plain ViT is handed to others: timm, torch.compile, ONNX Runtime and OpenVINO, with the same weights.

Each takes (model, images), the plain ViT (reference.py) and images of the batch it is to run, and gives a callable of
such images that returns logits. Nothing is imported before it is asked for.
"""

import copy
import logging
import tempfile
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import metadata
from io import StringIO
from pathlib import Path

import torch
from torch import nn

__all__ = ["compiled", "compiled_max", "onnxruntime", "openvino", "timm", "version"]


def version(package):
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# timm


def timm(model, images):
    """timm's VisionTransformer with the plain model's weights: the same numbers."""
    from timm.models.vision_transformer import VisionTransformer

    first, mlp = model.transformer.layers[0][0].fn, model.transformer.layers[0][1].fn
    dim = model.cls_token.shape[-1]
    patch = int((model.to_patch_embedding[1].in_features // 3) ** 0.5)
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=model.image_shape[1:],
            patch_size=patch,
            num_classes=model.mlp_head[1].out_features,
            embed_dim=dim,
            depth=len(model.transformer.layers),
            num_heads=first.heads,
            mlp_ratio=mlp.net[0].out_features / dim,
            qkv_bias=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
    state = {name: nn.Parameter(t.detach()) for name, t in timm_state(model, patch)}
    vit.load_state_dict(state, assign=True)
    vit.requires_grad_(model.cls_token.requires_grad)
    vit.in_plain_order = [vit.get_parameter(name) for name in state]
    return vit.eval()


def timm_state(model, patch):
    """(timm's name, tensor) of each parameter, in the order of the plain model's parameters."""
    own = dict(model.named_parameters())
    yield "pos_embed", own["pos_embedding"]
    yield "cls_token", own["cls_token"]
    # (dim, p1 p2 c) -> (dim, c, p1, p2)
    projection = own["to_patch_embedding.1.weight"].detach().unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    yield "patch_embed.proj.weight", projection.contiguous()
    yield "patch_embed.proj.bias", own["to_patch_embedding.1.bias"]
    for i in range(len(model.transformer.layers)):
        for theirs, ours in (
            ("norm1.weight", "0.norm.weight"),
            ("norm1.bias", "0.norm.bias"),
            ("attn.qkv.weight", "0.fn.to_qkv.weight"),
            ("attn.proj.weight", "0.fn.to_out.0.weight"),
            ("attn.proj.bias", "0.fn.to_out.0.bias"),
            ("norm2.weight", "1.norm.weight"),
            ("norm2.bias", "1.norm.bias"),
            ("mlp.fc1.weight", "1.fn.net.0.weight"),
            ("mlp.fc1.bias", "1.fn.net.0.bias"),
            ("mlp.fc2.weight", "1.fn.net.3.weight"),
            ("mlp.fc2.bias", "1.fn.net.3.bias"),
        ):
            yield f"blocks.{i}.{theirs}", own[f"transformer.layers.{i}.{ours}"]
    for theirs, ours in (("norm", "mlp_head.0"), ("head", "mlp_head.1")):
        yield f"{theirs}.weight", own[f"{ours}.weight"]
        yield f"{theirs}.bias", own[f"{ours}.bias"]


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def compiled(model, images):
    """torch.compile of the plain model; for inference on a CPU its weights are frozen (inductor's freezing)."""
    return _compiled(model, images, freezing=images.device.type == "cpu" and not torch.is_grad_enabled())


def compiled_max(model, images):
    """The same with mode="max-autotune": products are tuned and, on a GPU, launched as a CUDA graph."""
    return _compiled(model, images, mode="max-autotune", freezing=not torch.is_grad_enabled())


def _compiled(model, images, *, mode=None, freezing):
    import torch._inductor.config as inductor

    torch.compiler.reset()  # or what was compiled for other shapes counts against the limit of recompilations
    with warnings.catch_warnings(), inductor.patch(freezing=freezing):
        warnings.simplefilter("ignore")
        model.compile(fullgraph=True, dynamic=False, mode=mode)
        model(images)  # which compiles it, while freezing is what was asked for
    return model


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime and OpenVINO, on a CPU


@contextmanager
def onnx_file(model, images):
    """The path of the model, exported to ONNX for a batch of this size."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            path = str(Path(folder, "vit.onnx"))
            program = torch.onnx.export(model, (images,), dynamo=True, optimize=True, verbose=False)
            program.save(path, external_data=True)
            yield path
    finally:
        log.setLevel(level)


def onnxruntime(model, images):
    """The exported model in ONNX Runtime's CPU provider, with as many threads as PyTorch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    with onnx_file(model, images) as path:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model, images):
    """The exported model in OpenVINO, in the precision of the images (its inference_precision hint)."""
    import openvino as ov

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[images.dtype]
    model, example = copy.deepcopy(model).float(), images.float()  # a copy: its parameters are others' too
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with onnx_file(model, example) as path:
        network = ov.Core().compile_model(ov.Core().read_model(path), "CPU", config)
    request = network.create_infer_request()

    def infer(images):
        return torch.from_numpy(request.infer([images.float().numpy()], share_inputs=True)[0])

    return infer
