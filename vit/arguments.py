"""What the parsers of the subcommands share: how one is made, and the types of arguments, which refuse in words."""

import argparse
import math

__all__ = [
    "add_subcommand",
    "at_least_0",
    "device",
    "model_name",
    "not_negative",
    "positive",
    "seed",
    "share",
    "share_or_folder",
]

EXIT_CODES = """\
exit codes:
  0    {zero}
  1    {one}
  2    it could not be done: a bad argument, a missing package, a file that cannot be written
  130  stopped with Ctrl-C
"""


def add_subcommand(subparsers, name, *, summary, description, examples, zero, one, run):
    """A parser among `subparsers`; `zero` and `one` say what these exit codes mean; `run` is "module:function"."""
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


def device(parser):
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, xpu; auto takes a GPU if there is one (default: %(default)s)",
    )


def at_least_0(text):
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def not_negative(text):
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def seed(text):
    if not -(2**63) <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit into 64 bits")
    return value


def share(text):
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1, or is 1")
    return value


def share_or_folder(text):
    try:
        value = float(text)
    except ValueError:
        return text
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def model_name(text):
    if not text.startswith("timm:") and text not in ("tiny", "ti", "s", "b", "l", "h"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of tiny, ti, s, b, l, h and timm:NAME")
    return text


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive, or not finite")
        return value

    parse.__name__ = kind.__name__  # argparse names it when kind(text) raises ValueError
    return parse
