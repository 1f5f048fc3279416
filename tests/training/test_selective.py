"""The strategies zo and selective: which step comes when and on which records, and that runs go on bit by bit."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline
from tiny_training import content, tiny_examples, tiny_schedule
from tiny_unets import make_shallow_unet

from hollow_core.data.images import load_images
from hollow_core.errors import HollowError
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import decode_images, load
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet
from hollow_core.request import Request, low_examples, make_examples
from hollow_core.road import personalize
from hollow_core.training.precompute import precompute
from hollow_core.training.selective import choices, count_by_time, falling, heat_map, taken
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train

CUT = 1
FEW = TrainSettings(rank=2, steps=6, learning_rate=1e-3)


@pytest.fixture
def begin(tmp_path):
    """Precompute, pictures of 8×8 latents with twins of 4×4, and hollow: unet, schedule, store."""

    def begin(cut=CUT, samples=6, priors=0, low=True):
        unet, schedule = make_shallow_unet("sd15"), tiny_schedule()
        high = tiny_examples(unet, 2, priors)
        twins = [
            replace(example, kind=f"low {example.kind}") for example in tiny_examples(unet, 2, priors, size=4) if low
        ]
        folder = tmp_path / f"store {cut} {samples} {priors} {low}"
        store = precompute(UNet(unet), schedule, [*high, *twins], folder, cut=cut, samples=samples)
        return (UNet(unet) if cut is None else UNet(unet).hollow(cut, range(1000))), schedule, store

    return begin


def chosen(store, steps, strategy="selective", seeds=(1, 2, 3, 4), **changes):
    options = {"batch": 1, "prior_weight": 0.0, "steps": steps, "timesteps": 1000, "probability": falling(1.0)}
    options |= {"zo_timesteps": None} | changes
    ahead = choices(store, strategy, seeds=seeds, **options)
    return [next(ahead) for _ in range(steps)]


def test_records_of_both_resolutions_are_twins_with_exit_activations_of_their_own(begin):
    _, _, store = begin(priors=1)
    for high, low in (("image", "low image"), ("prior", "low prior")):
        pairs = list(zip(store.indices(high), store.indices(low), strict=True))
        assert len(pairs) == 3
        for one, other in pairs:
            big, small = store.record(one), store.record(other)
            assert (big.timestep, big.noise_seed) == (small.timestep, small.noise_seed)
            assert small.image == big.image + 3
            assert big.stored[EXIT_ACTIVATION].shape[2:] == (4, 4)
            assert small.stored[EXIT_ACTIVATION].shape[2:] == (2, 2)
            assert not torch.equal(big.stored[EXIT_ACTIVATION][..., :2, :2], small.stored[EXIT_ACTIVATION])


def test_the_default_falls_with_time_step_and_progress():
    p = falling(2.0)
    places = [place / 20 for place in range(20)]
    assert [p(t, 0.0) for t in places] == [1.0] * 20  # BP-low always at the start
    assert [p(0.0, s) for s in places] == [1.0] * 20
    for t in places[1:]:
        assert all(p(t, s) > p(t, later) for s, later in pairwise(places))
        assert all(falling(gamma)(t, 0.5) > falling(2 * gamma)(t, 0.5) for gamma in (0.5, 1.0, 2.0))
    for s in places[1:]:
        assert all(p(t, s) > p(higher, s) for t, higher in pairwise(places))
    assert p(0.75, 0.5) == 0.25


def test_the_share_of_bp_low_follows_p(begin):
    """In each corner of the t × s plane the count is within four standard deviations of Σ p, and chi² fits."""
    _, _, store = begin(cut=None, samples=50)
    steps, gamma = 6000, 1.5
    expected, variance, found = Counter(), Counter(), Counter()
    for step, choice in enumerate(chosen(store, steps, probability=falling(gamma))):
        (index, weight), *more = choice.weighted
        assert weight == 1
        assert more == []
        t, s = store.records[index].timestep / 1000, step / steps
        p = (1 - t) ** (gamma * s)
        cell = int(4 * t), int(4 * s)
        expected[cell] += p
        variance[cell] += p * (1 - p)
        found[cell] += choice.kind == "bp-low"
    assert len(expected) == 16
    assert all(abs(found[cell] - expected[cell]) < 4 * math.sqrt(variance[cell]) for cell in expected)
    chi_squared = sum((found[cell] - expected[cell]) ** 2 / variance[cell] for cell in expected)
    assert chi_squared < 39.3  # 16 degrees of freedom, p = .001
    assert found[3, 3] < 0.2 * found[0, 0]


def test_bp_low_takes_the_twins_and_zo_high_the_records_themselves(begin):
    _, _, store = begin(priors=1, samples=12)
    high = chosen(store, 40, "bp", batch=2, prior_weight=0.5)
    mixed = chosen(store, 40, batch=2, prior_weight=0.5, probability=lambda t, s: 0.5)
    assert {choice.kind for choice in mixed} == {"bp-low", "zo-high"}
    assert len({choice.seed for choice in mixed}) == 40
    for plain, choice in zip(high, mixed, strict=True):
        assert [weight for _, weight in choice.weighted] == [0.5, 0.5, 0.25, 0.25]
        wanted = ["image", "image", "prior", "prior"]
        if choice.kind == "bp-low":
            wanted = [f"low {kind}" for kind in wanted]
        for (one, _), (other, _), kind in zip(plain.weighted, choice.weighted, wanted, strict=True):
            assert store.records[other].kind == kind
            assert store.records[one].timestep == store.records[other].timestep


@pytest.mark.parametrize("cut", [None, CUT])
def test_training_runs_backwards_at_the_low_resolution_and_forwards_only_at_full(begin, tmp_path, cut):
    network, schedule, store = begin(cut)
    passes = []
    network.module.conv_in.register_forward_pre_hook(
        lambda _, args: passes.append((args[0].shape[-1], torch.is_grad_enabled()))
    )
    settings = replace(FEW, strategy="selective", probability=lambda t, s: float(s < 0.5), zo_queries=3)
    result = train(network, schedule, store, settings, folder=tmp_path)
    assert passes == [(4, True)] * 3 + [(8, False)] * 3 * 2 * 3
    assert [step.kind for step in result.taken] == ["bp-low"] * 3 + ["zo-high"] * 3
    assert result.stopped == "finished"


def test_zo_trains_any_store_at_full_resolution(begin, tmp_path):
    network, schedule, store = begin(low=False)
    passes = []
    network.module.conv_in.register_forward_pre_hook(
        lambda _, args: passes.append((args[0].shape[-1], torch.is_grad_enabled()))
    )
    result = train(network, schedule, store, replace(FEW, strategy="zo"), folder=tmp_path)
    assert passes == [(8, False)] * 4 * FEW.steps
    assert any(tensor.any() for key, tensor in result.state.items() if "lora_B" in key)


@pytest.mark.slow
def test_zo_learns_a_single_record(begin, tmp_path):
    network, schedule, store = begin(samples=1, low=False)
    settings = replace(FEW, strategy="zo", steps=40, learning_rate=3e-2, targets=("conv_out",))
    losses = train(network, schedule, store, settings, folder=tmp_path).losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zo", "selective"])
def test_partial_time_step_sampling_is_for_zeroth_order_steps_alone(begin, strategy):
    _, _, store = begin(priors=2, samples=80)
    steps = chosen(store, 300, strategy, zo_timesteps=(500, 900), prior_weight=1.0, probability=lambda t, s: 0.5)
    seen = {kind: set() for kind in ("bp-low", "zo-high")}
    for choice in steps:
        seen[choice.kind] |= {(store.records[i].kind, store.records[i].timestep) for i, _ in choice.weighted}
    assert seen["zo-high"] == {(r.kind, r.timestep) for r in store.records[:80] if 500 <= r.timestep < 900}
    if strategy == "selective":
        assert min(t for _, t in seen["bp-low"]) < 100
        assert max(t for _, t in seen["bp-low"]) > 900


BRIEF = replace(FEW, steps=4, selective_gamma=6.0, zo_queries=1, targets=("attn2.to_q", "attn2.to_v"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        replace(BRIEF, strategy="zo"),
        replace(BRIEF, strategy="selective"),
        replace(BRIEF, strategy="selective", zo_timesteps=(300, 900), batch=2),
        replace(BRIEF, strategy="selective", zo_strengths=True),
    ],
)
def test_stopped_at_any_step_and_gone_on_gives_the_same_lora(begin, tmp_path, settings):
    network, schedule, store = begin(priors=2, samples=12)
    whole = train(network, schedule, store, settings, folder=tmp_path / "whole")
    assert len({step.kind for step in whole.taken}) == (1 if settings.strategy == "zo" else 2)
    for step in range(settings.steps):
        folder, stop = tmp_path / f"stopped at {step}", iter([False] * step + [True])
        stopped = train(network, schedule, store, settings, folder=folder, stop=stop.__next__)
        assert stopped.taken == whole.taken[: step * settings.batch]
        result = train(network, schedule, store, settings, folder=folder)
        assert all(torch.equal(result.state[key], tensor) for key, tensor in whole.state.items())
        assert (result.losses, result.taken) == (whole.losses, whole.taken)
        assert content(folder) == content(tmp_path / "whole")
    other = train(network, schedule, store, replace(settings, seed=1), folder=tmp_path / "other")
    assert any(not torch.equal(other.state[key], tensor) for key, tensor in whole.state.items())


@pytest.mark.slow
def test_more_steps_go_on_under_zo_but_would_be_another_schedule_under_selective(begin, tmp_path):
    network, schedule, store = begin()
    for strategy in ("zo", "selective"):
        settings = replace(FEW, strategy=strategy)
        train(network, schedule, store, replace(settings, steps=3), folder=tmp_path / strategy)
        if strategy == "zo":
            assert train(network, schedule, store, settings, folder=tmp_path / strategy).steps == 6
        else:
            with pytest.raises(HollowError, match=r"differs: steps \(3 there, 6 asked\)"):
                train(network, schedule, store, settings, folder=tmp_path / strategy)


def test_another_schedule_is_another_training(begin, tmp_path):
    network, schedule, store = begin()
    settings = replace(FEW, strategy="selective", probability=lambda t, s: 0.5)
    train(network, schedule, store, settings, folder=tmp_path)
    train(network, schedule, store, replace(settings, probability=lambda t, s: 1 / 2), folder=tmp_path)  # the same
    with pytest.raises(HollowError, match="of a training that differs: probability"):
        train(network, schedule, store, replace(settings, probability=lambda t, s: 0.4), folder=tmp_path)


def test_steps_are_counted_by_kind_and_time(begin):
    _, _, store = begin(cut=None, samples=40)
    steps = [record for choice in chosen(store, 400) for record in taken(store, choice)]
    rows = count_by_time(steps)
    assert [(row["from"], row["to"]) for row in rows] == [(100 * n, 100 * n + 100) for n in range(10)]
    assert {row["bp-low"] + row["zo-high"] for row in rows} == {40}  # ten epochs of four records in each stretch
    assert {row["bp"] for row in rows} == {0}
    assert sum(row["bp-low"] for row in rows) == sum(step.kind == "bp-low" for step in steps)
    assert rows[0]["bp-low"] > rows[9]["bp-low"]


def test_the_heat_map_is_p():
    rows = heat_map(lambda t, s: t * s, across=2)
    assert rows == [[0.0625, 0.1875], [0.1875, 0.5625]]  # at 1/4 and 3/4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategy": "spsa"}, r"strategy is 'spsa'\. Choose bp, zo or selective"),
        ({"selective_gamma": -1.0}, r"selective_gamma is -1\.0\. It must be 0 or more"),
        ({"zo_epsilon": 0.0}, r"zo_epsilon is 0\.0\. It must be above 0"),
        ({"zo_queries": 0}, r"zo_queries is 0\. It must be at least 1"),
        ({"zo_learning_rate": 0.0}, r"zo_learning_rate is 0\.0\. It must be above 0"),
        ({"zo_timesteps": (900, 500)}, r"zo_timesteps is \(900, 500\)\. Give the first .* such as \(500, 900\)"),
        ({"strategy": "zo", "zo_strengths": True}, r"zo_strengths does not go with strategy zo: .* Choose selective"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(HollowError, match=said):
        TrainSettings(**change)


def test_what_the_store_cannot_serve_is_refused(begin, tmp_path):
    selective = replace(FEW, strategy="selective")
    with pytest.raises(HollowError, match=r"has no records at a lower resolution, .* or choose the strategy bp or zo"):
        train(*begin(low=False), selective, folder=tmp_path)
    with pytest.raises(HollowError, match=r"no record at the time steps 0 to 1\. Choose a wider range"):
        train(*begin(), replace(FEW, strategy="zo", zo_timesteps=(0, 1)), folder=tmp_path)
    with pytest.raises(HollowError, match=r"The probability of BP-low at t .*, s 0 is 2\. It must be from 0 to 1"):
        chosen(begin()[2], 1, probability=lambda t, s: 2)


def test_a_twin_that_is_missing_is_refused(tiny_unet, tmp_path):
    unet = tiny_unet("sd15")
    high, low = tiny_examples(unet, 2, 1), tiny_examples(unet, 1, size=4)
    with pytest.raises(HollowError, match="There are 1 images and 0 class pictures at a lower resolution, but 2 and 1"):
        precompute(
            UNet(unet),
            tiny_schedule(),
            [*high, replace(low[0], kind="low image")],
            tmp_path,
            cut=CUT,
            samples=4,
        )


@pytest.fixture
def sdxl_request(tmp_path):
    """Two pictures of 128 pixels, and a loader of a tiny SDXL."""
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (150, 130), color).save(tmp_path / "photos" / f"{number}.png")
    training = TrainSettings(rank=2, steps=4, strategy="selective", selective_gamma=20.0)
    setting = Setting(cut=1, samples=8, class_images=2, training=training)
    request = Request(load_images(tmp_path / "photos", 128, square=True), "dog", setting=setting)
    return (lambda: load(tmp_path / "model")), request


def test_sdxl_is_told_the_size_of_each_picture(sdxl_request):
    loader, request = sdxl_request
    model = loader()
    of_class = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    high = make_examples(model, request, of_class)
    low = low_examples(model, request, high, of_class)
    assert [example.kind for example in low] == ["low image"] * 2 + ["low prior"] * 2
    for examples, side in ((high, 128), (low, 64)):
        for example in examples:
            assert tuple(example.latents.shape) == (1, 4, side // 8, side // 8)
            for conditioning in (example.personal, example.generic):
                of_subject = [130, 150, 0, round(10 * side / 130), side, side]  # cut off at both sides
                told = of_subject if "image" in example.kind else [128, 128, 0, 0, side, side]  # as it was drawn
                assert conditioning.time_ids.tolist() == [told]
    for one, other in zip(high, low, strict=True):
        assert (one.personal_prompt, one.generic_prompt) == (other.personal_prompt, other.generic_prompt)
    smaller = replace(request, setting=replace(request.setting, low_resolution=32))
    picture = low_examples(model, smaller, high, of_class)[0]
    assert tuple(picture.latents.shape) == (1, 4, 4, 4)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_class_pictures_are_decoded_as_the_pipeline_does(tmp_path, layout):
    tiny_pipeline(layout).save_pretrained(tmp_path)
    model = load(tmp_path)
    latents, pictures = (
        model.pipeline()(
            "a dog", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type=kind
        ).images
        for kind in ("latent", "pil")
    )
    decoded = decode_images(model, [latents])
    assert [picture.tobytes() for picture in decoded] == [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize(("side", "said"), [(128, "low resolution 128 is not below"), (60, "60 is no multiple of 8")])
def test_a_low_resolution_that_cannot_be_is_refused(sdxl_request, side, said):
    loader, request = sdxl_request
    with pytest.raises(HollowError, match=said):
        low_examples(loader(), replace(request, setting=replace(request.setting, low_resolution=side)), [], [])


@pytest.mark.slow
def test_the_whole_road_draws_its_schedule(sdxl_request, tmp_path):
    loader, request = sdxl_request
    outcome = personalize(loader, request, tmp_path / "out")
    assert outcome.result.stopped == "finished"
    assert {step.kind for step in outcome.result.taken} == {"bp-low", "zo-high"}
    with Image.open(tmp_path / "out" / "schedule.png") as picture:
        assert picture.width > 500


def test_settings_that_a_strategy_does_not_read_may_change_when_a_run_goes_on():
    def fixed(**changes):
        return TrainSettings(**changes).fixed

    assert fixed(selective_gamma=2.0, zo_queries=3, zo_strengths=True, steps=5) == fixed()
    assert fixed(strategy="zo", selective_gamma=2.0) == fixed(strategy="zo") != fixed(strategy="zo", zo_queries=3)
    assert fixed(strategy="selective", selective_gamma=2.0) != fixed(strategy="selective")
