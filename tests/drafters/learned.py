"""Batches and networks for tests of learned drafters. Not a test."""

import torch

from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble
from tiny import target

DIALOGUES = [
    Document([5, 6, 7, 8, 9, 5, 6, 7, 11, 12, 30, 31, 32, 20, 3, 1], 4),
    Document([3, 4, 5, 3, 4, 22, 21, 9], 2),
    Document([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], 3),
]


def batch_for(drafter, rows, *, length=None, shifts=None):
    """A batch of documents with the taps a drafter trains on."""
    length = length or max(sum(len(d.tokens) for d in row) for row in rows)
    batch = assemble(rows, length, drafter.target, shifts=drafter.shifts if shifts is None else shifts)
    batch.taps = read_taps(batch, drafter.training_taps)
    return batch


def fresh(drafter, *, seed=0, awake=True):
    """Initial weights; `awake` gives every parameter that starts at zero or one some noise, so that it matters."""
    drafter.initialise(target(), seed=seed)
    if awake:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in drafter.module.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return drafter
