"""From where a run starts, and what it must not write over."""

import shutil

import pytest
import torch
from training_helpers import make_loop

from guided_diffusion.runs.optimizers import load_optimizer_state
from guided_diffusion.weights import store
from guided_diffusion.weights.store import CheckpointError


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Two steps, saved once."""
    logdir = tmp_path_factory.mktemp("run")
    make_loop(data, logdir, max_steps=2).run()
    return logdir


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


@pytest.mark.parametrize("missing", ["opt000002.pt", "model000002.pt"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(data, run, tmp_path, missing):
    """It would replace model.pt by new weights. What the message offers works, where weights are left."""
    logdir = tmp_path / "run"
    shutil.copytree(run, logdir)
    (logdir / missing).unlink()
    before = files_of(logdir)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*--resume_checkpoint .*model000002\.pt"):
        make_loop(data, logdir, max_steps=4)
    assert files_of(logdir) == before
    if missing.startswith("opt"):
        weights = str(logdir / "model000002.pt")
        with pytest.raises(CheckpointError, match="is whole"):
            make_loop(data, logdir, max_steps=4, resume_checkpoint=str(run / "model.pt"))
        loop = make_loop(data, tmp_path / "other", max_steps=3, resume_checkpoint=weights)
        assert loop.state.step == 2 and loop.run()


def test_weights_of_others_in_the_log_directory_stay(data, run, tmp_path):
    """A downloaded model.pt; but a numbered checkpoint of another program is a run that may go on in its folder."""
    for name in ("model.pt", "ema_0.9_best.pt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        shutil.copy(run / name, folder)
        before = files_of(folder)
        for start in ("", str(run / "model000002.pt"), str(folder / name)):
            with pytest.raises(CheckpointError, match=f"holds {name}"):
                make_loop(data, folder, max_steps=1, resume_checkpoint=start)
        assert files_of(folder) == before
    folder = tmp_path / "numbered"
    folder.mkdir()
    for name in ("model.pt", "model000002.pt", "opt000002.pt"):
        shutil.copy(run / name, folder)
    assert make_loop(data, folder, max_steps=3, resume_checkpoint=str(folder / "model000002.pt")).run()


def test_a_finished_fine_tuning_tells_that_its_base_was_trained_further(data, run, tmp_path):
    """Else a chain of training, fine-tuning and sampling would go on with the old weights."""
    base = tmp_path / "base"
    shutil.copytree(run, base)
    tuning = dict(resume_checkpoint=str(base / "model.pt"), logdir=tmp_path / "tuning")

    def tune(steps, **changes):
        return make_loop(data, max_steps=steps, **tuning | changes).run()

    assert tune(2) and tune(2)  # again: nothing to do
    make_loop(data, base, max_steps=3).run()
    assert tune(3)  # not finished: it goes on
    with pytest.raises(CheckpointError, match=r"this run is finished, but .*model\.pt has changed"):
        tune(3)
    assert tune(3, resume_checkpoint="")
    assert tune(3, logdir=tmp_path / "anew")


def test_settings_of_every_group_that_changed_since_the_save_are_told(data, run, tmp_path):
    logdir = tmp_path / "run"
    shutil.copytree(run, logdir)
    shutil.copytree(data, tmp_path / "data")
    changes = dict(model=dict(dropout=0.3), diffusion=dict(use_kl=True))
    make_loop(tmp_path / "data", logdir, max_steps=3, lr=2e-3, **changes).run()
    (note,) = [line for line in (logdir / "log.txt").read_text().splitlines() if "note: changed since" in line]
    for told in ("data_dir", "lr 0.001 -> 0.002", "max_steps 2 -> 3", "dropout 0.0 -> 0.3", "use_kl False -> True"):
        assert told in note
    # Another loss: the lower number before is no better.
    assert store.read_manifest(str(logdir), 3)["measure"].endswith("variational bound")
    assert '"step": 3' in (logdir / "best.json").read_text()


def test_the_optimizer_of_another_program_does_not_choose_the_kernels():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    plain = torch.optim.AdamW([weight])
    plain.step()
    state = plain.state_dict()
    for name in ("fused", "foreach"):
        del state["param_groups"][0][name]  # as older PyTorch wrote it
    fused = torch.optim.AdamW([weight], fused=True)
    load_optimizer_state(fused, state)
    assert fused.param_groups[0]["fused"] is True
    assert torch.equal(fused.state[weight]["exp_avg"], plain.state[weight]["exp_avg"])
    fused.step()
    assert fused.state[weight]["step"] == 2


def test_a_finished_checkpoint_of_elsewhere_is_saved_where_the_next_command_looks(data, run, tmp_path):
    loop = make_loop(data, tmp_path, max_steps=2, resume_checkpoint=str(run / "model000002.pt"))
    assert loop.run()
    saved, expected = (torch.load(path, weights_only=True) for path in (tmp_path / "model.pt", run / "model.pt"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert store.newest_complete(str(tmp_path), print)["step"] == 2
