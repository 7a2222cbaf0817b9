"""Patched models at the cost of what comes after the patch: time per cell, same numbers.

    python benchmarks/patching.py [--layers 24 --d-model 256 --vocab 4096 --texts 2 …]

Two random Llamas. A layer sweep puts the residual of each into the other at every layer, all
positions, and reads the logits of every token; a layer x position map does it for single positions
and reads the last token. Other sides run a whole forward pass with a hook for every cell, as
TransformerLens's own activation patching does, on a TransformerBridge and on a ResidualModel.
Everything is in one process, the sides take turns, and reading both models' activations is part
of the work on all of them. Time is the processor's, which other processes do not lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from compare_speed import models, processor

from hyperlens import load_hooked
from hyperlens.hooks.partial_forward import read, run_patched
from hyperlens.hooks.surface import evaluating, layer_hook, unembed
from hyperlens.patching import Site
from hyperlens.patching.position_cells import patched_singly, read_endings


def whole_passes(models, tokens, offsets):
    """One forward pass with a hook per cell; the sweep's logits, then the map's."""
    n_layers = models[0].cfg.n_layers
    mask = torch.ones_like(tokens)
    kept = [{}, {}]
    seconds, made = {}, {"sweep": [], "map": []}

    def cell(host, lent, layer, offset):
        def put(own, hook):
            if offset is None:
                return lent[layer]
            new = own.clone()
            new[:, -1 - offset] = lent[layer][:, -1 - offset]
            return new

        hooks = [(layer_hook(layer), put)]
        return host.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)

    with torch.no_grad():
        started = time.process_time()
        for model, found in zip(models, kept, strict=True):
            keep = [
                (layer_hook(layer), lambda x, hook, at=layer, to=found: to.update({at: x.detach()}))
                for layer in range(n_layers + 1)
            ]
            model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=keep)
        reading = time.process_time() - started
        for what, chosen in (("sweep", [None]), ("map", range(offsets))):
            started = time.process_time()
            for host, lent in zip(models, reversed(kept), strict=True):
                for layer in range(n_layers + 1):
                    for offset in chosen:
                        logits = cell(host, lent, layer, offset)
                        made[what].append(logits if offset is None else logits[:, -1])
            seconds[what] = reading + time.process_time() - started
    return seconds, made


def suffixes(models, tokens, offsets, batch):
    """The same by hyperlens: what no patch changes once, then only what comes after each."""
    n_layers = models[0].cfg.n_layers
    mask = torch.ones_like(tokens)
    seconds, made = {}, {"sweep": [], "map": []}
    started = time.process_time()
    streams = [read(model, tokens, mask, [])[0] for model in models]
    for host, own, lent in zip(models, streams, reversed(streams), strict=True):
        for layer in range(n_layers + 1):
            site = Site("resid_post", layer - 1) if layer else Site("resid_pre", 0)
            normed = run_patched(host, tokens, mask, own, site, lent[layer])
            with evaluating(host):
                made["sweep"].append(unembed(host, normed.flatten(0, 1)).view(*tokens.shape, -1))
    seconds["sweep"] = time.process_time() - started
    started = time.process_time()
    endings = [read_endings("", model, tokens, mask, offsets) for model in models]
    for host, lent in zip(endings, reversed(endings), strict=True):
        for layer in range(n_layers + 1):
            found = patched_singly(host, lent.stream[layer], layer, batch)
            with evaluating(host.model):
                made["map"] += [unembed(host.model, one) for one in found.unbind(1)]
    seconds["map"] = time.process_time() - started
    return seconds, made


def main():
    """Measure all sides in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 24), ("d-model", 256), ("vocab", 4096), ("texts", 2), ("length", 64),
        ("offsets", 8), ("batch", 16), ("repeats", 3), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, tuned, tokens = models(args)
    bridges = [load_hooked(model, backend="bridge") for model in (base, tuned)]
    residual = [load_hooked(model, backend="residual") for model in (base, tuned)]
    sides = {
        "whole passes, TransformerBridge": lambda: whole_passes(bridges, tokens, args.offsets),
        "whole passes, ResidualModel": lambda: whole_passes(residual, tokens, args.offsets),
        "hyperlens": lambda: suffixes(residual, tokens, args.offsets, args.batch),
    }
    taken = {side: {"sweep": [], "map": []} for side in sides}
    apart = dict.fromkeys(sides, 0.0)
    for _ in range(args.repeats):
        results = {}
        for side, run in sides.items():
            seconds, results[side] = run()
            for what, value in seconds.items():
                taken[side][what].append(value)
        for side, made in results.items():
            for what, logits in made.items():
                for one, other in zip(logits, results["hyperlens"][what], strict=True):
                    apart[side] = max(apart[side], float((one - other).abs().max()))
    cells = {"sweep": 2 * (args.layers + 1), "map": 2 * (args.layers + 1) * args.offsets}
    print(
        f"two Llamas, {args.layers} blocks, d_model {args.d_model}, vocabulary {args.vocab}, "
        f"{args.texts} x {args.length} tokens, {cells['sweep']} cells of the sweep, "
        f"{cells['map']} of the map, float32, {args.threads} threads, median of {args.repeats}, "
        f"{processor()}, torch {torch.__version__}"
    )
    print(
        f"{'':36}{'sweep':>18}{'map':>18}{'both':>18}{'apart':>10}   processor ms per cell (times)"
    )
    medians = {
        side: {what: statistics.median(values) for what, values in found.items()}
        for side, found in taken.items()
    }
    total = sum(cells.values())
    for side, found in medians.items():
        line = f"{side:36}"
        for what, n in (*cells.items(), ("both", total)):
            own, ours = (
                sum(one.values()) if what == "both" else one[what]
                for one in (found, medians["hyperlens"])
            )
            line += f"{1000 * own / n:10.1f} ({own / ours:4.2f}x)"
        print(f"{line}{apart[side]:10.1g}")


if __name__ == "__main__":
    main()
