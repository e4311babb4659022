"""What a run leaves behind and begins from: log directory, starting, saving, validation, previews, results, signals.

May import all but `train_util` and the entry points. Called by those, and by scripts that write pictures.
"""
