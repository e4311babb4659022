"""Weights and what lies beside them: names, atomic writing, reading, whether a set is whole; other class lists.

May import `data` (its JSON reader, class lists) and `settings`. Called by `runs`, `pipeline` and the training loop.
"""
