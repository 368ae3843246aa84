"""ONNX graphs: read, checked for rows that mix, compiled for the devices."""
