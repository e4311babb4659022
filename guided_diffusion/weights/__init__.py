"""Weights and what lies beside them: the sets of a run, atomic writing, reading of any file, settings from shapes,
other class lists, folders to hand on.

May import `data` (its JSON reader, class lists and pictures) and `settings`. Called by `runs`, `pipeline` and the
training loop.
"""
