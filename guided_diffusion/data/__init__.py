"""Files on a disk on their way to small integers: class lists, folders, crops, checks. And pages of pictures for people.

May import `hosts`. Called by `image_datasets`, which hands out the samples, by `weights`, `pipeline`, `runs` and the
data scripts. Knows neither PyTorch networks nor runs.
"""
