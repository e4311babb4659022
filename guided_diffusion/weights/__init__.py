"""Weights and what lies beside them: names, atomic writing, reading, whether a set is whole; other class lists; folders
to hand on.

May import `data` (its JSON reader, class lists and pictures) and `settings`. Called by `runs`, `pipeline` and the
training loop.
"""
