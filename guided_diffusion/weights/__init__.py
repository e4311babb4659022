"""Weights and what lies beside them: names, atomic writing, reading, whether a set is whole.

May import `data` (its JSON reader) and `settings`. Called by `runs`, `pipeline` and the training loop.
"""
