"""The message that holds a gateway's loop longest in each protocol, and what it does to others."""
