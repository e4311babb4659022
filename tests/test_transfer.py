"""A new run from a network that knows other classes: weights, settings, names, the run itself, and what is refused."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from data_helpers import write_custom
from sampling_helpers import run, run_here
from training_helpers import DIFFUSION, MODEL, TRAINING, differing, state_of

from guided_diffusion.data.specs import read_classes
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.settings import ConfigError, DiffusionConfig, ModelConfig
from guided_diffusion.weights import store
from guided_diffusion.weights.checkpoint_classes import known_classes
from guided_diffusion.weights.class_map import BY_MAP, Row
from guided_diffusion.weights.transfer import LAYOUT_WEIGHT, adapt
from guided_diffusion.weights.transfer_settings import carried_settings

OLD, NEW = ["sky", "road", "tree", "car"], ["Street", "CAR", "lawn", "tumour"]  # and unlabelled
MAP = {"street": "road", "lawn": ["tree", "sky"], "tumour": None}
ROWS = [[1], [3], [2, 0], [], [0, 1, 2, 3]]  # what they start from
FREE = {"num_classes", "image_size", "channel_mult", "attention_resolutions", "no_instance"}


def network(classes=4, edge=True, learn_sigma=True, **settings):
    """With no weight at zero. What reads the layout has weights of few bits: its sums are exact in any order."""
    config = ModelConfig(**MODEL | dict(num_classes=classes, no_instance=not edge) | settings)
    model = create_model(config, learn_sigma).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            if ".mlp_shared.0." in name:
                parameter.mul_(256).round_().div_(256)
    return model


def transferred(old, rows, *, edge=True, learn_sigma=True):
    """The network of the new classes with the weights of `old`."""
    old_edge = old.layout_channels > 4
    state = adapt(
        old.state_dict(), [Row("", tuple(ids), BY_MAP) for ids in rows], old_edge=old_edge, new_edge=edge,
        learn_sigma=learn_sigma,
    )  # fmt: skip
    new = network(len(rows), edge, learn_sigma)
    store.load_state_into(new, state, "old.pt")
    return new


def layouts(classes, edge=True):
    """Integers [2, 1, 16, 16], and the layout's channels for them; the edge is random."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(classes, (2, 1, 16, 16), generator=generator)
    return label, torch.randint(2, (2, 1, 16, 16), generator=generator).float()


def onehot(label, classes, edge=None):
    channels = [(label == i).float() for i in range(classes)]
    return torch.cat([*channels, *([] if edge is None else [edge])], dim=1)


@torch.no_grad()
def outputs(model, y):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return model(x, torch.tensor([3, 40]), y=y)


def test_renumbered_classes_give_the_same_outputs_bit_for_bit():
    old, order = network(), [2, 0, 3, 1]  # the new class i was order[i]
    label, edge = layouts(4)
    new = transferred(old, [[i] for i in order])
    expected = outputs(old, onehot(torch.tensor(order)[label], 4, edge))
    assert expected.std() > 0.1 and torch.equal(outputs(new, onehot(label, 4, edge)), expected)
    assert not torch.equal(outputs(old, onehot(label, 4, edge)), expected)


def test_merged_classes_read_the_mean():
    """A layout that is half one class and half another reads, in a convolution, the mean of both."""
    old = network()
    label, edge = layouts(4)
    new = transferred(old, [[1], [3], [2, 0], [0, 1, 2, 3]])
    shares = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0.5, 0, 0.5, 0], [0.25] * 4])
    mixed = shares[label[:, 0]].permute(0, 3, 1, 2)
    expected = outputs(old, torch.cat([mixed, edge], dim=1))
    assert torch.equal(outputs(new, onehot(label, 4, edge)), expected)


