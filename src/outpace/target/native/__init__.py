"""Passes of few rows on a CPU as one compiled function: `pass.c`, built on this machine for its processor."""
