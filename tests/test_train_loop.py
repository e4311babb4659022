"""The training loop, one rank, in this process."""

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from training_helpers import differing, make_loop, state_of

from guided_diffusion.image_datasets import DataError, training_batches
from guided_diffusion.layouts.lookup import LabelLayout
from guided_diffusion.seeding import normals, stable_seed
from guided_diffusion.settings import ConfigError
from guided_diffusion.train_util import TrainingDiverged
from guided_diffusion.weights import store


@pytest.fixture(scope="module")
def six_steps(data, tmp_path_factory):
    """An undisturbed run of six steps; where its files are."""
    logdir = tmp_path_factory.mktemp("six")
    make_loop(data, logdir, max_steps=6, save_interval=3).run()
    return logdir


def batch_of(loop):
    return next(training_batches(loop.dataset, batch_size=loop.config.batch_size, num_workers=0))


def poison(loop, steps):
    """The loss of the steps numbered in `steps` becomes infinite."""
    compute = loop.objective.losses

    def losses(*args):
        terms = compute(*args)
        return {name: value * math.inf for name, value in terms.items()} if loop.state.step in steps else terms

    loop.objective.losses = losses


def snapshot(loop):
    ema = {
        f"{rate}/{i}": tensor.clone() for rate, tensors in loop.state.emas.items() for i, tensor in enumerate(tensors)
    }
    return ema | {name: p.detach().clone() for name, p in loop.model.named_parameters()}


def test_gradient_of_microbatches_equals_that_of_the_batch(data, tmp_path):
    gradients = []
    for microbatch in (-1, 1, 3):
        loop = make_loop(data, tmp_path, microbatch=microbatch)
        torch.nn.init.normal_(loop.model.out[2].weight)  # it starts at zero, and lets no gradient through
        loop.state.optimizer.step = lambda: None
        loop.train_step(batch_of(loop))
        gradients.append({name: p.grad for name, p in loop.model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            # sums in another order: float32 rounding, of gradients that partly cancel
            torch.testing.assert_close(
                other[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()) + 1e-6 * largest
            )


def test_half_and_resume_equals_the_whole(data, six_steps, tmp_path):
    make_loop(data, tmp_path, max_steps=3).run()
    make_loop(data, tmp_path, max_steps=6).run()
    assert differing(state_of(six_steps, 6), state_of(tmp_path, 6)) == []


def test_half_and_resume_with_history_and_dropout(data, tmp_path):
    options = dict(
        schedule_sampler="loss-second-moment",
        precision="bf16",
        weight_decay=0.1,
        model=dict(dropout=0.3),
        diffusion=dict(diffusion_steps=2, noise_schedule="cosine"),  # so that the history of ten losses is full soon
        val_images=0,
    )
    make_loop(data, tmp_path / "whole", max_steps=12, **options).run()
    make_loop(data, tmp_path / "half", max_steps=8, **options).run()
    loop = make_loop(data, tmp_path / "half", max_steps=12, **options)
    assert (loop.state.schedule_sampler.counts >= 10).all()
    loop.run()
    assert differing(state_of(tmp_path / "whole", 12), state_of(tmp_path / "half", 12)) == []


def test_the_loss_scale_survives_a_restart(data, tmp_path):
    loop = make_loop(data, tmp_path, precision="fp16", val_images=0)
    loop.trainer.log_loss_scale = 12.5
    loop.saving.save()
    assert make_loop(data, tmp_path, precision="fp16").trainer.log_loss_scale == 12.5
    assert not make_loop(data, tmp_path, precision="bf16").trainer.scaled


def test_averages_keep_the_memory_layout_of_their_weights(data, six_steps):
    """Else the fused kernels would be slow at best."""
    loop = make_loop(data, six_steps)
    for index, parameter in enumerate(loop.state.parameters):
        expected = parameter.stride()
        assert all(ema[index].stride() == expected for ema in loop.state.emas.values())
        assert loop.state.optimizer.state[parameter]["exp_avg"].stride() == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, precision):
    loop = make_loop(data, tmp_path, precision=precision)
    poison(loop, {0})
    for average in (tensor for ema in loop.state.emas.values() for tensor in ema):
        average.add_(0.1)  # apart from the weights, or a step towards them would not show
    before = snapshot(loop)
    loop.train_step(batch_of(loop))
    assert differing(before, snapshot(loop)) == []
    assert (loop.state.step, loop.trainer.bad_steps.read()) == (1, (1, 1, 1))
    moments = [value for values in loop.state.optimizer.state.values() for value in values.values()]
    assert not any(value.any() for value in moments)  # the optimizer has counted no step, and seen no gradient
    loop.trainer.log_loss_scale = 6.0 if precision == "fp16" else 0.0  # the first scale, 2^20, would be skipped too
    loop.train_step(batch_of(loop))
    assert differing(before, snapshot(loop))
    assert loop.trainer.bad_steps.read() == (1, 0, 1)


def test_too_many_bad_steps_name_the_last_good_checkpoint(data, tmp_path):
    loop = make_loop(data, tmp_path, max_steps=20, save_interval=2, max_bad_steps=3)
    poison(loop, {3, 6, 7, 8})  # one alone does no harm
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .*at step 9\).*model000006\.pt, from which"):
        loop.run()
    assert all(torch.isfinite(value).all() for value in state_of(tmp_path, 6).values())
    again = make_loop(data, tmp_path, max_steps=10, keep_checkpoints=1, save_interval=2, max_bad_steps=3)
    assert (again.state.step, again.trainer.bad_steps.read()) == (6, (1, 0, 0))
    assert again.run()


