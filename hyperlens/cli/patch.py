"""`hyperlens patch`: put activations or weights of one model into the other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__, patching
from .answers import Answer, answer_of_several
from .options import STYLE, add_pair, add_running, given, read

if TYPE_CHECKING:
    from ..results.resume import WorkFolder

DESCRIPTION = """\
Does what changed inside cause the behaviour? Put activations or weights of one model into the
other and see which decisions come with them.

  blocks      each block's activation, in both directions, next to controls; the 2 x 2 of every
              cut (whose residual enters the late blocks, whose late blocks they are); greedy text
              of the patched models
  positions   layer by position: where before a decision its cause can be found
  weights     the last k blocks, single blocks, final norm, unembedding: the smallest suffix
              that reproduces the behaviour
  expansion   the expansion taken away, or given to the base: is it the extra dimensions?
  norm        only the final norm's weights: how much of the expansion is block, how much norm"""

EXAMPLES = """\
Examples:
  hyperlens patch ./base ./tuned --texts held_out.txt --out patched
  hyperlens patch ./base ./adapter --texts t.txt --what blocks --site mlp_out --positions 5:

With --out, a part that is done is kept: after Ctrl-C the same command goes on."""

STAMP, WORK = "patch.json", "a run of hyperlens patch"

# Each part: its function and the class of its result, both in hyperlens.patching, and the options
# that it takes.
READING = ("n_texts", "max_length")
GENERATING = ("n_prompts", "prompt_tokens", "max_new_tokens")
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "blocks": (
        "patch_blocks",
        "BlocksResult",
        ("site", "positions", "controls", *READING, *GENERATING),
    ),
    "positions": ("patch_positions", "PositionsResult", READING),
    "weights": ("patch_weights", "WeightsResult", (*READING, *GENERATING)),
    "expansion": ("patch_expansion", "ExpansionResult", (*READING, *GENERATING)),
    "norm": ("patch_norm", "NormResult", ("max_length",)),
}
SITES = ("resid_post", "resid_pre", "attn_out", "mlp_out", "final_norm")


def add(commands: Any) -> None:
    """Add `hyperlens patch` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "patch",
        help="patch one model with the other: does what changed cause the behaviour?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run)
    add_pair(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--what",
        type=_parts,
        default=list(PARTS),
        metavar="PART[,PART]",
        help=f"{', '.join(PARTS)} (default: all of them)",
    )
    group.add_argument(
        "--site",
        choices=SITES,
        default="resid_post",
        metavar="SITE",
        help="of `blocks`: %(choices)s (default: resid_post)",
    )
    group.add_argument(
        "--positions",
        type=positions,
        metavar="P",
        help="of `blocks`: tokens to patch, as 0,3 or 5: (from the sixth on) (default: all)",
    )
    group.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="of `blocks`: skip the controls: four times faster, no baseline (default: with them)",
    )
    group.add_argument(
        "--n-texts",
        type=int,
        metavar="N",
        help="texts, drawn at random, that are read (default: each part's own, 32 to 128)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens per text, BOS included; longer texts are cut (default: each part's own, "
        "128 or 256)",
    )
    for option, default, text in (
        ("--n-prompts", 32, "texts, drawn at random, whose beginnings are continued greedily"),
        ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
        ("--max-new-tokens", 96, "tokens added to each; 0 generates none, which saves much time"),
        ("--batch-size", 8, "texts, or prompts, per forward pass"),
        ("--seed", 0, "of everything drawn at random"),
    ):
        group.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> Answer:
    """Run every part, save it when it is done, and answer."""
    texts = read(args, args.texts, args.split)
    if args.out is None:
        return _answer([_result(name, args, texts) for name in args.what])
    work = _work_folder(args, texts)
    work.check()
    results = [_kept(name, args, texts, work) for name in args.what]
    from ..questions import read_results
    from ..render.page import write_report

    # Parts of earlier calls belong on the page too.
    page = write_report(args.out / "report.html", read_results([args.out]))
    return _answer(results, f"saved in {args.out}; report: {page}")


def _answer(results: Sequence[Any], *notes: str) -> Answer:
    text = "\n\n".join([*(result.summary() for result in results), *notes])
    return answer_of_several("patch", text, results, *notes)


def _kept(name: str, args: argparse.Namespace, texts: Sequence[str], work: WorkFolder) -> Any:
    """The result of one part, from the folder if it is there already, else saved there."""
    load = getattr(patching, PARTS[name][1]).load
    return work.part(name, load, lambda: _result(name, args, texts))


def _result(name: str, args: argparse.Namespace, texts: Sequence[str]) -> Any:
    """The result of one part."""
    function, _, options = PARTS[name]
    run_it: Callable[..., Any] = getattr(patching, function)
    chosen = given(args, *options, "batch_size", "seed")
    # What is left open is decided by the part.
    chosen = {option: value for option, value in chosen.items() if value is not None}
    return run_it(args.base, args.tuned, texts, **chosen)


def _work_folder(args: argparse.Namespace, texts: Any) -> WorkFolder:
    """Stamped with everything that decides the results; which parts are run does not."""
    from ..results.fingerprint import texts_sha256
    from ..results.resume import WorkFolder, source_identity

    names = sorted({option for _, _, options in PARTS.values() for option in options})
    stamp = {
        "hyperlens": __version__,
        "base": source_identity(args.base),
        "tuned": source_identity(args.tuned),
        "texts": texts_sha256(texts),
        **({"reading": reading} if (reading := texts.reading.describe()) else {}),
        "options": {name: str(getattr(args, name)) for name in (*names, "seed", "dtype")},
    }
    return WorkFolder(args.out, STAMP, stamp, WORK)


def _parts(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(PARTS)}, with commas between them; got {unknown[0]!r}"
        )
    return list(dict.fromkeys(chosen))


def positions(text: str) -> slice | list[int]:
    """Parse positions of the command line: `0,3` or `5:`.

    >>> positions("5:"), positions("0,3")
    (slice(5, None, None), [0, 3])
    """
    try:
        if ":" in text:
            start, stop = text.split(":")
            return slice(int(start) if start else None, int(stop) if stop else None)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token numbers from 0, as in 0,3 or 5: or 2:8; got {text!r}"
        ) from None
