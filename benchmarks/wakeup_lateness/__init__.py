"""How late the controller wakes up, and how late this machine wakes anything."""
