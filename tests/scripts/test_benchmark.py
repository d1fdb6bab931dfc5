"""Benchmark: FLOPs against torch's counter, equality of both implementations, and phases."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_nft.algorithms import Batch
from diffusion_nft.algorithms.nft import NFT
from diffusion_nft.benchmarks import scaling
from diffusion_nft.benchmarks.baseline import Published
from diffusion_nft.benchmarks.epochs import make_config, timed_epoch
from diffusion_nft.benchmarks.models import ARCHITECTURES, Product, Setup
from diffusion_nft.benchmarks.phases import Observer, Peaks, Phase, roofline
from diffusion_nft.benchmarks.scaling import AXES, BENCHMARK, draw, exponent, measure, time_epochs
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.flow import add_noise
from diffusion_nft.models.flops import Linear, backward_cost, decode_cost, forward_cost
from diffusion_nft.rewards import parse_option
from tests.launch import LORA_TARGETS, one_thread
from tests.scripts.in_process import call, script

RANK = 32
SIZES = ("sample.num_groups=2", "sample.num_image_per_prompt=4", "sample.num_steps=4")


def make_setup(tmp_path, arch: str, *changes: str) -> Setup:
    options = [*map(parse_option, ("train.timestep_fraction=0.5", *changes))]
    config = make_config(arch, str(tmp_path), preset="shapes_smoke", changes=options)
    return Setup.of(config, Distributed(0, 1, 0, torch.device("cpu")), arch)


def counted(work) -> tuple[object, int]:
    # The counter does not support fused attention on CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = work()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("arch, resolution", [("sd3.5-tiny", 128), ("shapes", 48)])
def test_flops_by_formula_are_those_that_torch_counts(tmp_path, arch, resolution):
    model = make_setup(tmp_path, arch, f"resolution={resolution}").load()
    transformer, count = model.transformer, 3
    transformer.add_adapter(LoraConfig(r=RANK, target_modules=list(LORA_TARGETS)))
    x, sigma = torch.randn(count, *model.latent_shape((48, 48))), torch.full((count,), 0.5)
    cond = model.encode(["a", "b", "c"])
    shape = (transformer.config, x.shape[-1], cond.prompt_embeds.shape[1])

    v, flops = counted(lambda: model.velocity(x, sigma, cond))
    assert flops == pytest.approx(count * forward_cost(*shape, RANK).flops, rel=0.01)
    _, flops = counted(lambda: v.sum().backward())
    assert flops == pytest.approx(count * backward_cost(*shape, RANK).flops, rel=0.01)
    transformer.disable_adapters()
    _, flops = counted(lambda: model.velocity(x, sigma, cond))
    assert flops == pytest.approx(count * forward_cost(*shape).flops, rel=0.01)
    _, flops = counted(lambda: model.decode(x))
    cost = decode_cost(model.vae.config, x.shape[-1])
    assert flops == pytest.approx(count * cost.flops, rel=0.01)


def test_bytes_count_weights_once_a_call_and_activations_once_a_sample():
    cost = Linear(rows=5, n_in=3, n_out=7).forward(rank=0)
    assert cost.flops == 2 * 5 * 3 * 7
    assert cost.bytes(2, weight_size=4, element_size=2) == 3 * 7 * 4 + 2 * 5 * (3 + 7) * 2


def test_the_medium_architecture_has_the_real_ones_size():
    arguments = ARCHITECTURES["sd3.5-medium"].transformer
    with torch.device("meta"):
        model = SD3Transformer2DModel(**arguments)
        shapes = (1, 16, 64, 64), (1, 205, 4096), (1, 2048), (1,)
        inputs = [torch.zeros(shape) for shape in shapes]
    # The published file has float16 weights and the table of positions, 4.94 GB.
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 2 * values == pytest.approx(4.94e9, rel=0.002)
    with torch.no_grad():
        _, flops = counted(lambda: model(*inputs))
    assert forward_cost(model.config, 64, 205).flops == pytest.approx(flops, rel=0.01)


def test_both_ways_have_the_same_loss_and_gradient(tmp_path):
    setup = make_setup(tmp_path, "shapes", "nft.kl_weight=0.5", "nft.beta=0.5")
    ours, theirs = Product(setup), Published(setup)
    g = torch.Generator().manual_seed(3)
    for name in ("old", "current"):
        state = {
            key: torch.randn(value.shape, generator=g) / 20
            for key, value in ours.policy.state(name).items()
        }
        ours.policy.load(name, state, others=False)
        for weight, value in zip(theirs.weights[name], state.values(), strict=True):
            weight.data.copy_(value)
    x0, noise = (torch.randn(5, *ours.model.latent_shape((48, 48)), generator=g) for _ in range(2))
    sigma, r = torch.rand(5, generator=g), torch.rand(5, generator=g)
    batch = Batch(x0, noise, add_noise(x0, noise, sigma), sigma, r)
    texts = [prompt.text for prompt in setup.prompts[:4]]
    texts.append(texts[0])
    cond = ours.model.encode(texts)

    def velocity(policy):
        with ours.policy.use_adapter(policy), torch.set_grad_enabled(policy == "current"):
            return ours.model.velocity(batch.xt, batch.sigma, cond)

    expected, _ = NFT(setup.config).loss(velocity, batch)
    actual = theirs.losses(batch, theirs.encode(texts))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    actual.sum().backward()
    for a, b in zip(theirs.weights["current"], ours.policy.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_it_counts_what_an_epoch_does_and_prints_it(tmp_path, capsys):
    output = tmp_path / "result.json"
    flags = [flag for change in SIZES for flag in ("--set", change)]
    call(
        script("benchmark"),
        *("--preset", "shapes_smoke", "--arch", "sd3.5-tiny", "--repeats", 1, "--baseline"),
        *flags,
        *("--output", output),
    )
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert "random tensors in place of embeddings" in printed and "times as fast" in printed
    assert results["about"]["weights"] == "random"
    samples, used, steps = 8, 2, 4
    for way, prompts in (("ours", 2), ("baseline", 8)):
        phases = results[way]["phases"]
        rows = {name: phase["rows"] for name, phase in phases.items()}
        assert rows["encode"] == prompts
        assert rows["sample"] == samples * steps
        assert rows["decode"] == rows["reward"] == samples
        for policy in ("old", "reference", "current"):
            assert rows[f"{policy} forward"] == samples * used
        assert rows["backward"] == results[way]["pairs_per_epoch"] == samples * used
        assert phases["optimizer"]["calls"] == 2
        assert results[way]["flops_per_epoch"] == sum(p["flops"] for p in phases.values())
        assert all(phase["seconds"] >= 0 and phase["sentence"] for phase in phases.values())
    assert results["ours"]["phases"]["checkpoint"]["calls"] == 1
    # The old policy of the baseline is not merged.
    old, current = (results["baseline"]["phases"][f"{p} forward"] for p in ("old", "current"))
    assert (
        old["flops"] == current["flops"] > results["ours"]["phases"]["reference forward"]["flops"]
    )
    ours, theirs = (results[way]["seconds"]["epoch"]["all"] for way in ("ours", "baseline"))
    assert results["speedup"]["all"] == [theirs[0] / ours[0]]
    rate = results["ours"]["images_per_second"]["median"]
    assert rate == pytest.approx(samples / ours[0])


def test_without_a_kl_term_ours_makes_no_reference_forward(tmp_path):
    way = Product(make_setup(tmp_path, "shapes", "nft.kl_weight=0.0", *SIZES))
    observer = Observer(way)
    with one_thread(), observer.watching():
        timed_epoch(way, 0)
    assert observer.phases["current forward"].rows == 16
    assert "reference forward" not in observer.phases


@pytest.mark.parametrize(
    "flops, data, seconds, bound",
    [(100, 1, 1.5, "compute"), (1, 100, 15, "memory"), (100, 1, 3.5, "overhead")],
)
def test_a_phase_is_bound_by_what_takes_longest(flops, data, seconds, bound):
    peaks = Peaks(flops=100.0, bandwidth=10.0)
    row = roofline("decode", Phase(seconds, 1, 1, flops, data), peaks)
    assert row["bound"] == bound and row["sentence"].startswith(f"{bound}-bound")
    assert row["intensity"] == flops / data


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--set", "train.batchsize=3"), "train.batchsize"),
        (("--set", "train.batch_size=-1"), "train.batch_size"),
        (("--set", "algorithm=best_of_n"), "supports 'nft' only"),
        (("--preset", "nothing"), "preset 'nothing' is unknown"),
        (("--rewards", "prettiness"), "prettiness"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(flags, message):
    with pytest.raises(ValueError) as stopped:
        call(script("benchmark"), *flags)
    assert message in str(stopped.value)


def test_exponents_are_slopes_and_the_curves_are_drawn(tmp_path):
    sizes = [1, 2, 4, 8]
    seconds = {"epoch": [3 * size**1.5 for size in sizes], "training": [2.0] * 4}
    exponents = {part: exponent(sizes, values) for part, values in seconds.items()}
    assert exponents == pytest.approx({"epoch": 1.5, "training": 0.0})
    curve = {"sizes": sizes, "seconds": seconds, "exponents": exponents}
    draw({"groups": curve, "ranks": curve}, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.width > image.height > 100


def test_a_size_is_timed_by_the_benchmark(tmp_path, monkeypatch):
    commands = []

    def run_here(command, **options):
        commands.append(command)
        flags = command[command.index(str(BENCHMARK)) + 1 :]
        return SimpleNamespace(returncode=call(script("benchmark"), *flags) or 0)

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run_here, DEVNULL=None))
    monkeypatch.setattr(Peaks, "measure", lambda *given: Peaks(1e12, 1e10))
    for name in ("ranks", "resolution"):
        small = replace(AXES[name], fixed=SIZES, preset="shapes_smoke")
        monkeypatch.setitem(AXES, name, small)
    curve = measure("ranks", (1, 2), 1, tmp_path)
    assert ["--nproc_per_node=1" in command for command in commands] == [True, False]
    assert curve["exponents"].keys() == {"sampling", "training", "epoch"}
    parts = zip(*curve["seconds"].values(), strict=True)
    assert all(sampling + training == pytest.approx(epoch) for sampling, training, epoch in parts)
    about = time_epochs(AXES["resolution"], 64, 1, tmp_path)["about"]
    assert about["arch"] == "sd3.5-tiny" and about["preset_sizes"]["resolution"] == 64
