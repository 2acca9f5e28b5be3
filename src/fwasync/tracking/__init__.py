"""Tracking: the record of a run on disk, on the terminal and as a page; it never blocks the loop."""
