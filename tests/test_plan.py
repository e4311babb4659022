"""--dry_run: what it counts against what real steps allocate and compute; what it checks; that it writes nothing."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import load_script, write_custom
from sampling_helpers import save_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import CLASSES, DIFFUSION, MODEL, TRAINING, flags, make_data, make_loop

from guided_diffusion.image_datasets import training_batches
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.footprint import Passes, Pretence, blank_batch, largest_batch, network_rows, sampling_pass
from guided_diffusion.runs.plan_sampling import count_sampling, pretended_pipeline
from guided_diffusion.runs.plan_training import _largest_share, count_training
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.settings import ConfigError, DiffusionConfig, ModelConfig, PlanConfig, Sampling, TrainConfig

SIZE = 32
NETWORK = MODEL | dict(image_size=SIZE, attention_resolutions="16", resblock_updown=True)
# Of what is measured: the promise of docs/memory.md. Found on a CPU: up to 0.04 in training, 0.07 in sampling.
SHARE = 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def larger_data(tmp_path_factory):
    return write_custom(tmp_path_factory.mktemp("data"), {"train": 10, "val": 2}, size=(40, 36), classes=CLASSES)


def allocated(events) -> int:
    """The most bytes at a time that PyTorch's allocator has given out, by the profiler's record of it."""
    alive = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def recorded():
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def events(prof):
    return prof.profiler.kineto_results.events()


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision,recompute,look_up,microbatch",
    [
        ("fp32", False, True, -1),
        ("fp32", True, False, 2),
        ("bf16", False, False, -1),
        ("bf16", True, True, -1),
    ],
)
def test_a_training_takes_what_is_counted(precision, recompute, look_up, microbatch, larger_data, tmp_path):
    """Weights, optimizer, averages, and two real steps of the training loop."""
    settings = dict(precision=precision, layout_lookup=str(look_up), microbatch=microbatch)
    model = NETWORK | dict(use_checkpoint=recompute)
    with recorded() as prof:
        loop = make_loop(larger_data, tmp_path, model=model, **settings)
        with training_batches(loop.dataset, batch_size=4, num_workers=0) as batches:
            batch = next(batches)
        for _ in range(2):
            loop.train_step(batch)
    measured = allocated(events(prof))
    assert len(loop.state.optimizer.state) == len(loop.state.parameters)
    images = loop.microbatch
    # Other numbers of images, where the rest follows from them; but which layouts repeat differs from image to image.
    numbers = (4, 3) if look_up else (3, 4) if images == 2 else (2, 3)
    batches = tuple({name: batch[name][:n] for name in ("image", "label")} for n in numbers)
    config = TrainConfig(**TRAINING | settings)
    counted = count_training(
        ModelConfig(**model), DiffusionConfig(**DIFFUSION), config, "cpu", batches, look_up=look_up
    )
    static = sum(counted.static.values())
    assert counted.total(images) == pytest.approx(measured, rel=SHARE)
    assert counted.passes.peak(images) == pytest.approx(measured - static, rel=SHARE)  # not by the weights alone


@pytest.mark.parametrize("keep,guided", [(True, False), (False, False), (True, True)])
def test_a_sampling_takes_what_is_counted(keep, guided, tmp_path):
    """`guided`: by another network, in place of the null layout."""
    model, diffusion = ModelConfig(**NETWORK), DiffusionConfig(**DIFFUSION)
    label = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.uint8)
    pipeline = SDMPipeline(
        create_model(model, True), model, diffusion, precision="bf16", device="cpu", keep_modulations=str(keep)
    )
    chosen, guide = Sampling(num_steps=2, s=1.5), None
    if guided:
        model = dataclasses.replace(model, num_channels=2 * model.num_channels)
        guide = SDMPipeline(create_model(model, True), model, diffusion, precision="bf16", device="cpu")
        chosen = dataclasses.replace(chosen, guidance="autoguidance", guide_path="there")
        pipeline._guide = ("there", guide)
    with recorded() as prof:
        for _ in range(2):  # the null layout is kept from one to the next
            pipeline.generate(label, None, seeds=[0, 1, 2], sampling=chosen)
    counted = count_sampling(pipeline, "cpu", (SIZE, SIZE), scale=1.5, keep=keep, guide=guide)
    assert counted.peak(3) == pytest.approx(allocated(events(prof)), rel=SHARE)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kept_modulations_are_those_of_the_network(device):
    model, diffusion = ModelConfig(**NETWORK), DiffusionConfig(**DIFFUSION)
    with torch.device("meta"):
        network = create_model(model, True)
    pipeline = SDMPipeline(network, model, diffusion, precision="bf16", device="meta")
    counted = count_sampling(pipeline, device, (SIZE, SIZE), scale=1.5, keep=True)
    assert counted.kept(3) - counted.kept(2) == pytest.approx(network.modulation_bytes(SIZE, SIZE), rel=0.01)
    real = create_model(model, True).convert_to(torch.bfloat16)
    with torch.inference_mode():
        layout = real.encode_layout(torch.zeros(1, CLASSES, SIZE, SIZE), keep=True)
    storages = {t.untyped_storage()._cdata: t for pair in layout._modulations.values() for t in pair}
    assert network.modulation_bytes(SIZE, SIZE) == sum(t.untyped_storage().nbytes() for t in storages.values())


def test_other_batches_follow_from_two():
    """What is told of a batch is what its own count says; several ranks have their gradients all the time."""
    model = ModelConfig(**NETWORK | dict(use_checkpoint=True))
    arguments = model, DiffusionConfig(**DIFFUSION), TrainConfig(**TRAINING, precision="bf16"), "cuda"

    def batches(*counts):
        return tuple(blank_batch(n, (SIZE, SIZE), CLASSES, False) for n in counts)

    two = count_training(*arguments, batches(2, 3))
    seven = count_training(*arguments, batches(7, 8))
    assert two.total(7) == seven.total(7) == sum(seven.static.values()) + seven.passes.one.peak
    assert two.passes.operations(7) == seven.passes.one.operations and two.passes.kept(7) == seven.passes.one.kept
    most = largest_batch(two.total, 2**28)
    assert two.total(most) <= 2**28 < two.total(most + 1)
    assert largest_batch(two.total, sum(two.static.values())) == 0
    several = count_training(*arguments, batches(2, 3), ranks=2)
    assert two.total(7) < several.total(7) <= two.total(7) + two.static["weights"]


def test_recomputation_is_cheaper_in_memory_and_dearer_in_operations():
    batches = tuple(blank_batch(n, (SIZE, SIZE), CLASSES, True) for n in (2, 3))
    plain, again = (
        count_training(
            ModelConfig(**NETWORK | dict(use_checkpoint=recompute, no_instance=False)), DiffusionConfig(**DIFFUSION),
            TrainConfig(**TRAINING, precision="fp16"), "cuda", batches,
        ).passes
        for recompute in (False, True)
    )  # fmt: skip
    assert again.kept(8) < plain.kept(8) / 3 and again.peak(8) < plain.peak(8)
    assert again.first(8) == plain.first(8)
    # the first half's last convolution is not made again: recomputation stops at the last tensor that is needed
    assert 0.6 * plain.first(8) < again.operations(8) - plain.operations(8) <= plain.first(8)


def test_the_optimizer_is_dealt_out_as_among_ranks():
    assert _largest_share([3, 5, 4, 3], 2) == 8 and _largest_share([3, 5, 4, 3], 1) == 15
    batches = tuple(blank_batch(n, (SIZE, SIZE), CLASSES, False) for n in (1, 2))
    config = TrainConfig(**TRAINING, shard_optimizer=True)
    static = count_training(
        ModelConfig(**NETWORK), DiffusionConfig(**DIFFUSION), config, "cuda", batches, ranks=4
    ).static
    assert static["averages"] == 2 * static["weights"]
    assert static["optimizer"] == pytest.approx(static["weights"] / 2, rel=0.05)


# -- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_are_those_of_a_real_pass(device):
    """PyTorch's own counter on real tensors, with attention written out as two products."""
    config, diffusion = ModelConfig(**NETWORK), create_gaussian_diffusion(DiffusionConfig(**DIFFUSION))
    network = create_model(config, True)
    x, t, y = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.int64), torch.zeros(1, CLASSES, SIZE, SIZE)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = diffusion.training_losses(network, x, t, {"y": y}, x)["loss"].sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    pretence = Pretence.of(device)
    with torch.device("meta"):
        pretended = pretence.network(create_model(config, True), training=False)
    rows, total = network_rows(pretence, pretended, (SIZE, SIZE))
    assert total == forward.get_total_flops() - backward.get_total_flops()
    assert sum(row.parameters for row in rows) < sum(p.numel() for p in network.parameters())
    assert 0.95 * total < sum(row.operations for row in rows) < total
    described = [(row.part, row.size, row.width, row.blocks, len(row.attention)) for row in rows]
    assert described == [
        ("encoder", (32, 32), 32, 1, 0), ("encoder", (16, 16), 64, 2, 1), ("middle", (16, 16), 64, 2, 1),
        ("decoder", (16, 16), 64, 2, 2), ("decoder", (32, 32), 32, 3, 0),
    ]  # fmt: skip
    if device == "meta":
        batches = tuple(blank_batch(n, (SIZE, SIZE), CLASSES, False) for n in (1, 2))
        config_ = TrainConfig(**TRAINING)
        counted = count_training(config, DiffusionConfig(**DIFFUSION), config_, "cuda", batches).passes
        # The fused kernel makes one of its products once more in the backward pass.
        attention = 4 * 2 * 16**4 * 64
        assert counted.operations(1) == forward.get_total_flops() + attention


