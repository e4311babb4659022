"""A label map on its way into the network: one-hot maps and edges, SPADE, and the look-up of repeated neighbourhoods.

May import `nn`. Called by `unet`, the training step and the pipeline. Knows no files, no processes and no pictures.
"""