def test_within_a_row_of_bad_steps_nothing_good_is_replaced(data, tmp_path):
    """`--keep_checkpoints 1`: the good one stays. A run that is only stopped goes on where it was, and counts on."""
    settings = dict(save_interval=2, keep_checkpoints=1, max_bad_steps=5)
    loop = make_loop(data, tmp_path, max_steps=6, **settings)
    poison(loop, {3, 4, 5})
    loop.run()
    assert [store.read_manifest(str(tmp_path), step)["good"] for step in (2, 4, 6)] == [True, False, False]
    assert (tmp_path / "model.pt").samefile(tmp_path / "model000002.pt")
    again = make_loop(data, tmp_path, max_steps=20, **settings)
    assert (again.state.step, again.trainer.bad_steps.read()) == (6, (3, 3, 0))
    poison(again, {6, 7})
    with pytest.raises(TrainingDiverged, match=r"5 steps in a row .*at step 8\).*model000002\.pt"):
        again.run()
    final = make_loop(data, tmp_path, max_steps=8, **settings)
    assert (final.state.step, final.trainer.bad_steps.read()) == (2, (0, 0, 0))
    final.run()
    assert (tmp_path / "model.pt").samefile(tmp_path / "model000008.pt")


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path):
    """Before any step has noticed: the last one before the save has made them so."""
    loop = make_loop(data, tmp_path, max_steps=6, save_interval=2)
    after_step(loop, 4, lambda: loop.state.parameters[0].data.fill_(math.inf))
    with pytest.raises(TrainingDiverged, match=r"weights of step 4 are not finite.*model000002\.pt"):
        loop.run()
    assert not list(tmp_path.glob("*000004*"))


@pytest.mark.parametrize(
    ("bad", "look_interval", "save_interval", "stopped"),
    [({1, 2, 3}, 4, 100, 4), ({2, 3, 4}, 6, 100, 6), ({5, 6, 7}, 10, 9, 9)],
    ids=["the look is due", "a good step has followed", "before a save"],
)
def test_where_looking_costs_training_stops_a_little_later(data, tmp_path, bad, look_interval, save_interval, stopped):
    """On a GPU bad steps are looked at every few steps, and before a save: nothing that diverged is saved."""
    loop = make_loop(data, tmp_path, max_steps=20, save_interval=save_interval, max_bad_steps=3)
    loop.look_interval = look_interval
    poison(loop, bad)
    with pytest.raises(TrainingDiverged, match=rf"3 steps in a row .*at step {stopped}\)"):
        loop.run()
    assert not list(tmp_path.glob("model*.pt"))


