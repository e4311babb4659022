"""Makes a folder to hand on of a training's checkpoint: weights, config, model card, an example (docs/checkpoints.md).

    python scripts/export_model.py --model_path OUTPUT/x/ema_0.9999_best.pt --out ade20k-sdm --license mit \
      --figures fid.json miou.json

The example is of --example_label, a label map as the data set has them (the network's ids where it is in the `labels`
of a results folder), else of the first layout of the validation split, where that is still where it was.
"""

import argparse
import os
import sys

from guided_diffusion.data.specs import DataError
from guided_diffusion.image_datasets import LayoutDataset
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.splits import open_layouts
from guided_diffusion.script_util import build_config
from guided_diffusion.settings import ConfigError, DataConfig, SampleConfig, Sampling
from guided_diffusion.weights import hub, store


def main(arguments: list[str] | None = None) -> int:
    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="the checkpoint, with its config.json beside it")
    parser.add_argument("--weights_key", default="", help="which weights, where that file holds several, as ema")
    parser.add_argument("--out", required=True, help="the folder to make: new, or empty")
    parser.add_argument("--name", default="", help="in the model card: OWNER/NAME on a hub (default: the folder's)")
    parser.add_argument("--license", default="", help="as hubs call it, such as mit or cc-by-4.0")
    parser.add_argument("--datasets", nargs="*", default=[], help="ids of data sets on a hub")
    parser.add_argument("--figures", nargs="*", default=[], help="files that the scorers wrote with --json")
    parser.add_argument("--example_label", default="", help="label map of the example")
    parser.add_argument("--precision", default="", help="recommended to whoever loads it: fp32, bf16 or fp16")
    parser.add_argument("--s", type=float, help="guidance scale of the example (default: 1.5, or 1 if not trained for)")
    parser.add_argument("--sampler", default=defaults.sampler, help="solver of the example")
    parser.add_argument("--num_steps", type=int, default=defaults.num_steps, help="steps of the example")
    parser.add_argument("--seed", type=int, default=0, help="of the example")
    options = parser.parse_args(arguments)
    try:
        print(f"made {export(options)}")
    except (ConfigError, DataError, store.CheckpointError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    return 0


def export(options: argparse.Namespace) -> str:
    """The folder that it made. Raises what is told to the user; nothing is written then."""
    hub.vacant(options.out)  # before a network is loaded
    if not store.exists(options.model_path):
        raise store.CheckpointError(f"there is no checkpoint {options.model_path} (--model_path)")
    if store.read_config(options.model_path) is None:
        raise store.CheckpointError(
            f"{options.model_path} has no {store.CONFIG_NAME} beside it, so it is not known what network it is of: "
            f"python scripts/convert_checkpoint.py {options.model_path} OUT.safetensors makes a file with one, of its "
            "weights and of flags; give that"
        )
    pipeline = SDMPipeline.from_checkpoint(options.model_path, weights_key=options.weights_key)
    card = {name: getattr(options, name) for name in ("name", "license", "datasets", "figures", "precision")}
    layouts, index = example_layout(options.example_label, pipeline)
    if layouts is None:
        return pipeline.save_pretrained(options.out, **card)
    sample = layouts[index]
    how = {name: getattr(options, name) for name in ("s", "sampler", "num_steps", "seed")}
    # A name in the card would be the model's; the example's seed is that of a layout without one.
    return pipeline.save_pretrained(
        options.out,
        example=sample["label"][0].numpy(),
        instance_map=sample["instance"][0].numpy() if "instance" in sample else None,
        **card,
        **{name: value for name, value in how.items() if value is not None},
    )


def example_layout(path: str, pipeline: SDMPipeline) -> tuple[LayoutDataset | None, int]:
    """A data set and an index in it; None where no layout was named and none is to be found."""
    recorded = pipeline.record
    data = build_config(DataConfig, {}, recorded.get("data") or {})
    config = SampleConfig(labels_dir=os.path.dirname(os.path.abspath(path)) if path else "")
    try:
        dataset = open_layouts(
            config, data, pipeline.model_config, recorded, alone=bool(path), log=lambda message: None
        )
    except (DataError, OSError) as error:
        if path:
            raise
        print(f"note: no example page ({error}); --example_label gives one", file=sys.stderr)
        return None, 0
    if not path:
        return dataset, 0
    found = [i for i, item in enumerate(dataset.items) if os.path.realpath(item.label) == os.path.realpath(path)]
    if not found:
        raise DataError(f"{path} is not among the label maps of its folder (--example_label); is it a picture of ids?")
    return dataset, found[0]


if __name__ == "__main__":
    sys.exit(main())
