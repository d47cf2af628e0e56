"""The `vitriton` command: the arguments of each subcommand, and what its exit codes mean.

To add a subcommand, write a function like `add_demo` here, and put it in SUBCOMMANDS. Its `run` names the module that
does the work, which is imported only then, and the function in it that takes the parsed arguments and returns an exit
code.
"""

import argparse
import importlib
import os
import sys

from ..kernels.choice import check_environment
from .arguments import (
    add_subcommand,
    at_least_0,
    device,
    model_name,
    not_negative,
    positive,
    seed,
    share,
    share_or_folder,
)
from .console import Problem, version


def main(argv=None):
    """Run `vitriton` with the arguments `argv` (those of the process by default) and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        _check_environment()
        module, _, function = args.run.partition(":")
        code = getattr(importlib.import_module(f".{module}", __package__), function)(args)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code
    except Problem as problem:
        print(f"vitriton {args.subcommand}: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nvitriton {args.subcommand}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vitriton check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 141


def _check_environment():
    try:
        check_environment()
    except ValueError as error:
        raise Problem(str(error)) from error


def command():
    """What a shell starts: main, and the end of the process."""
    code = main()
    from .parallel import leave

    leave(code)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="vitriton",
        description="Fused kernels for Vision Transformers: see them work, and prove that they are right, on this "
        "machine.",
        epilog="Start with `vitriton demo`. `vitriton SUBCOMMAND --help` says everything about a subcommand.",
    )
    parser.add_argument("--version", action="version", version=f"vitriton {version()}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for add in SUBCOMMANDS:
        add(subparsers)
    return parser


def add_demo(subparsers):
    parser = add_subcommand(
        subparsers,
        "demo",
        summary="train a small ViT on real images, fuse it, and compare: answers, time, memory",
        description="""\
Train a small plain ViT on scikit-learn's digits (1,797 real images of 8x8 pixels, part of the package, nothing is
downloaded), to at least 97% of right answers on images that it has not seen. Then fuse it, and show
  - that its predictions are the same, and how far logits and gradients are from the plain model's, beside the
    rounding error that the plain model itself has;
  - time and peak memory of ViT-Ti, ViT-S and ViT-B at 224 px, plain and fused, on this machine, whoever wins;
  - a picture of test images with their predictions and where the CLS token looks.
It takes one to two minutes on two cores. Images, split and seed are fixed: the same machine gives the same model.""",
        examples="""\
examples:
  vitriton demo                           the whole demo; writes vitriton-demo.png
  vitriton demo --quick                   ten seconds: trains hardly at all, so accuracy is not judged
  vitriton demo --device cuda:1           on the second GPU
  vitriton demo --out a.png --json a.json the picture and all numbers in files of your choice""",
        zero="the model reached 97%, and the fused model agrees with the plain one everywhere",
        one="it did not (the text says which)",
        run="demo:demo",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="vitriton-demo.png",
        help="the picture; its ending chooses the format, such as png, svg or pdf (default: %(default)s)",
    )
    device(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of weights, order and shifts of images (default: 0)")
    parser.add_argument("--epochs", type=positive(int), metavar="N", help="how often training sees each image")
    parser.add_argument(
        "--seconds",
        type=positive(float),
        metavar="S",
        help="end training after S seconds, if that is sooner; the learning rate follows the clock",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs and one small benchmark; no accuracy is asked"
    )


def add_train(subparsers):
    parser = add_subcommand(
        subparsers,
        "train",
        summary="train a ViT on your own pictures, fused by default, on one device or many",
        description="""\
Train a Vision Transformer on DATA: a folder that has a folder of pictures for each class, or `digits`, scikit-learn's.
AdamW, a cosine schedule behind a warm-up, random crops and mirror images, label smoothing. A fifth of each class is
held out, always the same pictures. Into the folder --out go
  checkpoint.pt   after each epoch, all that --resume needs to go on; whole even if the training is killed or the disk
                  is full. On a CPU the rest of the training is what it would have been, to the last bit
  model.pt        at the end, the state_dict of the plain model and the names of the classes; to use it:
                  from vitriton.vit.checkpoint import load_trained; model, classes = load_trained("DIR/model.pt")
  curve.png       losses and right answers
A picture that cannot be read is named and skipped, and the end says how many were.

