"""The gRPC port: grpcio's core driven by events, and the inference service on it."""
