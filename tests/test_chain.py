"""Train, fine-tune with label drop, sample with guidance, under `mpiexec -n 2`, in every mode, with no file renamed."""

import dataclasses

import numpy as np
import pytest
import torch
from data_helpers import SHARED, write_benchmark, write_custom
from PIL import Image
from sampling_helpers import run

MODES = {  # (classes, instances, size of a sample at image_size 32)
    "ade20k": (151, False, (32, 32)),
    "cityscapes": (35, True, (64, 32)),
    "celeba": (19, True, (32, 32)),
    "coco": (183, True, (32, 32)),
    "custom": (12, False, (32, 32)),
}
NETWORK = dict(
    image_size=32,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions=16,
    num_head_channels=16,
    learn_sigma=True,
    resblock_updown=True,
    class_cond=True,
    diffusion_steps=50,
    num_workers=0,
)


@dataclasses.dataclass
class Data:
    mode: str
    folder: str


@pytest.fixture(params=MODES)
def data(request, tmp_path):
    """Real photographs in the mode's own layout where they are beside the repository, else drawn ones."""
    mode = request.param
    folder = SHARED / "data" / ("camvid" if mode == "custom" else f"{mode}_sample")
    if not folder.exists():
        folder = tmp_path / "data"
        write_custom(folder, classes=12) if mode == "custom" else write_benchmark(folder, mode)
    return Data(mode, str(folder))


def test_chain(data, tmp_path):
    classes, instances, size = MODES[data.mode]
    settings = dict(NETWORK, data_dir=data.folder, dataset_mode=data.mode)
    settings |= dict(num_classes=classes, no_instance=not instances)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    training = ["--batch_size", "1", "--ema_rate", "0.9", "--val_images", "2"]
    train, finetune, results = (tmp_path / name for name in ("train", "finetune", "results"))

    result = run("image_train.py", *flags, *training, "--max_steps", "2", ranks=2, OPENAI_LOGDIR=str(train))
    assert result.returncode == 0, result.stdout
    start = ["--drop_rate", "0.2", "--resume_checkpoint", str(train / "model.pt")]
    result = run("image_train.py", *flags, *training, *start, "--max_steps", "1", ranks=2, OPENAI_LOGDIR=str(finetune))
    assert result.returncode == 0, result.stdout
    weights = torch.load(finetune / "model000001.pt", weights_only=True)
    before = torch.load(train / "model.pt", weights_only=True)
    moved = [name for name in weights if not torch.equal(weights[name], before[name])]
    # one step at a learning rate of 1e-4 moves the weights by no more than that: they started from model.pt
    assert moved and all(torch.allclose(weights[n], before[n], atol=1.1e-4) for n in weights)

    sampling = ["--batch_size", "2", "--num_samples", "3", "--s", "1.5", "--results_path", str(results)]
    model = ["--model_path", str(finetune / "ema_0.9_best.pt"), "--use_ddim", "True", "--timestep_respacing", "ddim5"]
    result = run("image_sample.py", *flags, *model, *sampling, ranks=2)
    assert result.returncode == 0, result.stdout
    samples = sorted(path.name for path in (results / "samples").iterdir())
    assert len(samples) == min(3, len(list((results / "images").iterdir()))) >= 2
    for name in samples:
        assert Image.open(results / "samples" / name).size == size
        assert Image.open(results / "images" / name).size == size
        label = np.asarray(Image.open(results / "labels" / name))
        assert label.shape == size[::-1] and label.max() < classes