Under torchrun the same training is shared among the processes that it starts: the same batches, and the same losses up
to rounding, whatever their number. It has been tested on CPUs only.""",
        examples="""\
examples:
  vitriton train digits                                       a minute on one core
  vitriton train photos --model ti --image-size 64 --patch-size 8 --epochs 100
  vitriton train photos --model timm:vit_tiny_patch16_224 --plain --out plain
  vitriton train photos --resume                              go on after a kill, with the same options
  torchrun --nproc_per_node 2 -m vitriton.vit.cli train photos --parallel fsdp""",
        zero="trained, and all was saved",
        one="trained, and the end could not be saved",
        run="train:train",
    )
    count, size = positive(int), {"type": positive(int), "metavar": "N"}
    parser.add_argument("data", metavar="DATA", help="a folder of class folders, or digits")
    parser.add_argument("--out", default="vitriton-train", metavar="DIR", help="the folder to write to (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        type=model_name,
        help="tiny (the demo's; for digits the default), ti (default), s, b, l, h, or a model of timm's: timm:NAME",
    )
    model.add_argument("--plain", dest="fused", action="store_false", help="do not fuse it, for comparison")
    model.add_argument("--image-size", **size, help="pixels, a multiple of the patch's (default: 224; digits: 8)")
    model.add_argument("--patch-size", **size, help="pixels (default: the model's)")
    for name in ("dim", "depth", "heads"):
        model.add_argument(f"--{name}", **size, help="(default: the model's)")
    model.add_argument("--dropout", type=share, default=0.0, metavar="P", help="in the blocks (default: %(default)s)")
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=count, default=40, metavar="N", help="(default: %(default)s)")
    how.add_argument("--batch", type=count, default=64, metavar="N", help="pictures in a step (default: %(default)s)")
    how.add_argument("--accumulate", type=count, default=1, metavar="N", help="of N parts each (default: %(default)s)")
    how.add_argument(
        "--lr",
        type=positive(float),
        default=1e-3,
        metavar="X",
        help="the highest rate (default: %(default)s)",
    )
    how.add_argument("--warm-up", type=share, default=0.1, metavar="X", help="of all steps (default: %(default)s)")
    how.add_argument("--weight-decay", type=not_negative, default=0.05, metavar="X", help="(default: %(default)s)")
    how.add_argument("--label-smoothing", type=share, default=0.1, metavar="X", help="(default: %(default)s)")
    how.add_argument("--no-augment", dest="augment", action="store_false", help="show every picture as it is")
    how.add_argument("--no-flip", dest="flip", action="store_false", help="make no mirror images (of text, say)")
    how.add_argument(
        "--held-out",
        type=share_or_folder,
        default=0.2,
        metavar="X",
        help="share of each class that is held out, or a folder with other pictures of the same classes (%(default)s)",
    )
    how.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of autocast (default: bf16; on a CPU fp32)")
    how.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights, order, crops (%(default)s)")
    how.add_argument("--save-every", **size, help="steps between checkpoints, besides one after each epoch")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or xpu (default: %(default)s)")
    where.add_argument("--workers", type=at_least_0, metavar="N", help="that read pictures (default: up to 4)")
    where.add_argument("--parallel", choices=("ddp", "fsdp"), help="under torchrun (default: ddp)")


def add_check(subparsers):
    parser = add_subcommand(
        subparsers,
        "check",
        summary="prove every function and module right on this machine",
        description="""\
Run every function (attention, qkv_attention, layer_norm_linear), every module and a fused ViT, forward and backward,
in every implementation that can run here and every dtype that it takes:
  native       PyTorch's own fused operators, on the CPU, and on the GPU if there is one
  gpu          the Triton kernels, on the GPU
  interpreter  the Triton kernels on the CPU, in Triton's interpreter, in a process of their own with
               TRITON_INTERPRET=1: slow, small sizes, but the same source as on a GPU
Each output and each gradient is compared with the plain formula in float64. It may be as far from it as twice (for a
gradient three times) what the plain formula in the same dtype is, and its rms error 1.5 times; float64 itself as far
as 1e-12 of the largest value. A line is one case, and tells which of its results came nearest to the limit.
What cannot run here is listed with the reason.

