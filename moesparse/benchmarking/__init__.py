"""Measuring expert layers: shapes of real models, ceilings of the device, timing, and contenders that are verified
before they are timed. `moesparse bench` and benchmarks/ share it."""

from moesparse.benchmarking.contenders import CONTENDERS, contenders_for
from moesparse.benchmarking.layer import bench_layer, print_rows
from moesparse.benchmarking.measure import Ceilings, Timing, environment, measure_ceilings, time_call
from moesparse.benchmarking.shapes import SHAPES, Shape

__all__ = [
    "CONTENDERS",
    "SHAPES",
    "Ceilings",
    "Shape",
    "Timing",
    "bench_layer",
    "contenders_for",
    "environment",
    "measure_ceilings",
    "print_rows",
    "time_call",
]
