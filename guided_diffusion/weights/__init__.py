"""Weights and what lies beside them: the sets of a run, atomic writing, reading of any file, settings from shapes.

May import `data` (its JSON reader) and `settings`. Called by `runs`, `pipeline` and the training loop.
"""
