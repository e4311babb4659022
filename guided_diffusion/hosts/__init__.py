"""The machine: addresses of hosts, ranks that watch each other, free memory, its libraries' arithmetic, work over
all cores.

May import nothing else of the package. Called by `dist_util`, `pipeline`, the training loop, the entry points
and the scripts.
"""
