"""What this server promises of itself, measured: questions that no other server is needed for."""
