"""The server beside others: nine other model servers, a real Triton, and goals against the best of them."""
