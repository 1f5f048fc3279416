"""What is predicted of noisy latents and how its error counts, against the papers' formulas and diffusers."""

import pytest
import torch
from diffusers.training_utils import compute_snr
from tiny_training import tiny_schedule, tiny_scheduler

from hollow_core.errors import HollowError
from hollow_core.nets.schedule import PREDICTIONS, NoiseSchedule


def latents_and_noise():
    return torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_targets_are_the_published_ones():
    z, noise = latents_and_noise()
    for timestep in (0, 500, 999):
        alpha_cumprod = torch.tensor(1.0)
        for beta in torch.linspace(0.00085**0.5, 0.012**0.5, 1000)[: timestep + 1] ** 2:
            alpha_cumprod = alpha_cumprod * (1 - beta)
        alpha, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        v = tiny_schedule("v_prediction").target(z, noise, timestep)
        torch.testing.assert_close(v, alpha * noise - sigma * z, atol=1e-4, rtol=1e-4)
    assert tiny_schedule("epsilon").target(z, noise, 7) is noise
    assert tiny_schedule("sample").target(z, noise, 7) is z


@pytest.mark.parametrize("timestep", [0, 1, 500, 998, 999])
def test_latents_and_velocity_are_those_of_diffusers_to_the_last_bit(timestep):
    z, noise = latents_and_noise()
    scheduler, schedule = tiny_scheduler("v_prediction"), tiny_schedule("v_prediction")
    at = torch.tensor([timestep])
    assert torch.equal(schedule.noisy(z, noise, timestep), scheduler.add_noise(z, noise, at))
    assert torch.equal(schedule.target(z, noise, timestep), scheduler.get_velocity(z, noise, at))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_true_prediction_gives_the_clean_latents_back(kind):
    z, noise = latents_and_noise()
    schedule = tiny_schedule(kind)
    for timestep in (0, 400, 999):
        clean = schedule.clean(schedule.noisy(z, noise, timestep), schedule.target(z, noise, timestep), timestep)
        torch.testing.assert_close(clean, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_error_of_a_prediction_is_that_of_the_clean_latents_over_its_share(kind):
    """What min-SNR's weights rest on: a prediction off by d gives latents off by d over the root of `error`."""
    z, noise = latents_and_noise()
    schedule = tiny_schedule(kind)
    for timestep in (50, 400, 900):
        noisy, target = schedule.noisy(z, noise, timestep), schedule.target(z, noise, timestep)
        off = schedule.clean(noisy, target + 0.1, timestep) - schedule.clean(noisy, target, timestep)
        snr = compute_snr(tiny_scheduler(), torch.tensor([timestep])).item()
        expected = 0.1**2 / schedule.prediction.error(snr)
        assert off.square().mean().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_published_ones(gamma):
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(tiny_scheduler(), timesteps)
    clipped = snr.clamp(max=gamma)
    for prediction_type, expected in (
        ("epsilon", clipped / snr),
        ("v_prediction", clipped / (snr + 1)),
        ("sample", clipped),
    ):
        schedule = tiny_schedule(prediction_type)
        weights = [schedule.loss_weight(timestep, gamma) for timestep in timesteps.tolist()]
        torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-4, atol=0)
    assert tiny_schedule().loss_weight(999, gamma) == 1  # all but noise: SNR is below γ


def test_from_numbers_it_is_the_same_schedule():
    scheduler = tiny_scheduler("v_prediction")
    own = NoiseSchedule(PREDICTIONS["v_prediction"], torch.cumprod(1 - scheduler.betas, 0))
    assert own.id == tiny_schedule("v_prediction").id
    assert own.id != tiny_schedule("epsilon").id
    assert own.id != tiny_schedule("v_prediction", num_train_timesteps=999).id


def test_what_cannot_be_is_refused():
    with pytest.raises(HollowError, match=r"'flux' is unknown\. Use epsilon, v_prediction or sample\."):
        tiny_schedule("flux")
    with pytest.raises(HollowError, match="zero terminal SNR cannot train on epsilon"):
        tiny_schedule(rescale_betas_zero_snr=True).check()
    tiny_schedule("v_prediction", rescale_betas_zero_snr=True).check()
