"""Files on a disk on their way to small integers: class lists, folders, crops, checks; and pages of pictures.

May import `hosts`. Called by `image_datasets`, which hands out the samples, by `weights`, `pipeline`, `runs` and the
data scripts. Knows neither PyTorch networks nor runs.
"""
