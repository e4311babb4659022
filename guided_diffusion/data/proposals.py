"""From what is wrong with values to what would be right: settings for dataset.json, ready to paste."""

from collections.abc import Mapping

from .specs import DatasetSpec


def remedy_for_ids(counts: Mapping[int, int], spec: DatasetSpec) -> str:
    """What to do about a label map whose ids are no classes. `counts`: pixels by stored id."""
    if spec.name == "custom":
        return 'raise --num_classes, or in dataset.json name an "ignore_id" or a "remap"'
    return f"check --num_classes and that this is data for dataset_mode {spec.name}"
