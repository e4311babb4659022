"""What a run leaves behind and begins from: starting and resuming, validation, pictures, results folders, signals.

May import all but `train_util` and the entry points. Called by those, and by scripts that write pictures.
"""
