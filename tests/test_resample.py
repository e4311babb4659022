"""Which timesteps are trained on."""

import numpy as np
import pytest

from guided_diffusion.resample import LossSecondMomentSampler, ScheduleSampler, create_schedule_sampler

T = 20


def filled(history=5):
    """A loss-aware sampler with every timestep's history full, and the losses recorded."""
    sampler = LossSecondMomentSampler(T, history=history)
    losses = np.random.default_rng(0).uniform(0.1, 2.0, (T, history))
    for i in range(history):
        sampler.update(np.arange(T), losses[:, i])
    return sampler, losses


def test_uniform_takes_every_timestep_equally_often():
    t, weights = ScheduleSampler(T).sample((np.arange(10 * T) + 0.5) / (10 * T))
    assert np.bincount(t, minlength=T).tolist() == [10] * T
    assert t.dtype == np.int64
    assert (weights == 1).all()


def test_the_ends_of_the_interval_are_timesteps():
    t, _ = ScheduleSampler(T).sample(np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert t.tolist() == [0, T - 1]


def test_loss_aware_probabilities_follow_the_formula():
    sampler, losses = filled()
    expected = np.sqrt((losses**2).mean(axis=1))
    expected = expected / expected.sum() * 0.999 + 0.001 / T  # a thousandth is spread evenly
    np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-12)


def test_the_weights_make_it_unbiased():
    sampler, _ = filled()
    count = 200_000
    t, weights = sampler.sample((np.arange(count) + 0.5) / count)
    losses = np.linspace(1, 3, T)  # any function of t has its plain mean as the weighted mean
    assert np.mean(weights * losses[t]) == pytest.approx(losses.mean(), rel=1e-4)  # a grid of 200 000 points


def test_it_is_uniform_until_every_history_is_full():
    sampler = LossSecondMomentSampler(T, history=2)
    sampler.update(np.arange(T), np.arange(T) + 1.0)
    sampler.update(np.arange(T - 1), np.ones(T - 1))
    assert (sampler.probabilities() == 1 / T).all()
    sampler.update(np.array([T - 1]), np.array([1.0]))
    assert sampler.probabilities()[-1] > sampler.probabilities()[0]


def test_old_losses_are_forgotten():
    sampler, _ = filled(history=3)
    for _ in range(3):
        sampler.update(np.arange(T), np.full(T, 7.0))
    np.testing.assert_allclose(sampler.probabilities(), 1 / T)


def test_history_survives_a_restart():
    sampler, _ = filled()
    again = LossSecondMomentSampler(T, history=5)
    again.load_state_dict(sampler.state_dict())
    for one in (sampler, again):
        one.update(np.array([3, 3]), np.array([9.0, 8.0]))
    assert np.array_equal(sampler.probabilities(), again.probabilities())


def test_a_history_of_another_length_is_refused():
    sampler, _ = filled()
    with pytest.raises(ValueError, match="10 timesteps"):
        LossSecondMomentSampler(10, history=5).load_state_dict(sampler.state_dict())


def test_names():
    assert type(create_schedule_sampler("uniform", T)) is ScheduleSampler
    assert isinstance(create_schedule_sampler("loss-second-moment", T), LossSecondMomentSampler)
    with pytest.raises(ValueError, match=r"quadratic.*uniform, loss-second-moment"):
        create_schedule_sampler("quadratic", T)
