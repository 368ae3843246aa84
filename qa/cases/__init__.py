"""Known graphs that mix rows or keep them apart: standard node cases, whole models, kinds written by hand."""
