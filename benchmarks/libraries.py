"""What fuse buys in the libraries' own models: each of ViT-Ti's size, unfused beside fused, on a CPU.

    python benchmarks/libraries.py              a table in Markdown; some minutes on two cores

Models are built from their configurations, with random weights; those of a library that is not installed are named.
The two take turns in one process; figures are medians.
"""

import argparse
import copy
import sys

import torch
from vitriton.vit import fuse
from vitriton.vit.measure import quartiles
from vitriton.vit.timing import CPUClock, measure

SIZES = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 224, "patch_size": 16}


def timm_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224")


def transformers(model, config, **options):
    def build():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**SIZES, **options))

    return build


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)


def open_clip_vit():
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(224, 16, width=192, layers=12, heads=3, mlp_ratio=4.0, output_dim=512)


def vit_pytorch(model):
    def build():
        import vit_pytorch

        sizes = {"image_size": 224, "patch_size": 16, "num_classes": 1000, "dim": 192, "depth": 12, "mlp_dim": 768}
        return getattr(vit_pytorch, model)(**sizes, heads=3, dim_head=64)

    return build


MODELS = {
    "timm `VisionTransformer`": timm_vit,
    "transformers ViT": transformers("ViTForImageClassification", "ViTConfig", intermediate_size=768),
    "transformers DINOv2": transformers("Dinov2Model", "Dinov2Config"),
    "transformers DINOv3": transformers("DINOv3ViTModel", "DINOv3ViTConfig", intermediate_size=768),
    "transformers CLIP": transformers("CLIPVisionModel", "CLIPVisionConfig", intermediate_size=768),
    "transformers SigLIP": transformers("SiglipVisionModel", "SiglipVisionConfig", intermediate_size=768),
    "torchvision `VisionTransformer`": torchvision_vit,
    "open_clip `VisionTransformer`": open_clip_vit,
    "vit-pytorch `ViT`": vit_pytorch("ViT"),
    "vit-pytorch `SimpleViT`": vit_pytorch("SimpleViT"),
}


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def infer(model, images):
    with torch.inference_mode():
        model(images)


def train(model, images):
    model.zero_grad()
    tensor_of(model(images)).float().square().mean().backward()


def cell(step, plain, fused, images, seconds):
    """The two medians in ms and their ratio."""
    calls = {"plain": lambda: step(plain, images), "fused": lambda: step(fused, images)}
    for call in calls.values():
        for _ in range(5):  # the choice of products, copies of weights
            call()
    times, undisturbed = measure(calls, CPUClock(), seconds=seconds)
    before, after = (1000 * quartiles(times[name])[1] for name in calls)
    return f"{before:.1f} to {after:.1f} | {before / after:.2f}x" + ("" if undisturbed else " (disturbed)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of calls for each cell (default: %(default)s)")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    print(f"ViT-Ti's size, {args.images} images of 224 px, {threads}; ms, unfused to fused\n")
    print("| model | fp32 | | bf16 | | fp32 training step | |\n|---|---|---|---|---|---|---|")
    for name, build in MODELS.items():
        try:
            plain = build()
        except ImportError as error:
            print(f"| {name} | not installed: {error} |", flush=True)
            continue
        fused = copy.deepcopy(plain)
        fuse(fused)
        images = torch.randn(args.images, 3, 224, 224)
        cells = [cell(train, plain.train(), fused.train(), images, args.seconds)]
        plain.eval(), fused.eval()
        cells.insert(0, cell(infer, plain, fused, images, args.seconds))
        plain.bfloat16(), fused.bfloat16()
        cells.insert(1, cell(infer, plain, fused, images.bfloat16(), args.seconds))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
