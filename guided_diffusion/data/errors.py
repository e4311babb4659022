"""What the reading of data raises."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was found and the remedy."""


class MissingSplitError(FileNotFoundError):
    """A split (training, validation, test) that the data folder does not have."""
