"""The worker's process around its brain: links, lanes, what it leaves when it crashes."""
