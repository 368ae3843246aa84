"""The message that holds a gateway's loop longest, searched for in each protocol, and what it does to others."""