def test_a_guided_step_makes_the_encoder_once():
    """As many operations as the encoder once and the rest twice, less the modulations, which are kept."""
    config, diffusion = ModelConfig(**NETWORK), create_gaussian_diffusion(DiffusionConfig(**DIFFUSION))
    pretence = Pretence.of("cuda")
    with torch.device("meta"):
        model = pretence.network(create_model(config, True), training=False)
    rows, total = network_rows(pretence, model, (SIZE, SIZE))
    encoder = sum(row.operations for row in rows if row.part == "encoder")
    one, two = (
        Passes(*(
            sampling_pass(
                pretence, model, diffusion.p_mean_variance, blank_batch(n, (SIZE, SIZE), CLASSES, False), CLASSES,
                images=n, scale=1.5, keep=keep,
            )
            for n in (2, 3)
        ))
        for keep in (True, False)
    )  # fmt: skip
    layout = one.first(1)
    step = one.operations(1) - layout
    rest = total - layout - step
    assert step == pytest.approx(encoder + 2 * (total - layout - encoder), rel=0.02), rest
    assert two.first(1) == 0 and two.operations(4) == pytest.approx(4 * step + 5 * layout, rel=0.01)  # the null once


# -- the scripts ------------------------------------------------------------------------------------------------------


def start(monkeypatch, capsys, script: str, *arguments) -> tuple[str, str]:
    """(what a start prints, the error that it ends with or "")."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    error = ""
    try:
        assert load_script(script).main() == 0
    except SystemExit as end:
        error = str(end)
    printed = capsys.readouterr()
    return printed.out + printed.err, error


def contents(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: what it holds, and when it was changed."""
    return {
        str(path): (path.stat().st_mtime_ns, path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest())
        for path in [folder, *folder.rglob("*")]
    }


