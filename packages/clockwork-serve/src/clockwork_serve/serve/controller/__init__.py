"""The controller process around its brain: its links, and questions of other processes."""
