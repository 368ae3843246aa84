"""The controller's process around its brain: its links, questions from outside."""
