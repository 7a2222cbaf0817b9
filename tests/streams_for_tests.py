"""Synthetic residual streams, so that probes can be tested without any model."""

import numpy as np
import torch

from hyperlens.passes.streams import ModelStream, StreamPair, StreamSpec, TokenSample

N_LAYERS, D_MODEL, D_VOCAB = 2, 6, 23
N_SAMPLED = 5


class Streams:
    """Residual streams of two models over sequences of several lengths, batched at will."""

    def __init__(self, n_sequences=11, seed=0, same=False, d_model=D_MODEL):
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(2, 9, n_sequences)
        self.d_model = d_model
        self.unembedding = torch.from_numpy(rng.normal(size=(D_VOCAB, d_model))).float()
        self.gain = torch.from_numpy(rng.uniform(0.5, 2, d_model)).float()
        shape = (N_LAYERS + 1, d_model)
        self.base, self.tuned = [], []
        for length in self.lengths:
            topic = rng.normal(size=(shape[0], 1, d_model))
            base = 2 + topic + rng.normal(size=(shape[0], length, d_model))
            tuned = base if same else base + 0.3 * rng.normal(size=base.shape)
            self.base.append(torch.from_numpy(base).float())
            self.tuned.append(torch.from_numpy(tuned).float())
        self.drawn = [rng.permutation(np.arange(1, n))[:N_SAMPLED] for n in self.lengths]
        self.sink = rng.integers(n_sequences)

    @property
    def everything(self):
        return range(len(self.lengths))

    def spec(self):
        return StreamSpec(
            n_layers=N_LAYERS,
            d_model=self.d_model,
            d_vocab=D_VOCAB,
            device=torch.device("cpu"),
            n_sampled_sequences=len(self.lengths),
            n_sampled_tokens=N_SAMPLED,
        )

    def pair(self, sequences, side="right", extra=0):
        """One batch; position 0 of each sequence is BOS, pads hold NaN."""
        sequences = list(sequences)
        width = max((int(self.lengths[i]) for i in sequences), default=1) + extra
        size = (len(sequences), width)
        real = torch.zeros(size, dtype=torch.bool)
        bos, position = torch.zeros(size, dtype=torch.bool), torch.full((size[0], N_SAMPLED), -1)
        sinks = torch.zeros((N_LAYERS + 1, *size), dtype=torch.bool)
        residuals = [torch.full((N_LAYERS + 1, *size, self.d_model), torch.nan) for _ in range(2)]
        for row, i in enumerate(sequences):
            length = int(self.lengths[i])
            start = 0 if side == "right" else width - length
            real[row, start : start + length] = True
            bos[row, start] = True
            sinks[1, row, start + 1] = bool(i == self.sink)
            position[row, : len(self.drawn[i])] = torch.from_numpy(self.drawn[i]) + start
            for kept, source in zip(residuals, (self.base, self.tuned), strict=True):
                kept[:, row, start : start + length] = source[i]
        streams = [
            ModelStream(list(r), lambda x: x * self.gain, lambda x: x @ self.unembedding.T, D_VOCAB)
            for r in residuals
        ]
        return StreamPair(
            base=streams[0],
            tuned=streams[1],
            tokens=torch.zeros(size, dtype=torch.int64),
            real=real,
            bos=bos,
            sinks=sinks,
            sample=TokenSample(torch.tensor(sequences, dtype=torch.int64), position),
            device=torch.device("cpu"),
        )

    def run(self, probe, sequences=None, batch_size=4, side="right", extra=0):
        """Open a probe and feed it some sequences in batches."""
        probe.open(self.spec())
        sequences = list(self.everything if sequences is None else sequences)
        for start in range(0, len(sequences), batch_size):
            probe.update(self.pair(sequences[start : start + batch_size], side, extra))
        return probe