def training_flags(data, logdir, **settings) -> list[str]:
    return flags(data, logdir, **settings)[1:]


def test_a_plan_of_a_training_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loop = make_loop(data, tmp_path / "log", max_steps=1)
    assert loop.run()
    loop.logger.close()
    del loop  # and with it the lock
    for logdir, step in ((tmp_path / "log", 1), (tmp_path / "new" / "log", 0)):
        before = contents(tmp_path), contents(data)
        device = "cpu" if step else "gpu"
        more = dict(dry_run=True, max_steps=11, peak_tflops=0.001, peak_share=0.5, memory_gib=1, plan_device=device)
        out, error = start(monkeypatch, capsys, "image_train.py", *training_flags(data, logdir, **more))
        assert not error and (contents(tmp_path), contents(data)) == before
        assert ("at step 1" if step else "from new weights") in out and f"for {11 - step} steps" in out
        assert "10 training images, 2 validation images; an epoch is 2.5 steps of 4" in out
        assert f"counted for a {device.upper()}" in out and "largest batch in 1 GiB" in out
        assert ("looked up" in out) == (device == "cpu")
        assert "not checked" not in out


def test_a_plan_does_without_data_and_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = [part for name, value in (MODEL | DIFFUSION).items() for part in (f"--{name}", value)]
    plan = ["--dry_run", "True", "--plan_device", "gpu", "--batch_size", 3]
    out, error = start(monkeypatch, capsys, "image_train.py", *network, *plan, "--logdir", tmp_path / "log")
    assert not error and "not checked: the data set" in out and "counted for a GPU" in out
    assert "give --memory_gib" in out and "3 images of 16x16" in out
    plan += ["--memory_gib", 2, "--s", 1.5, "--results_path", tmp_path / "results", "--num_steps", 20]
    plan += ["--peak_tflops", 1, "--peak_share", 0.5]
    out, error = start(monkeypatch, capsys, "image_sample.py", *network, *plan)
    assert not error and "not checked: the checkpoint" in out and "an image of 20 steps" in out
    assert "largest batch in 2 GiB" in out and not list(tmp_path.iterdir())


