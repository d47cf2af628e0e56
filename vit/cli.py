"""The `vitriton` command: the arguments of each subcommand, and what its exit codes mean.

To add a subcommand, write a function like `add_demo` here, put it in SUBCOMMANDS, and import the module that does the
work inside the function that runs it. That module takes the parsed arguments and returns an exit code.
"""

import argparse
import os
import sys

from .console import Problem, version

EXIT_CODES = """\
exit codes:
  0    {zero}
  1    {one}
  2    it could not be done: a bad argument, a missing package, a file that cannot be written
  130  stopped with Ctrl-C
"""


def main(argv=None):
    """Run `vitriton` with the arguments `argv` (those of the process by default) and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
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
    parser = _add(
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
        run=_run_demo,
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="vitriton-demo.png",
        help="the picture; its ending chooses the format, such as png, svg or pdf (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, xpu; auto takes a GPU if there is one (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and shifts of images (default: 0)")
    parser.add_argument("--epochs", type=_positive(int), metavar="N", help="how often training sees each image")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help="end training after S seconds, if that is sooner; the learning rate follows the clock",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs and one small benchmark; no accuracy is asked"
    )


def add_check(subparsers):
    parser = _add(
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
What cannot run here is listed with the reason.""",
        examples="""\
examples:
  vitriton check                          everything that can run here, a minute or two
  vitriton check --only native            a few seconds
  vitriton check --json check.json        every error and every limit, for programs""",
        zero="everything that ran is right",
        one="something is wrong: its line starts with FAIL",
        run=_run_check,
    )
    parser.add_argument(
        "--only",
        choices=("native", "gpu", "interpreter"),
        action="append",
        help="check this implementation; may be given more than once (default: all that can run)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")


def add_doctor(subparsers):
    _add(
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
        run=_run_doctor,
    )


def add_compile(subparsers):
    parser = _add(
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
  vitriton compile --json report.json                            the whole table, tens of minutes the first time
  vitriton compile --arch sm_80 --kernel attention_fwd --head-dim 64 --dump code""",
        zero="everything compiles, and fits into its chip",
        one="something does not: it stands first in the table, or on a line that starts with FAIL",
        run=_run_compile,
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
    parser.add_argument("--jobs", type=_positive(int), default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rows", type=_at_least_0, default=40, help="of the table; 0 shows all (default: %(default)s)")


def add_bench(subparsers):
    parser = _add(
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
        run=_run_bench,
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
        "--image-size", type=_positive(int), default=224, metavar="PX", help="of models (default: %(default)s)"
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
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, xpu; auto takes a GPU if there is one (default: auto)"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), default=2.0, metavar="S", help="of calls for each rival (default: 2)"
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
    parser = _add(
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
        run=_run_tune,
    )
    parser.add_argument("--model", metavar="LIST", default="b", help="sizes: ti, s, b, l, h, so400m, g (default: b)")
    parser.add_argument("--batch", metavar="LIST", default="64", help="images at a time (default: 64)")
    parser.add_argument("--tokens", metavar="LIST", default="197", help="of an image, with CLS (default: 197)")
    parser.add_argument("--dtype", metavar="LIST", default="bf16", help="bf16, fp16, fp32 (default: bf16)")
    parser.add_argument("--step", choices=("forward", "train"), default="forward", help="train: the backward pass too")
    parser.add_argument("--most", type=_positive(int), default=40, metavar="N", help="tiles to try for a kernel (40)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, xpu (default: the GPU)")
    parser.add_argument("--dry-run", action="store_true", help="keep nothing")


SUBCOMMANDS = (add_demo, add_check, add_doctor, add_compile, add_bench, add_tune)


def _run_demo(args):
    from .demo import demo

    return demo(args)


def _run_check(args):
    from .check import check

    return check(args)


def _run_doctor(args):
    from .doctor import doctor

    return doctor(args)


def _run_bench(args):
    from .bench.run import bench

    return bench(args)


def _run_tune(args):
    from .tune import tune

    return tune(args)


def _run_compile(args):
    from .compile import compile_kernels

    return compile_kernels(args)


def _add(subparsers, name, *, summary, description, examples, zero, one, run):
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples + "\n\n" + EXIT_CODES.format(zero=zero, one=one),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the results to FILE as JSON; without FILE to stdout, and the text to stderr",
    )
    parser.set_defaults(run=run)
    return parser


def _at_least_0(text):
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__  # argparse names it when kind(text) raises ValueError
    return parse


if __name__ == "__main__":
    sys.exit(main())