With --model a whole model is checked instead: it is built with random weights (nothing is downloaded) and fused, and
its outputs and gradients are held against its own before, layer by layer and as a whole, in float32 and bfloat16:
  timm:NAME           as timm.create_model takes it
  torchvision:NAME    as torchvision.models.get_model takes it
  open_clip:NAME      the vision tower of open_clip.create_model
  transformers:TYPE   vit, deit, dinov2, dinov3_vit, clip_vision_model, siglip_vision_model, ...; or a folder, written
                      with a slash or a dot (./model), of a saved model, of which the config alone is read
  vitriton:NAME       ti, s, b, l or h""",
        examples="""\
examples:
  vitriton check                          everything that can run here, a minute or two
  vitriton check --only native            a few seconds
  vitriton check --json check.json        every error and every limit, for programs
  vitriton check --model timm:vit_small_patch16_224""",
        zero="everything that ran is right",
        one="something is wrong: its line starts with FAIL",
        run="check:check",
    )
    parser.add_argument(
        "--only",
        choices=("native", "gpu", "interpreter"),
        action="append",
        help="check this implementation; may be given more than once (default: all that can run)",
    )
    parser.add_argument("--model", metavar="NAME", help="check a whole model: see above")
    parser.add_argument("--seed", type=seed, default=0, help="of the random inputs (default: 0)")


def add_doctor(subparsers):
    add_subcommand(
        subparsers,
        "doctor",
        summary="what is installed, what runs where and why, and what is in the way",
        description="""\
Show the versions of Python and of the packages that matter, the optional extras that are there or missing, the CPU
and the GPUs, which implementation each function takes on each device for each dtype and why, whether other packages
of the same name are in the way, and the folders where compiled kernels are kept.""",
        examples="""\
examples:
  vitriton doctor                         paste its output into a bug report
  vitriton doctor --json                  the same as JSON""",
        zero="nothing is broken (missing extras are not)",
        one="something is broken: a line that starts with BROKEN says what and what to do",
        run="doctor:doctor",
    )


def add_compile(subparsers):
    parser = add_subcommand(
        subparsers,
        "compile",
        summary="compile every kernel for every chip, and count its machine code; needs no GPU",
        description="""\
