"""ONNX graphs: read, checked for rows that mix, compiled for the devices.

What a graph says of its own results is not believed: first answers are compared with a plain session's.
"""