def test_classes_from_none_begin_as_in_a_new_network():
    """The same for the same seed, in whatever order the file is, and spread as PyTorch begins a convolution."""
    old, name = network().state_dict(), f"middle_block.0.in_norm{LAYOUT_WEIGHT}"
    options = dict(old_edge=True, new_edge=True, learn_sigma=True)
    rows = [Row("", tuple(ids), BY_MAP) for ids in ([], [2], [])]
    new = adapt(old, rows, seed=1, **options)[name]
    assert torch.equal(new, adapt(dict(reversed(old.items())), rows, seed=1, **options)[name])
    assert not torch.equal(new, adapt(old, rows, seed=2, **options)[name])
    assert torch.equal(new[:, 1], old[name][:, 2]) and not torch.equal(new[:, 0], new[:, 2])
    fresh = torch.nn.Conv2d(4, 128, 3).weight.detach()
    assert abs(float(new[:, [0, 2]].std() / fresh.std()) - 1) < 0.1
    assert float(new[:, [0, 2]].abs().max()) <= (4 * 9) ** -0.5


def test_the_edge_comes_along_is_dropped_or_starts_at_zero():
    label, edge = layouts(4)
    same, none = [[0], [1], [2], [3]], torch.zeros_like(edge)
    with_edge, without = network(), network(edge=False)
    assert torch.equal(
        outputs(transferred(with_edge, same, edge=False), onehot(label, 4)), outputs(with_edge, onehot(label, 4, none))
    )
    given = transferred(without, same)
    assert torch.equal(outputs(given, onehot(label, 4, edge)), outputs(without, onehot(label, 4)))
    assert given.layout_channels == 5


def test_a_learned_variance_comes_and_goes():
    label, edge = layouts(4)
    y, same = onehot(label, 4, edge), [[0], [1], [2], [3]]
    learned, fixed = network(), network(learn_sigma=False)
    assert torch.equal(outputs(transferred(learned, same, learn_sigma=False), y), outputs(learned, y)[:, :3])
    more = outputs(transferred(fixed, same), y)
    assert torch.equal(more[:, :3], outputs(fixed, y)) and not more[:, 3:].any()


def test_only_the_first_spade_convolutions_differ_in_shape():
    settings = ModelConfig(
        num_channels=256, num_res_blocks=2, attention_resolutions="32,16,8", image_size=256, num_head_channels=64,
        resblock_updown=True,
    )  # fmt: skip
    with torch.device("meta"):
        nets = [create_model(dataclasses.replace(settings, num_classes=n), True).state_dict() for n in (151, 9)]
    changed = [name for name in nets[0] if nets[0][name].shape != nets[1][name].shape]
    assert len(changed) == 50 and all(name.endswith(LAYOUT_WEIGHT) for name in changed)


def test_weights_in_16_bits_are_averaged_in_32():
    state = {name: value.half() for name, value in network().state_dict().items()}
    rows = [Row("", (0, 1, 2), BY_MAP)]
    mean = adapt(state, rows, old_edge=True, new_edge=False, learn_sigma=True)[f"middle_block.0.in_norm{LAYOUT_WEIGHT}"]
    exact = state[f"middle_block.0.in_norm{LAYOUT_WEIGHT}"][:, :3].double().mean(1)
    assert float((mean[:, 0] - exact).abs().max()) < 1e-7


# -- settings ---------------------------------------------------------------------------------------------------------


def recorded(**settings):
    model = ModelConfig(**MODEL | settings)
    return {"model": dataclasses.asdict(model), "diffusion": dataclasses.asdict(DiffusionConfig(**DIFFUSION))}