Compile every kernel as its launcher would launch it, for chips that need not be there, and count the machine code:
registers, spills, stack, shared memory, and of the hot loop the issue slots and the cycles of the pipe that binds, per
1024 (query, key) pairs or 1024 multiply-adds; of attention's forward pass also the warp instructions that are executed
per needed pair. Nothing is timed. The worst come first. What was compiled once is kept in Triton's cache folder.""",
        examples="""\
examples:
  vitriton compile --arch sm_90 --dtype bf16 --head-dim 64       a few dozen kernels, about a minute
  vitriton compile --json report.json                            the whole table, 15 to 25 minutes the first time
  vitriton compile --arch sm_80 --kernel attention_fwd --head-dim 64 --dump code""",
        zero="everything compiles, and fits into its chip",
        one="something does not: it stands first in the table, or on a line that starts with FAIL",
        run="compile:compile_kernels",
    )
    for option, kind, what in (
        ("--arch", str, "a chip: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, gfx1100"),
        ("--kernel", str, "a kernel, as the table names it: attention_fwd, layer_norm_linear_dx, ..."),
        ("--dtype", str, "bf16, fp16, fp32"),
        ("--head-dim", int, "a head dim; leaves the kernels of LayerNorm + Linear out"),
    ):
        parser.add_argument(option, type=kind, action="append", default=[], help=f"{what}; may be given more than once")
    parser.add_argument("--full", action="store_true", help="every variant for every dtype, not for bf16 alone")
    parser.add_argument("--dump", metavar="DIR", help="write assembly, machine code and binaries to DIR")
    parser.add_argument("--accept", metavar="FILE", help="write the costs into FILE, such as tests/budget.json")
    parser.add_argument("--jobs", type=positive(int), default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rows", type=at_least_0, default=40, help="of the table; 0 shows all (default: %(default)s)")


def add_look(subparsers):
    parser = add_subcommand(
        subparsers,
        "look",
        summary="where a model looks: its attention as a picture over a photograph",
        description="""\
Show a photograph to a Vision Transformer, fused, and write a picture of its attention over the photograph, by
  --method cls      how much the CLS token, which gathers what the model will answer, attends to each place: by default
                    in the last layer, each head and their mean. Only its row of the map is computed;
  --method rollout  how much of it comes from each place through all layers up to one (attention rollout, Abnar and
                    Zuidema 2020), by default a quarter, half, three quarters and all of them.
Maps are exact: softmax of the scores that the model's own q and k make.
The model is
  timm:NAME         one of timm's Vision Transformers, with its pretrained weights, which are loaded over the network
                    once, with --checkpoint FILE, or with --random-weights;
  ti, s, b, l, h    our preset of that size with --checkpoint FILE (a state_dict), for images scaled to -1 to 1;
  FILE              what `vitriton train` left in a file, such as vitriton-train/model.pt;
  demo              a small one, trained on scikit-learn's handwritten digits first, in half a minute.
The middle of the photograph is cut out in the shape that the model takes. Layers and heads count from 0, and from the
end if negative.""",
        examples="""\
examples:
  vitriton look photo.jpg --model timm:vit_small_patch16_224
  vitriton look photo.jpg --model timm:deit_base_patch16_224 --method rollout --head-fusion max --discard-ratio 0.9
  vitriton look photo.jpg --model timm:vit_base_patch16_224 --layers 3,7,11 --heads 0:4 --out maps.pdf
  vitriton look sample:china --model timm:vit_tiny_patch16_224 --random-weights       no network needed
  vitriton look sample:7 --model demo                                                 nor here
  vitriton look photo.jpg --model b --checkpoint mine.pt --json maps.json""",
        zero="the picture is written",
        one="never: what is not written could not be done",
        run="look_command:look_at",
    )
    parser.add_argument(
        "photo",
        metavar="PHOTO",
        help="a file that Pillow can read, or sample:china, sample:flower, or one of the digits sample:0 to sample:9",
    )
    parser.add_argument(
        "--model", metavar="NAME", required=True, help="timm:NAME, ti, s, b, l, h, FILE, demo: see above"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="the weights to load")
    parser.add_argument("--random-weights", action="store_true", help="an untrained model: no weights are loaded")
    parser.add_argument("--method", choices=("cls", "rollout"), default="cls", help="see above (default: %(default)s)")
    parser.add_argument("--layers", metavar="LIST", help="such as 0,5 or 2:5 (2, 3 and 4) or all; --layers=-2,-1")
    parser.add_argument("--heads", metavar="LIST", help="likewise; in a rollout, those that are fused (default: all)")
    parser.add_argument(
        "--head-fusion",
        choices=("mean", "max", "min"),
        default="mean",
        help="how a rollout makes one map of the heads' (default: %(default)s)",
    )
    parser.add_argument(
        "--discard-ratio",
        type=share,
        default=0.0,
        metavar="R",
        help="the share of each layer's weights, the smallest, that a rollout leaves out (default: 0)",
    )
    parser.add_argument("--size", metavar="N", help="pixels that the model takes, N or HEIGHTxWIDTH, if not its own")
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="run the plain blocks: the same maps")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="vitriton-look.png",
        help="the picture; its ending chooses the format, such as png, svg or pdf (default: %(default)s)",
    )
    device(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of random weights and the demo's training (default: 0)")


def add_bench(subparsers):
    parser = add_subcommand(
        subparsers,
        "bench",
        summary="speed and memory of whole ViTs and of single functions, beside other implementations",
        description="""\
Time whole ViTs, or single functions, beside every other implementation that is installed: the plain model, PyTorch's
SDPA, timm, torch.compile, ONNX Runtime and OpenVINO run the same weights on the same images, in this process, in turns.
Each answer is held to the plain formula in float64 first: who answers wrongly is reported, and not timed. What is not
installed, or does not run here, is named with the reason.
Without arguments: ViT-Ti (on a GPU ViT-B), and attention against the number of tokens, in some minutes, with pictures.
Lists are written with commas.""",
        examples="""\
examples:
  vitriton bench                                                a table and pictures, in vitriton-bench/
  vitriton bench --model vit_b16 --batch 1,8 --dtype bf16 --compare sdpa,compile,timm,onnxruntime,openvino
  vitriton bench --model vit_s16 --batch 16 --step train --compare compile,timm
  vitriton bench --function attention --model b --tokens 197,1025 --compare sdpa
  vitriton bench --model ti --compare timm:ghostnet_100         another network at equal input
  vitriton bench --cost                                         parameters, operations and memory, by counting
  vitriton bench --model b --json now.json --compare all,old.json      what became slower than the noise""",
        zero="everything was measured, and vitriton's answers are right",
        one="an answer of vitriton's is wrong, or it became slower than in the run given to --compare",
        run="bench.run:bench",
    )
    parser.add_argument("--model", metavar="LIST", help="sizes: ti, s, b, l, h, so400m, g, as in vit_b16 or vit_h14")
    parser.add_argument(
        "--function",
        metavar="LIST",
        help="functions, instead of whole models: attention, qkv_attention, layer_norm_linear, layer_norm_linear_gelu, "
        "block, or all",
    )
    parser.add_argument("--batch", metavar="LIST", help="images at a time (default: 1, on a GPU 64)")
    parser.add_argument("--tokens", metavar="LIST", help="for functions (default: 50,197,257,577,1025)")
    parser.add_argument(
        "--image-size", type=positive(int), default=224, metavar="PX", help="of models (default: %(default)s)"
    )
    parser.add_argument("--dtype", metavar="LIST", help="fp32, bf16, fp16 (default: fp32,bf16, on a GPU bf16)")
    parser.add_argument(
        "--step",
        choices=("forward", "train", "both"),
        default="forward",
        help="inference, or forward, loss and all gradients (in half precision under autocast), or both",
    )
    parser.add_argument(
        "--compare",
        metavar="LIST",
        help="whom to run beside vitriton and plain: sdpa, timm, compile, compile-max, onnxruntime, openvino, "
        "timm:NAME, of functions also flexattention, flash-attn, xformers; or all (default). A file of --json: "
        "say what became slower than in that run",
    )
    device(parser)
    parser.add_argument(
        "--seconds", type=positive(float), default=2.0, metavar="S", help="of calls for each rival (default: 2)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write a line for each rival to FILE")
    parser.add_argument(
        "--plot",
        metavar="DIR",
        help="the folder of the pictures (default: vitriton-bench, if matplotlib is installed; '' draws none)",
    )
    parser.add_argument(
        "--cost", action="store_true", help="count, and measure nothing; --model, --batch, --dtype hold"
    )


def add_tune(subparsers):
    parser = add_subcommand(
        subparsers,
        "tune",
        summary="on a GPU: find the fastest tiles of each kernel for your shapes, and keep them",
        description="""\
Measure, on this GPU and for the shapes given, the tiles that each kernel can run with, from those of the table uphill,
and LayerNorm + Linear in one kernel beside PyTorch's two. Answers are checked before anything is timed. What is faster
by more than the noise is kept in a file for this card, this version of Triton and this table, in VITRITON_CACHE_DIR or
the user's cache folder; every later launch on this card takes it. To forget it, remove the file (`vitriton doctor`
says where it is). Lists are written with commas.""",
        examples="""\
examples:
  vitriton tune                                            ViT-B at 224 px, batch 64, bf16, inference
  vitriton tune --model s,b --batch 32,256 --step train    for training
  vitriton tune --tokens 577 --dtype fp16 --dry-run        show what it would gain, keep nothing""",
        zero="done; every tile that ran answers rightly",
        one="some tiles answer wrongly: they are named, were not timed, and are not kept",
        run="tune:tune",
    )
    parser.add_argument("--model", metavar="LIST", default="b", help="sizes: ti, s, b, l, h, so400m, g (default: b)")
    parser.add_argument("--batch", metavar="LIST", default="64", help="images at a time (default: 64)")
    parser.add_argument("--tokens", metavar="LIST", default="197", help="of an image, with CLS (default: 197)")
    parser.add_argument("--dtype", metavar="LIST", default="bf16", help="bf16, fp16, fp32 (default: bf16)")
    parser.add_argument("--step", choices=("forward", "train"), default="forward", help="train: the backward pass too")
    parser.add_argument("--most", type=positive(int), default=40, metavar="N", help="tiles to try for a kernel (40)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, xpu (default: the GPU)")
    parser.add_argument("--dry-run", action="store_true", help="keep nothing")


SUBCOMMANDS = (add_demo, add_train, add_look, add_check, add_doctor, add_bench, add_tune, add_compile)


if __name__ == "__main__":
    command()
