"""What `engine.device.truncation` keeps, in torch. Not a test."""

import torch

SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def kept_ids(logits, cut, last):
    """`truncation.kept` of one row: [V] bool."""
    bits = (logits.float() + 0.0).view(torch.int32).long()
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFTS[logits.dtype]
    return (key > cut) | ((key == cut) & (torch.arange(len(logits), device=logits.device) <= last))