def test_another_size_keeps_the_network():
    """Attention stays at the same downsampling, and widths do not follow the traditional ones of the new size."""
    before = recorded(image_size=64, channel_mult="", num_channels=32, attention_resolutions="16", num_classes=9)
    given = {"image_size": 128, "num_classes": 4, "no_instance": True}
    carried = carried_settings(before, given, "config.json")
    old, new = (ModelConfig(**part) for part in (before["model"], carried["model"]))
    assert new.attention_resolutions == "32" and new.multipliers() == old.multipliers() == (1, 2, 3, 4)
    assert {name for name in vars(old) if getattr(old, name) != getattr(new, name)} == FREE - {"no_instance"}
    with torch.device("meta"):
        shapes = [
            {k: v.shape for k, v in create_model(c, True).state_dict().items()}
            for c in (dataclasses.replace(old, num_classes=4), new)
        ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            dict(image_size=32, attention_resolutions="8"),
            r"for image_size 32 give --attention_resolutions 16, or leave",
        ),
        (dict(attention_resolutions="16,8"), r"has it, at 1/2 of image_size 16"),
        (dict(image_size=21), r"--image_size 21 cannot be divided by 2: .* choose a multiple of 2"),
        (dict(channel_mult="1,3"), r"--channel_mult 1,3 contradicts the checkpoint, whose network has 1,2 \(config"),
        (dict(predict_v=True), r"predicts the noise \(config\.json\), and the velocity is asked for"),
        (dict(predict_xstart=True), r"predicts the noise .*and the image is asked for.*change with the timestep"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        carried_settings(recorded(), {"num_classes": 4, "no_instance": True, **given}, "config.json")


@pytest.mark.parametrize(("one", "other"), [("noise", "velocity"), ("velocity", "image"), ("noise", "image")])
def test_no_constant_factor_makes_one_prediction_of_another(one, other):
    """Why another prediction is refused: even of perfect outputs, the best factor leaves more than half of the target's
    power, over the timesteps of the linear schedule (photographs of variance 1/4)."""
    alpha_bar = torch.from_numpy(create_gaussian_diffusion(DiffusionConfig()).alphas_cumprod)
    parts = {  # of noise and image
        "noise": torch.stack([torch.ones_like(alpha_bar), 0 * alpha_bar]),
        "image": torch.stack([0 * alpha_bar, torch.ones_like(alpha_bar)]),
        "velocity": torch.stack([alpha_bar.sqrt(), -(1 - alpha_bar).sqrt()]),
    }
    power = torch.tensor([1.0, 0.25], dtype=torch.float64)[:, None]
    a, b = parts[one], parts[other]
    explained = (a * b * power).sum() ** 2 / (a * a * power).sum() / (b * b * power).sum()
    assert explained < 0.5


# -- names ------------------------------------------------------------------------------------------------------------


def checkpoint(folder, config=None, dataset_json=None):
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if dataset_json is not None:
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return str(folder / "model.pt")


def test_names_come_from_the_record_or_a_file_beside_it(tmp_path):
    listed = [{"name": name, "color": [0, 0, i]} for i, name in enumerate(OLD)]
    named = recorded(no_instance=False) | {"classes": listed}
    assert known_classes(checkpoint(tmp_path / "a", named), 5) == (tuple(OLD), True)
    older = recorded() | {"dataset_json": {"classes": OLD[:3], "ignore_id": 255}}
    assert known_classes(checkpoint(tmp_path / "b", older), 4) == ((*OLD[:3], "unlabelled"), False)
    nameless = recorded() | {"data": {"dataset_mode": "custom"}, "dataset_json": {}}
    generic = tuple(f"class {i}" for i in range(4))
    assert known_classes(checkpoint(tmp_path / "c", nameless), 4) == (generic, False)
    assert known_classes(checkpoint(tmp_path / "d", nameless, {"classes": OLD}), 4) == (tuple(OLD), False)
    of_mode = recorded(num_classes=19) | {"data": {"dataset_mode": "celeba"}}
    assert known_classes(checkpoint(tmp_path / "e", of_mode), 19) == (read_classes("celeba")[0], False)
    with pytest.raises(store.CheckpointError, match=r"reads 6 layout channels, but the config\.json .* says 4 "):
        known_classes(checkpoint(tmp_path / "f", recorded()), 6)


def test_names_of_weights_without_a_record_follow_from_their_number(tmp_path):
    path = checkpoint(tmp_path / "published")
    for mode, count, edge in (("ade20k", 151, 0), ("cityscapes", 35, 1), ("celeba", 19, 1), ("coco", 183, 1)):
        assert known_classes(path, count + edge) == (read_classes(mode)[0], bool(edge))
    with pytest.raises(store.CheckpointError, match=r"reads 7 layout channels.*put a dataset\.json beside it"):
        known_classes(path, 7)
    path = checkpoint(tmp_path / "named", None, {"classes": OLD})
    assert [known_classes(path, n) for n in (4, 5)] == [(tuple(OLD), False), (tuple(OLD), True)]


# -- runs -------------------------------------------------------------------------------------------------------------

NETWORK = {name: value for name, value in (MODEL | DIFFUSION).items() if name not in ("num_classes", "no_instance")}


def words(**settings):
    settings = {**TRAINING, "num_workers": 0, "dataset_mode": "custom", "batch_size": 2, **settings}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A training of one step on data with instances and four classes; other data, without; a class map."""
    root = tmp_path_factory.mktemp("transfer")
    size = dict(size=(24, 20), classes=4)
    old = write_custom(root / "old", {"train": 4, "val": 2}, **size, instances=True, settings={"classes": OLD})
    write_custom(root / "new", {"train": 4, "val": 2}, **size, settings={"classes": NEW, "ignore_id": 255})
    (root / "map.json").write_text(json.dumps(MAP))
    result = run_here("image_train.py", *words(**NETWORK, data_dir=old, logdir=root / "base", max_steps=1))
    assert result.returncode == 0, result.stdout
    return root


def starting(root, logdir, **settings):
    """The flags of a transfer: of the network, none."""
    start = dict(transfer_from=root / "base" / "ema_0.9_best.pt", class_map=root / "map.json")
    return words(**{**start, "data_dir": root / "new", "logdir": logdir, "max_steps": 1, **settings})


def test_two_ranks_begin_with_the_adapted_weights_and_go_on_bit_for_bit(places, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(places / "base", base)
    flags = dict(transfer_from=base / "ema_0.9_best.pt", save_interval=2, max_steps=4)
    result = run("image_train.py", *starting(places, tmp_path / "whole", **flags), ranks=2)
    assert result.returncode == 0, result.stdout
    assert "2 lawn            the mean of 2 tree, 0 sky  class map" in result.stdout
    table = json.loads((tmp_path / "whole" / "transfer.json").read_text())
    assert [entry["from"] for entry in table["classes"]] == ROWS
    assert table["instance_edge"] == "is dropped" and "0 Street " in (tmp_path / "whole" / "transfer.txt").read_text()
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["start"] == {
        "transfer_from": str(base / "ema_0.9_best.pt"), "sha256": store.file_hash(str(base / "ema_0.9_best.pt")),
        "class_map": str(places / "map.json"), "class_map_sha256": store.file_hash(str(places / "map.json")),
    }  # fmt: skip
    assert config["model"]["num_classes"] == 5 and config["model"]["no_instance"]
    # The second half, in another directory, without the checkpoint that it all began from.
    (tmp_path / "halves").mkdir()
    for path in [*(tmp_path / "whole").glob("*000002*"), tmp_path / "whole" / "config.json"]:
        shutil.copy(path, tmp_path / "halves")
    shutil.rmtree(base)
    result = run("image_train.py", *starting(places, tmp_path / "halves", **flags), ranks=2)
    assert result.returncode == 0 and "continuing this log directory's run at step 2" in result.stdout, result.stdout
    assert differing(state_of(tmp_path / "whole", 4), state_of(tmp_path / "halves", 4)) == []


def test_weights_and_averages_begin_as_adapted(places, tmp_path):
    """At a learning rate of 0 they stay so. With more at once: another size, no learned variance, half precision."""
    settings = dict(lr=0, image_size=32, learn_sigma=False, precision="bf16")
    result = run_here("image_train.py", *starting(places, tmp_path / "run", **settings))
    assert result.returncode == 0, result.stdout
    old = torch.load(places / "base" / "ema_0.9_best.pt", weights_only=True)
    rows = [Row("", tuple(ids), BY_MAP) for ids in ROWS]
    expected = adapt(old, rows, old_edge=True, new_edge=False, learn_sigma=False)
    for name in ("model.pt", "ema_0.9_best.pt", "ema_0.99_best.pt"):
        weights = torch.load(tmp_path / "run" / name, weights_only=True)
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["attention_resolutions"] == "16" and config["training"]["precision"] == "bf16"
    # Finished, and asked for again with a base that is another one by now.
    (tmp_path / "map.json").write_text(json.dumps(MAP | {"CAR": "sky"}))
    flags = starting(places, tmp_path / "run", **settings, class_map=tmp_path / "map.json")
    start = json.loads((tmp_path / "run" / "config.json").read_text())
    start["start"]["class_map"] = str(tmp_path / "map.json")
    (tmp_path / "run" / "config.json").write_text(json.dumps(start))
    result = run_here("image_train.py", *flags)
    assert result.returncode == 1 and "has changed since it began from it" in result.stdout


def test_without_a_map_names_decide_and_instances_are_taken_where_the_data_has_them(places, tmp_path):
    result = run_here("image_train.py", *starting(places, tmp_path, data_dir=places / "old", class_map=""))
    assert result.returncode == 0, result.stdout
    assert "3 car             3 car        same name" in result.stdout and "comes along" in result.stdout
    assert not json.loads((tmp_path / "config.json").read_text())["model"]["no_instance"]


def test_a_file_of_another_program_needs_no_record(places, tmp_path):
    """Weights in a wrapper, with a prefix, and no config.json: the settings follow from their shapes and the flags."""
    average = torch.load(places / "base" / "ema_0.9_best.pt", weights_only=True)
    (tmp_path / "bare").mkdir()
    file = tmp_path / "bare" / "last.ckpt"
    torch.save({"model": average, "ema": {f"module.{name}": value for name, value in average.items()}}, file)
    (tmp_path / "bare" / "dataset.json").write_text(json.dumps({"classes": OLD}))
    flags = NETWORK | {"transfer_from": file, "lr": 0}
    result = run_here("image_train.py", *starting(places, tmp_path / "run", **flags))
    assert result.returncode == 1 and "--weights_key" in result.stdout, result.stdout
    result = run_here("image_train.py", *starting(places, tmp_path / "run", **flags, weights_key="ema"))
    assert result.returncode == 0 and "took the prefix module." in result.stdout, result.stdout
    unseen = result.stdout.split("They do not show")[1].splitlines()[0]  # of the old network, but its size and classes
    assert "noise_schedule linear" in unseen and "image_size" not in unseen and "num_classes" not in unseen
    rows = [Row("", tuple(ids), BY_MAP) for ids in ROWS]
    expected = adapt(average, rows, old_edge=True, new_edge=False, learn_sigma=DIFFUSION["learn_sigma"])
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(resume_checkpoint="model.pt"), r"exclude each other"),
        (dict(transfer_from=""), r"--class_map .* goes with --transfer_from"),
        (dict(transfer_from="nowhere.pt"), r"there is no checkpoint nowhere\.pt \(--transfer_from\)"),
        (dict(transfer_from="{root}/base/opt000001.pt"), r"does not hold a network's state dict"),
        (
            dict(transfer_from="{root}/other.pt", no_instance=True),
            r"other\.pt does not hold the weights of an SDM network",
        ),
        (dict(class_map="{root}/wrong.json"), r"wrong\.json: the new data has no class 'roof'"),
        (dict(num_channels=64), r"--num_channels 64 contradicts .* num_channels 32"),
        (dict(num_res_blocks=2), r"--num_res_blocks 2 contradicts .* num_res_blocks 1"),
        (dict(noise_schedule="cosine"), r"--noise_schedule cosine contradicts"),
        (dict(no_instance=False), r"has no instance maps"),
        (dict(logdir="{root}/base"), r"the run in .*base did not begin with --transfer_from"),
    ],
)
def test_what_is_refused_is_named_and_leaves_nothing(places, tmp_path, settings, said):
    torch.save({"weight": torch.zeros(3)}, places / "other.pt")
    (places / "wrong.json").write_text('{"roof": "sky"}')
    settings = {k: v.format(root=places) if isinstance(v, str) else v for k, v in settings.items()}
    logdir = settings.pop("logdir", tmp_path / "run")
    before = sorted(path.name for path in (places / "base").iterdir())
    for dry_run in (True, False):
        result = run_here("image_train.py", *starting(places, logdir, dry_run=dry_run, **settings))
        assert result.returncode == 1
        assert re.search(said, result.stdout), result.stdout
    assert not (tmp_path / "run").exists() and before == sorted(path.name for path in (places / "base").iterdir())