def test_previews_do_not_change_the_training(data, six_steps, tmp_path):
    make_loop(data, tmp_path, max_steps=6, save_interval=3, sample_interval=2, model=dict(dropout=0.0)).run()
    assert (tmp_path / "preview_000004.png").stat().st_size > 1000
    assert differing(state_of(six_steps, 6), state_of(tmp_path, 6)) == []


def test_the_validation_loss_is_that_of_the_definition(data, tmp_path):
    loop = make_loop(data, tmp_path)
    torch.nn.init.normal_(loop.model.out[2].weight, std=0.01)
    before = copy.deepcopy(loop.model.state_dict())
    loss = loop.validation.loss(loop.model, loop.state.ema("0.9"))
    # The EMA's last layer is zero: so is its prediction, and the error is the noise's mean square.
    noise = normals([stable_seed("validation", slot) for slot in range(2)], (3, 16, 16))
    assert loss == pytest.approx(float((noise**2).mean()), rel=1e-6)
    assert loop.model.training
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())


def test_learning_rate_warms_up_and_anneals(data, tmp_path):
    loop = make_loop(data, tmp_path, lr=1.0, warmup_steps=4, lr_anneal_steps=20)
    rates = []
    for loop.state.step in range(20):
        loop._set_learning_rate()
        rates.append(loop.state.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates[:4], [0.25 * 1.0, 0.5 * 0.95, 0.75 * 0.9, 1.0 * 0.85])
    np.testing.assert_allclose(rates[4:], 1 - np.arange(4, 20) / 20)
    assert loop.last_step == 20


def test_ema_is_the_running_average(data, tmp_path):
    loop = make_loop(data, tmp_path)
    expected = [p.detach().double() for p in loop.state.parameters]
    for _ in range(3):
        loop.train_step(batch_of(loop))
        expected = [0.99 * e + 0.01 * p.detach().double() for e, p in zip(expected, loop.state.parameters, strict=True)]
    for ema, reference in zip(loop.state.emas["0.99"], expected, strict=True):
        torch.testing.assert_close(ema.double(), reference, rtol=1e-5, atol=1e-7)  # float32 against float64


def test_dropped_layouts_and_timesteps_follow_the_samples_position(data, tmp_path):
    """Batches of 4 and of 2 see the same timesteps, drops and noise at the same positions."""
    seen = {}
    for batch_size in (4, 2):
        loop = make_loop(data, tmp_path, batch_size=batch_size)
        compute, record = loop.objective.losses, []

        def losses(network, batch, draws, compute=compute, record=record):
            dropped = (batch.layout.ones == -1).all(dim=3).all(dim=2)[:, 0]
            noise = draws.noise.sum(dim=(1, 2, 3))
            record += zip(draws.timesteps.tolist(), dropped.tolist(), noise.tolist(), strict=True)
            return compute(network, batch, draws)

        loop.objective.losses = losses
        batches = training_batches(loop.dataset, batch_size=batch_size, num_workers=0)
        while len(record) < 24:
            loop.train_step(next(batches))
        seen[batch_size] = record
    assert seen[4] == seen[2]
    dropped = np.mean([drop for _, drop, _ in seen[4]])
    assert 0 < dropped < 0.7  # drop_rate 0.3 of 24: these numbers come with probability over 0.999


def test_settings_that_changed_since_the_save_are_told(data, tmp_path, capsys):
    make_loop(data, tmp_path, max_steps=1).run()
    make_loop(data, tmp_path, max_steps=2, lr=2e-3).run()
    assert "note: changed since the run was saved: lr 0.001 -> 0.002, max_steps 1 -> 2" in (
        (tmp_path / "log.txt").read_text()
    )


