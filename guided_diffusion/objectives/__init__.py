"""What a training step minimises, and the validation measures.

May import `nn`, `layouts` and the diffusion. Called by `train_util` and `runs.validation`, which do not know which
objective it is. Knows no files, no processes and no pictures.
"""