def test_a_plan_of_a_sampling_writes_nothing(data, tmp_path, monkeypatch, capsys):
    checkpoint = save_checkpoint(tmp_path / "run", data)
    arguments = [
        "--model_path",
        checkpoint,
        "--results_path",
        tmp_path / "results",
        "--num_steps",
        2,
        "--batch_size",
        2,
    ]
    plan = [*arguments, "--dry_run", "True", "--memory_gib", "1", "--plan_device", "gpu"]
    before = contents(tmp_path)
    out, error = start(monkeypatch, capsys, "image_sample.py", *plan)
    assert not error and "2 to make, of 2" in out and contents(tmp_path) == before
    assert start(monkeypatch, capsys, "image_sample.py", *arguments)[1] == ""
    (tmp_path / "results" / "samples").joinpath(
        sorted(p.name for p in (tmp_path / "results/samples").iterdir())[0]
    ).unlink()
    before = contents(tmp_path)
    out, error = start(monkeypatch, capsys, "image_sample.py", *plan)
    assert not error and "1 to make, of 2" in out and contents(tmp_path) == before
    for changed in (["--seed", 1], ["--num_classes", 5], ["--eta", 2], ["--labels_dir", tmp_path / "run"]):
        before = contents(tmp_path)
        dry = start(monkeypatch, capsys, "image_sample.py", *plan, *changed)[1]
        assert contents(tmp_path) == before
        assert dry and dry == start(monkeypatch, capsys, "image_sample.py", *arguments, *changed)[1]


def test_bad_settings_meet_the_errors_of_a_start(data, tmp_path, monkeypatch, capsys):
    other = make_loop(data, tmp_path / "other", model=dict(num_channels=64), max_steps=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    torch.save(other.model.state_dict(), foreign / "model.pt")
    (tmp_path / "file").write_text("no folder")
    bad = [
        dict(ema_rate="1.5"),
        dict(image_size=24, channel_mult="1,2,2,2,2", attention_resolutions=""),
        dict(data_dir=tmp_path / "nowhere"),
        dict(resume_checkpoint=tmp_path / "nowhere.pt"),
        dict(resume_checkpoint=foreign / "model.pt"),
        dict(logdir=foreign),
        dict(logdir=tmp_path / "file" / "log"),
        dict(no_instance=False),
        dict(peak_share=0.4),
    ]
    for settings in bad:
        settings = dict(data=data, logdir=tmp_path / "log") | {
            "data" if k == "data_dir" else k: v for k, v in settings.items()
        }
        arguments = training_flags(settings.pop("data"), settings.pop("logdir"), max_steps=1, **settings)
        before = contents(tmp_path)
        dry = start(monkeypatch, capsys, "image_train.py", *arguments, "--dry_run", "True")[1]
        assert contents(tmp_path) == before
        real = start(monkeypatch, capsys, "image_train.py", *arguments)[1]
        assert dry.startswith("error: ") and dry.split(" (")[0] == real.split(" (")[0], (settings, dry, real)


def test_a_folder_in_use_is_refused(data, tmp_path, monkeypatch, capsys):
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 1'); "
        "f.flush(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = contents(tmp_path)
        error = start(monkeypatch, capsys, "image_train.py", *training_flags(data, tmp_path, dry_run=True))[1]
        process.kill()
    assert "is in use by another run (process 1)" in error and contents(tmp_path) == before


@pytest.mark.parametrize(
    "bad", [dict(plan_device="tpu"), dict(memory_gib=-1), dict(peak_share=2.0, peak_tflops=1.0), dict(peak_tflops=1.0)]
)
def test_impossible_plans_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PlanConfig(**bad)


def test_a_plan_leaves_no_trace_in_what_runs_record():
    recorded_settings = {f.name for cls in (TrainConfig, ModelConfig, DiffusionConfig) for f in dataclasses.fields(cls)}
    assert not recorded_settings & {field.name for field in dataclasses.fields(PlanConfig)}


def test_a_pretended_pipeline_has_no_content(tmp_path):
    pipeline = pretended_pipeline("", precision="fp16", device="cpu", keep_modulations="auto", compile=False, **NETWORK)
    assert all(p.is_meta and p.dtype == torch.float16 for p in pipeline.model.parameters())
