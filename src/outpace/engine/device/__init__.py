"""Rounds that stay on a CUDA device: tokens are chosen, the tree is walked and the cache committed without the host.

Imports Triton; imported by the engine where a fast pass is there.
"""