def test_rows(data, six_steps):
    rows = [json.loads(line) for line in (six_steps / "progress.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6]
    assert {"mse", "vb", "grad_norm", "param_norm", "lr", "images_per_second", "samples"} <= training[0].keys()
    assert [row["step"] for row in rows if "val_loss_0.99" in row] == [3, 6]


def test_a_start_that_is_refused_creates_nothing(data, six_steps, tmp_path):
    logdir = tmp_path / "run"
    with pytest.raises(store.CheckpointError, match=r"64 channels|num_channels"):
        make_loop(data, logdir, model=dict(num_channels=64), resume_checkpoint=str(six_steps / "model.pt"))
    with pytest.raises(ConfigError, match="multiples of 32"):
        make_loop(data, logdir, model=dict(channel_mult="1,1,1,1,1,1"))
    assert not logdir.exists()


def test_a_log_directory_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(store.CheckpointError, match=r"cannot write to the log directory .*file/run"):
        make_loop(data, tmp_path / "file" / "run", max_steps=1).run()


def test_a_disk_that_fills_up_during_a_save_ends_the_run_with_the_old_set_whole(data, tmp_path, monkeypatch):
    loop = make_loop(data, tmp_path, max_steps=4, save_interval=2)
    real = torch.save

    def save(content, file):
        if loop.state.step == 4 and "exp_avg" in str(content)[:2000]:
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(store.CheckpointError, match=r"cannot write .*opt000004\.pt.*No space left"):
        loop.run()
    assert store.newest_complete(str(tmp_path), print)["step"] == 2
    assert not list(tmp_path.glob("*000004*")) and not list(tmp_path.glob("*.tmp*"))


def test_fine_tuning_starts_from_the_weights_alone(data, six_steps, tmp_path):
    loop = make_loop(data, tmp_path, resume_checkpoint=str(six_steps / "model.pt"))
    assert (loop.state.step, len(loop.state.optimizer.state)) == (0, 0)
    weights = torch.load(six_steps / "model.pt", weights_only=True)
    assert differing(weights, dict(loop.model.state_dict())) == []
    assert differing(weights, loop.state.ema("0.99")) == []


def test_a_run_that_was_killed_before_publishing_does_so_later(data, six_steps, tmp_path):
    """Between the manifest and model.pt there is a moment: continuing makes up for what was not done in it."""
    for path in six_steps.glob("*000003*"):
        shutil.copy(path, tmp_path)
    loop = make_loop(data, tmp_path, max_steps=3)
    loop.run()
    assert (
        differing(
            torch.load(tmp_path / "model.pt", weights_only=True),
            torch.load(six_steps / "model000003.pt", weights_only=True),
        )
        == []
    )
    assert (tmp_path / "ema_0.9_best.pt").exists()


def test_bad_data_stops_the_run_by_name(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "labels" / "scene3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"scene3\.png"):
        make_loop(tmp_path / "data", tmp_path / "run", max_steps=10).run()


def test_a_bad_validation_file_is_found_before_the_first_step(data, tmp_path):
    """Not at the first save, when there is something to lose."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "val" / "labels" / "scene1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"scene1\.png"):
        make_loop(tmp_path / "data", tmp_path / "run")
    loop = make_loop(tmp_path / "data", tmp_path / "run", max_steps=1, skip_bad=True)
    assert len(loop.validation.indices) == 1
    loop.run()
    assert "1 images" in json.loads((tmp_path / "run" / "best.json").read_text())["0.9"]["measure"]
    (tmp_path / "data" / "val" / "labels" / "scene0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no validation image can be read"):
        make_loop(tmp_path / "data", tmp_path / "other", skip_bad=True)


def test_a_validation_or_preview_that_fails_loses_nothing(data, six_steps, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("none is left")

    loop = make_loop(data, tmp_path, max_steps=6, save_interval=3, sample_interval=2)
    best = loop.validation._sum
    monkeypatch.setattr(loop.previews, "page", fail)
    monkeypatch.setattr(loop.validation, "_sum", lambda *a: fail() if loop.state.step == 6 else best(*a))
    loop.run()
    assert differing(state_of(tmp_path, 6), state_of(six_steps, 6)) == []
    said = (tmp_path / "log.txt").read_text()
    assert "no validation loss of step 6: OutOfMemoryError" in said and "no preview of step 2" in said
    assert json.loads((tmp_path / "best.json").read_text())["0.9"]["step"] == 3


def test_a_save_on_a_signal_writes_before_it_measures(data, tmp_path, monkeypatch):
    """Who sent the signal may not wait; what is there by then is whole, and the loss follows if there is time."""
    loop = make_loop(data, tmp_path, save_interval=3)
    step, measure, seen = loop.train_step, loop.validation.loss, []

    def stopped_at_step_five(batch):
        step(batch)
        if loop.state.step == 5:
            signal.raise_signal(signal.SIGTERM)

    def noted(*arguments):
        seen.append((loop.state.step, (tmp_path / f"checkpoint{loop.state.step:06d}.json").exists()))
        return measure(*arguments)

    monkeypatch.setattr(loop, "train_step", stopped_at_step_five)
    monkeypatch.setattr(loop.validation, "loss", noted)
    loop.run()
    assert sorted(set(seen)) == [(3, False), (5, True)]
    assert store.newest_complete(str(tmp_path), print)["validation_loss"].keys() == {"0.9", "0.99"}
    assert "val_loss_0.9" in (tmp_path / "progress.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("last", "finished", "told"), [(3, False, "stopped by"), (2, True, "done: 2"), (0, True, "stopped by")]
)
def test_run_tells_whether_a_signal_left_steps_to_do(data, tmp_path, monkeypatch, last, finished, told):
    """The second step's signal: before the last step, at it, and where there is none."""
    loop = make_loop(data, tmp_path, max_steps=last)
    step = loop.train_step

    def stopped_at_step_two(batch):
        step(batch)
        if loop.state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", stopped_at_step_two)
    assert loop.run() is finished
    assert loop.state.step == 2 and told in (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert store.newest_complete(str(tmp_path), print)["step"] == 2


def after_step(loop, number, action):
    """`action` happens once step `number` is taken."""
    step = loop.train_step

    def train_step(batch):
        step(batch)
        if loop.state.step == number:
            action()

    loop.train_step = train_step


def out_of_memory(loop):
    def losses(*_):
        raise torch.OutOfMemoryError("none is left")

    loop.objective.losses = losses


@pytest.mark.parametrize("end", ["a photograph vanishes", "a loader is killed", "no memory", "no row of figures"])
def test_whatever_ends_a_run_its_steps_are_saved_and_it_goes_on_to_the_same_weights(data, six_steps, tmp_path, end):
    shutil.copytree(data, tmp_path / "data")
    photographs = tmp_path / "data" / "train" / "images"
    loop = make_loop(tmp_path / "data", tmp_path / "run", max_steps=6)
    loop.num_workers = int(end == "a loader is killed")

    def kill():
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        child.join()  # the signal of its death comes here, where nothing may be raised
        assert loop.state.step == 4

    def no_row(row):
        raise OSError(28, "No space left on device", "progress.jsonl")

    action, error = {
        "a photograph vanishes": (lambda: photographs.rename(tmp_path / "elsewhere"), (DataError, r"images")),
        "a loader is killed": (kill, (DataError, "a process that loads data has died")),
        "no memory": (lambda: out_of_memory(loop), (torch.OutOfMemoryError, "none is left")),
        "no row of figures": (lambda: setattr(loop.logger, "row", no_row), (OSError, "No space left")),
    }[end]
    after_step(loop, 4, action)
    with pytest.raises(error[0], match=error[1]):
        loop.run()
    manifest = store.newest_complete(str(tmp_path / "run"), print)
    assert (manifest["step"], manifest["samples_seen"]) == (4, 16) and error[0].__name__ in manifest["emergency"]
    assert "ended at step 4; all is saved. The reason" in (tmp_path / "run" / "log.txt").read_text()
    make_loop(data, tmp_path / "run", max_steps=6).run()
    assert differing(state_of(six_steps, 6), state_of(tmp_path / "run", 6)) == []


def test_weights_that_were_being_changed_are_not_saved(data, tmp_path, monkeypatch):
    """Half of them are of one step and half of another."""
    loop = make_loop(data, tmp_path, max_steps=6, save_interval=2)
    after_step(loop, 3, lambda: setattr(loop, "_after_step", lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert store.newest_complete(str(tmp_path), print)["step"] == 2 and not list(tmp_path.glob("*000004*"))
    assert "while the weights were being changed" in (tmp_path / "log.txt").read_text()


def test_a_rank_tells_the_log_directory_from_one_of_the_same_name_on_its_own_host(data, tmp_path):
    saving = make_loop(data, tmp_path).saving
    saving.open()
    saving.world = types.SimpleNamespace(is_main=False)
    assert saving.reaches_directory()
    os.utime(tmp_path / ".lock", (0, 0))  # that of another run
    assert not saving.reaches_directory()
    os.remove(tmp_path / ".lock")
    assert not saving.reaches_directory()


def test_a_run_that_fails_before_its_first_step_saves_nothing(data, tmp_path):
    loop = make_loop(data, tmp_path, max_steps=6)
    out_of_memory(loop)
    with pytest.raises(torch.OutOfMemoryError):
        loop.run()
    assert not list(tmp_path.glob("*.pt"))


def test_looking_layouts_up_changes_nothing_but_the_rounding(data, tmp_path, monkeypatch):
    make_map, once_each = LabelLayout._make_map, []

    def noted(layout, size):
        once_each.append(make_map(layout, size).products is not None)
        return make_map(layout, size)

    monkeypatch.setattr(LabelLayout, "_make_map", noted)
    results = []
    for choice, maps in (("false", set()), ("auto", {True, False})):
        make_loop(data, tmp_path / choice, max_steps=6, layout_lookup=choice).run()
        assert set(once_each) == maps  # it pays at one resolution, at another not
        results.append(state_of(tmp_path / choice, 6))
    convolved, looked_up = results
    assert any(not torch.equal(looked_up[name], convolved[name]) for name in looked_up)
    for name in looked_up:
        if name.startswith("ema_0.99"):
            # Adam divides by the gradient's own size: six steps of 1e-3, of which the average takes a hundredth
            torch.testing.assert_close(looked_up[name], convolved[name], rtol=1e-4, atol=2e-5)


def test_what_cannot_be_looked_up_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="layout_lookup must be auto, true or false; got 'yes'"):
        make_loop(data, tmp_path, layout_lookup="yes")
    with pytest.raises(ConfigError, match="layout_lookup true cannot be compiled"):
        make_loop(data, tmp_path, layout_lookup="True", compile=True)


def test_compiled_training_keeps_the_names_and_the_numbers(data, tmp_path, monkeypatch):
    """With a backend that runs the traced graphs as they are: generating code for them takes minutes on two cores."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_with(network, backend="aot_eager"))
    make_loop(data, tmp_path, max_steps=1, compile=True).run()
    make_loop(data, tmp_path / "plain", max_steps=1).run()
    compiled, plain = state_of(tmp_path, 1), state_of(tmp_path / "plain", 1)
    assert compiled.keys() == plain.keys()
    for name in plain:
        if name.startswith("ema_0.99"):
            # Adam divides by the gradient's own size: a step of 1e-3, of which the average takes a hundredth
            torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=2e-5)
