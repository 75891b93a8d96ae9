"""Widening: a model's function in a larger shape."""

from outpace.target.widen.build import widen
from outpace.target.widen.files import save_widened
from outpace.target.widen.modules import widen_module
from outpace.target.widen.shapes import SHAPES, Shape, find_shape
from outpace.target.widen.widening import Widening

__all__ = ["SHAPES", "Shape", "Widening", "find_shape", "save_widened", "widen", "widen_module"]
