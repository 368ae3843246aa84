"""The server beside others: other model servers, a real Triton, and goals of its own."""
