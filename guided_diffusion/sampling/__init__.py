"""From noise to an image: solvers, guidance, and the one loop that drives them.

May import `nn` and `layouts`. Called by `gaussian_diffusion` (its traditional loops are wrappers), the pipeline and the
previews. Knows no files, no processes and no pictures.
"""
