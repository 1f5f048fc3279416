"""The loss of a record and its gradient, against the papers' formulas and the whole U-Net."""

from collections import Counter
from functools import partial

import pytest
import torch
from tiny_training import tiny_examples, tiny_schedule

from hollow_core.errors import HollowError
from hollow_core.lora.layers import add_lora, lora_parameters
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet, hollow
from hollow_core.training.precompute import run_base
from hollow_core.training.steps import Part, backpropagate, part_loss
from hollow_core.training.store import Record

CUT = 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def record_loss(unet, schedule, record, latents, personal, **options):
    return part_loss(UNet(unet), Part.of(schedule, [record], [(latents, personal)], [1.0], **options))


def gradients(parameters):
    found = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.fixture
def problem(tiny_unet):
    """A U-Net with a LoRA that does something, a schedule, and two records with their examples."""
    unet, schedule = tiny_unet("sd21"), tiny_schedule()
    add_lora(unet, 2, generator=seeded())
    for parameter in lora_parameters(unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(len(parameter)))
    examples = tiny_examples(unet)
    records = [Record(0, "image", 731, 11), Record(1, "image", 40, 12)]
    base = UNet(unet).base(CUT)
    records = [r._replace(stored=run_base(base, schedule, [r], [examples[r.image]])) for r in records]
    return unet, schedule, examples, records


def test_loss_is_equation_1_on_the_whole_unet_with_the_middle_under_the_generic_prompt(problem):
    unet, schedule, examples, (record, _) = problem
    z, alpha = examples[0].latents, schedule.numbers[record.timestep]
    noise = torch.randn(z.shape, generator=seeded(record.noise_seed))
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    exit_resnet = [resnet for block in unet.up_blocks for resnet in block.resnets][CUT]
    channels = record.stored[EXIT_ACTIVATION].shape[1]

    at_exit = []
    hook = exit_resnet.register_forward_pre_hook(lambda _, args: at_exit.append(args[0][:, :channels]))
    unet(noisy, record.timestep, **examples[0].generic.kwargs())
    hook.remove()
    hook = exit_resnet.register_forward_pre_hook(
        lambda _, args: (torch.cat([at_exit[0], args[0][:, channels:]], dim=1), *args[1:])
    )
    predicted = unet(noisy, record.timestep, **examples[0].personal.kwargs()).sample
    hook.remove()

    loss = record_loss(hollow(unet, CUT), schedule, record, z, examples[0].personal)
    assert loss.item() == pytest.approx((noise - predicted).square().mean().item(), rel=1e-5)
    unhollowed = record_loss(unet, schedule, record._replace(stored={}), z, examples[0].generic)
    in_full = unet(noisy, record.timestep, **examples[0].generic.kwargs()).sample
    assert unhollowed.item() == pytest.approx((noise - in_full).square().mean().item(), rel=1e-5)


def test_records_of_another_cut_are_refused(problem):
    unet, schedule, examples, (record, _) = problem
    inputs = schedule, record, examples[0].latents, examples[0].personal
    with pytest.raises(HollowError, match=r"not hold what a U-Net of cut None needs .* Precompute them for this cut"):
        record_loss(unet, *inputs)
    with pytest.raises(HollowError, match="do not hold what a U-Net of cut 2 needs"):
        record_loss(hollow(unet, CUT), schedule, record._replace(stored={"state": inputs[2]}), *inputs[2:])


def test_min_snr_weighs_the_loss_of_a_record(problem):
    unet, schedule, examples, (_, record) = problem
    inputs = hollow(unet, CUT), schedule, record, examples[1].latents, examples[1].personal
    weight = schedule.loss_weight(record.timestep, 5.0)
    assert weight < 0.5
    assert record_loss(*inputs, snr_gamma=5.0).item() == pytest.approx(weight * record_loss(*inputs).item())


def test_v_prediction_at_zero_terminal_snr(problem):
    unet, _, examples, (record, _) = problem
    schedule = tiny_schedule("v_prediction", rescale_betas_zero_snr=True)
    record = record._replace(timestep=999)
    noisy, noise = record.noisy(schedule, examples[0].latents)
    assert torch.equal(noisy, noise)
    assert torch.equal(schedule.target(examples[0].latents, noise, 999), -examples[0].latents)
    inputs = hollow(unet, CUT), schedule, record, examples[0].latents, examples[0].personal
    loss = record_loss(*inputs)
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(lora_parameters(hollow(unet, CUT))))
    assert schedule.loss_weight(999, 5.0) == 0
    assert record_loss(*inputs, snr_gamma=5.0).item() == 0


def test_accumulated_records_have_the_gradient_of_one_batch(problem):
    unet, schedule, examples, records = problem
    hollowed = hollow(unet, CUT)
    parameters = lora_parameters(hollowed)

    inputs = [(example.latents, example.personal) for example in examples]
    halves = [Part.of(schedule, [r], [i], [0.5]) for r, i in zip(records, inputs, strict=True)]
    accumulated = backpropagate(partial(part_loss, UNet(hollowed)), halves, scale=4.0)
    one_by_one = gradients(parameters)

    noisy, noise = map(torch.cat, zip(*(r.noisy(schedule, examples[r.image].latents) for r in records), strict=True))
    predicted = hollowed(
        noisy,
        torch.tensor([record.timestep for record in records]),
        examples[0].personal.encoder_hidden_states.repeat(2, 1, 1),
        exit_activation=torch.cat([record.stored[EXIT_ACTIVATION] for record in records]),
    ).sample
    loss = (predicted - noise).square().mean()
    loss.backward()
    assert accumulated.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(parameters)
    part_loss(UNet(hollowed), Part.of(schedule, records, inputs, [1.0, 1.0])).backward()
    for mine, together, batched in zip(one_by_one, gradients(parameters), expected, strict=True):
        torch.testing.assert_close(mine, 4 * batched, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together, 2 * batched, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("levels", "inner"), [(None, 2), (1, 1)])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(problem, levels, inner):
    unet, schedule, examples, (record, _) = problem
    hollowed = hollow(unet, CUT)
    runs = []
    for block in (hollowed.up_blocks[-1], hollowed.down_blocks[0], hollowed.up_blocks[-2], hollowed.down_blocks[1]):
        list(block.resnets)[-1].conv1.register_forward_hook(lambda module, *_: runs.append(module))
    inputs = hollowed, schedule, record, examples[0].latents, examples[0].personal
    record_loss(*inputs).backward()
    plain = gradients(lora_parameters(hollowed))
    assert sorted(Counter(runs).values()) == [1, 1, 1, 1]
    runs.clear()
    UNet(hollowed).checkpoint(levels)
    record_loss(*inputs).backward()
    assert sorted(Counter(runs).values()) == [inner, inner, 2, 2]
    for mine, expected in zip(gradients(lora_parameters(hollowed)), plain, strict=True):
        torch.testing.assert_close(mine, expected)
