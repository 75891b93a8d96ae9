"""Passes at the speed of the hardware: fewer and larger kernels, captured as graphs. The modules stay the reference.

`plan` needs torch alone; everything else here imports Triton and is imported where a CUDA device is used.
"""
