"""The video UNet against the released configurations, and against itself in another precision."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file
from torch import nn

from show_1.models import (
    UNet3DConditionModel,
    attention,
    channels_last,
    cpu_kernels,
    frame_multiple,
    sum_in_float32,
    try_kernels,
)
from show_1.models.attention import FrameAttention, TextAttention
from show_1.models.convolution import over_frames
from show_1.models.group_norm import ACTIVATIONS, GroupNorm
from show_1.models.resnet import ResnetBlock, UpsampleConv
from show_1.models.unet_3d_condition import TemporalConv
from tests import tiny

CONFIGS = Path(__file__).parent / "configs"
FAMILIES = {"pixel": tiny.PIXEL, "upscale": tiny.UPSCALE, "latent": tiny.LATENT}


@pytest.mark.parametrize(
    ("name", "parameters", "in_channels", "multiple"),
    [
        ("show-1-base", 1_726_848_390, 3, 8),
        ("show-1-interpolation", 1_726_848_390 + 4 * 320 * 9, 7, 8),  # four more input channels into a 3×3 kernel
        ("show-1-sr1", 796_343_046, 6, 16),
        ("show-1-sr2", 1_411_233_860, 4, 1),
    ],
)
def test_released_configurations(name, parameters, in_channels, multiple):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert unet.conv_in.in_channels == in_channels
    assert frame_multiple(unet) == multiple
    kept = {key: unet.config[key] for key in config if not key.startswith("_")}
    assert kept == {key: value for key, value in config.items() if not key.startswith("_")}


def _inputs(unet: UNet3DConditionModel, dtype: torch.dtype, height: int = 8, width: int = 10) -> dict:
    generator = torch.Generator().manual_seed(0)
    text = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    return {
        "sample": torch.randn(2, unet.config.in_channels, 3, height, width, generator=generator).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 7, text, generator=generator).to(dtype),
        "class_labels": torch.tensor([250, 250]) if unet.config.class_embed_type else None,
    }


def _unet(family: str) -> UNet3DConditionModel:
    unet = UNet3DConditionModel.from_config(FAMILIES[family])
    unet.load_state_dict({name: tiny.fill(name, t.shape, family).float() for name, t in unet.state_dict().items()})
    return unet.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_float32_agrees_with_float64(family):
    unet = _unet(family)
    single = unet(**_inputs(unet, torch.float32)).sample
    assert single.shape == (2, unet.config.out_channels, 3, 8, 10)
    double = unet.double()(**_inputs(unet, torch.float64)).sample
    assert (single - double).abs().max() < 1e-4
    assert double.abs().mean() > 1e-3  # something was computed


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix():
    unet = _unet("pixel").double()
    inputs = _inputs(unet, torch.float64)
    both = unet(**inputs).sample
    for row in range(2):
        alone = unet(
            inputs["sample"][row : row + 1], inputs["timestep"], inputs["encoder_hidden_states"][row : row + 1]
        ).sample
        assert (alone[0] - both[row]).abs().max() < 1e-10


@torch.no_grad()
def test_frames_see_each_other_and_the_text():
    unet = _unet("pixel").double()
    inputs = _inputs(unet, torch.float64)
    before = unet(**inputs).sample
    inputs["sample"][0, :, 2] += 1
    assert (unet(**inputs).sample - before)[0, :, 0].abs().max() > 1e-6
    inputs = _inputs(unet, torch.float64)
    inputs["encoder_hidden_states"][0, 0, 0] += 1
    assert (unet(**inputs).sample - before)[0].abs().max() > 1e-6


@torch.no_grad()
def test_latent_sizes_need_not_divide():
    unet = _unet("latent")
    assert unet(**_inputs(unet, torch.float32, height=7, width=9)).sample.shape[-2:] == (7, 9)


@torch.no_grad()
def test_temporal_convolution_is_diffusers():
    torch.manual_seed(0)
    layer = TemporalConv(32, dropout=0.1).double().eval()
    torch.nn.init.normal_(layer.conv4[-1].weight)
    hidden_states = torch.randn(2 * 5, 32, 3, 4, dtype=torch.float64)
    expected = TemporalConvLayer.forward(layer, hidden_states, num_frames=5)
    assert (layer(hidden_states, num_frames=5) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_changes_nothing_but_the_layout(family):
    """Forwards and backwards, small maps and large; the weights keep their names and values."""
    unet = _unet(family).double()
    quick = channels_last(copy.deepcopy(unet))
    assert quick.state_dict().keys() == unet.state_dict().keys()
    assert {GroupNorm, ResnetBlock} <= {type(module) for module in quick.modules()}
    assert quick.conv_norm_out.activation and not quick.conv_norm_out.training
    inputs = _inputs(unet, torch.float64)
    made = [model(**inputs).sample for model in (unet, quick)]
    assert (made[0] - made[1]).abs().max() < 1e-10
    for sample in made:
        sample.square().mean().backward()
    for name, parameter in unet.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - quick.get_parameter(name).grad).abs().max() < 1e-10, name


@torch.no_grad()
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_stay_last_from_layer_to_layer(family, clips):
    """In PyTorch's own eyes, which look at the strides of a single clip's axis too."""
    unet = channels_last(_unet(family))
    seen = []
    for module in unet.modules():
        if type(module) is GroupNorm:
            module.register_forward_hook(lambda module, given, made: seen.extend((given[0], made)))
    inputs = _inputs(unet, torch.float32, height=24, width=24)  # large enough for PyTorch's own group norm
    unet(**{key: value[:clips] if torch.is_tensor(value) and value.ndim else value for key, value in inputs.items()})
    images = [x for x in seen if x.ndim == 4]
    assert len(images) > 40 and all(x.is_contiguous(memory_format=torch.channels_last) for x in images)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "sums"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_the_last_layers_do_not_round_to_half_precision(dtype, sums):
    unet = channels_last(_unet("pixel").to(dtype))
    seen = []
    unet.conv_norm_out.register_forward_hook(lambda module, given, made: seen.extend((given[0], made)))
    sample = unet(**_inputs(unet, dtype)).sample
    given, normed = seen
    assert (given.dtype, normed.dtype, sample.dtype) == (sums, torch.float32, torch.float32)
    norm, conv = unet.conv_norm_out, unet.conv_out
    expected = F.group_norm(given.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    expected = F.conv2d(F.gelu(expected), conv.weight.double(), conv.bias.double(), padding=1)
    assert (sample.transpose(1, 2).flatten(0, 1) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_sample_is_centred_where_the_configuration_says_so():
    unet = _unet("pixel")
    inputs = _inputs(unet, torch.float32)
    expected = unet(**inputs | {"sample": 2 * inputs["sample"] - 1}).sample
    unet.register_to_config(center_input_sample=True)
    assert torch.equal(unet(**inputs).sample, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("works", [True, False])
@torch.no_grad()
def test_sums_in_float32(monkeypatch, family, works):
    """With and without kernels: what blocks hand on is float32 then, what is multiplied is not."""
    monkeypatch.setattr(try_kernels, "failed", set() if works else {"cpu"})
    unet = channels_last(_unet(family).bfloat16())
    expected = copy.deepcopy(unet).double()(**_inputs(unet, torch.float64)).sample
    rounded = unet(**_inputs(unet, torch.bfloat16)).sample
    sum_in_float32(unet)
    handed_on, multiplied = set(), set()
    for module in unet.modules():
        if isinstance(module, ResnetBlock | TemporalConv):
            module.register_forward_hook(lambda module, given, made: handed_on.add(made.dtype))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, given: multiplied.add(given[0].dtype))
    made = unet(**_inputs(unet, torch.bfloat16)).sample
    assert (handed_on, multiplied) == ({torch.float32}, {torch.bfloat16})
    assert (made - expected).square().mean() < (rounded - expected).square().mean()


@pytest.mark.parametrize("shape", [(2, 32, 3, 4), (1, 64, 40, 40), (3, 32, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_group_norm_is_pytorchs(shape, offset):
    torch.manual_seed(0)
    norm = GroupNorm(8, shape[1]).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(memory_format=torch.channels_last)
    expected = torch.nn.GroupNorm.forward(norm, x.contiguous())
    assert (norm(x) - expected).abs().max() < 1e-7
    with torch.no_grad():
        assert (norm(x) - expected).abs().max() < 1e-7
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    constant = torch.full(shape, 1e4).to(memory_format=torch.channels_last)
    assert norm.float()(constant).isfinite().all()  # rounding must not make the variance negative


def _formula(x, norm, activation, scale, shift, added=None) -> torch.Tensor:
    if added is not None:
        x = x + added[(..., *[None] * (x.ndim - 2))]
    y = torch.nn.functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None:
        over = (..., *[None] * (x.ndim - 2))
        y = y * (1 + scale[over]) + shift[over]
    return ACTIVATIONS[activation](y) if activation else y


def _norm_case(groups: int, shape: tuple[int, ...], offset: float = 0.0) -> tuple:
    """Return a norm, its input in channels last and a scale and shift as they come, halves of one tensor; float64."""
    torch.manual_seed(0)
    norm = GroupNorm(groups, shape[1]).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape[0], *shape[2:], shape[1], dtype=torch.float64).movedim(-1, 1) + offset
    return norm, x, *torch.randn(shape[0], 2 * shape[1], dtype=torch.float64).chunk(2, dim=1)


@pytest.mark.parametrize("shape", [(2, 32, 3, 4), (2, 64, 40, 40), (3, 32, 1, 1), (2, 32, 7)])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("scaled", [False, True])
def test_group_norm_takes_scale_shift_and_activation_along(shape, activation, scaled):
    norm, x, *scale_shift = _norm_case(8, shape)
    rest = (activation, *(scale_shift if scaled else (None, None)))
    expected = _formula(x, norm, *rest)
    for layout in (x, x.contiguous()):
        assert (norm(layout, *rest) - expected).abs().max() < 1e-10
        with torch.no_grad():
            assert (norm(layout, *rest) - expected).abs().max() < 1e-10
    if scaled:  # under autocast, where they come out of a linear layer, in another type
        half = [part.bfloat16() for part in scale_shift]
        expected = _formula(x, norm, activation, *(part.double() for part in half))
        assert (norm(x, activation, *half) - expected).abs().max() < 0.1


def _kernels_device() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda" if torch.cuda.is_available() else None


needs_gpu = pytest.mark.skipif(not _kernels_device(), reason="needs Triton, and CUDA or TRITON_INTERPRET=1")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
on_both = pytest.mark.parametrize(
    ("kernels", "device", "dtype"),
    [
        *(
            pytest.param("gpu_kernels", _kernels_device(), dtype, marks=needs_gpu)
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        ),
        *(pytest.param("cpu_kernels", "cpu", dtype, marks=needs_compiler) for dtype in (torch.bfloat16, torch.float32)),
    ],
)


@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (8, (2, 32, 5, 7)),
        (32, (1, 160, 3, 50, 9)),
        (32, (3, 320, 1, 1)),
        (4, (2, 24, 33)),
        (3, (1, 129, 2, 2)),
        (32, (1, 128, 70, 70)),
    ],
)
@on_both
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@torch.no_grad()
def test_kernels_compute_the_formula(groups, shape, kernels, device, dtype, offset):
    kernels = importlib.import_module(f"show_1.models.{kernels}")
    norm, x, scale, shift = _norm_case(groups, shape, offset)
    norm, x, scale, shift = (thing.to(device, dtype) for thing in (norm, x, scale, shift))
    # Far from 0, rounding to bfloat16 leaves a small group hardly any variance, and the norm enlarges what is left.
    precision = torch.finfo(dtype).eps * (4 + offset / 100) + 1e-6 * offset
    for rest in (
        (None, None, None, None),
        ("gelu", scale, shift, None),
        ("silu", None, None, norm.bias),
        ("gelu", scale, shift, shift - 3),
    ):
        call = (dtype, norm.num_groups, norm.weight, norm.bias, norm.eps, *rest)
        y = kernels.group_norm(x, *call)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, dtype, x.stride())
        assert kernels.group_norm(x.float(), *call).equal(y)
        exact = (part if part is None or isinstance(part, str) else part.double() for part in rest)
        expected = _formula(x.double(), copy.deepcopy(norm).double(), *exact)
        roundings = 1 if rest[3] is None else 2  # a sum, too
        assert ((y - expected).abs() <= roundings * precision * (1 + expected.abs())).all()


@needs_gpu
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 320, 3, 50, 9), (3, 129, 1)])
def test_sum_with_a_bias_computes_the_formula(shape, dtypes):
    from show_1.models import gpu_kernels

    torch.manual_seed(0)
    x, y = (
        torch.randn(shape[0], *shape[2:], shape[1], device=_kernels_device(), dtype=dtype).movedim(-1, 1)
        for dtype in dtypes
    )
    bias = torch.randn(shape[1], device=_kernels_device(), dtype=dtypes[1])
    total = gpu_kernels.add(x, y, bias)
    assert (total.dtype, total.stride()) == (dtypes[0], x.stride())
    exact = x.double() + y.double() + bias.double()[(..., *[None] * (x.ndim - 2))]
    assert (total - exact).abs().max() <= 2 * torch.finfo(dtypes[0]).eps * exact.abs().max()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "out"), [(32, 64), (64, 32), (128, 128)])
@pytest.mark.parametrize(("frames", "pixels"), [(1, 3), (2, 130), (5, 300)])
def test_convolution_over_frames_computes_the_formula(channels, out, frames, pixels, dtype):
    from show_1.models import gpu_kernels

    if (_kernels_device(), dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    torch.manual_seed(0)
    x = torch.randn(2, frames, pixels, channels, device=_kernels_device(), dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.randn(out, channels, 3, device=_kernels_device(), dtype=dtype) / (3 * channels) ** 0.5
    y = gpu_kernels.frame_conv(x, weight)
    assert (y.dtype, y.movedim(1, -1).is_contiguous()) == (dtype, True)
    exact = F.conv2d(x.double(), weight.double()[..., None], padding=(1, 0))
    assert ((y - exact).abs() <= torch.finfo(dtype).eps * (1 + exact.abs())).all()


@needs_compiler
@torch.no_grad()
def test_a_programs_default_type_changes_nothing():
    from show_1.models import cpu_kernels

    norm, x, *_ = _norm_case(8, (2, 32, 50, 70))
    norm, x = norm.bfloat16(), x.bfloat16()
    given = x, torch.bfloat16, 8, norm.weight, norm.bias, 1e-5
    expected = cpu_kernels.group_norm(*given)
    torch.set_default_dtype(torch.bfloat16)  # in which the kernels' own float32 would not find room
    try:
        assert torch.equal(cpu_kernels.group_norm(*given), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@on_both
@pytest.mark.parametrize("shape", [(2, 3, 80), (70, 200), (1, 2 * 5000)])
def test_gated_gelu_computes_the_formula(shape, kernels, device, dtype):
    kernels = importlib.import_module(f"show_1.models.{kernels}")
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, dtype=dtype)
    values, gates = x.double().chunk(2, dim=-1)
    exact = values * F.gelu(gates)
    assert ((kernels.gated_gelu(x) - exact).abs() <= (torch.finfo(dtype).eps + 1e-7) * (1 + exact.abs())).all()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_a_moments_want_of_memory_is_no_fault_of_the_kernels(monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(try_kernels, "failed", set())
    monkeypatch.setattr("show_1.models.cpu_kernels.gated_gelu", full)
    with pytest.raises(type(error)):
        try_kernels.attempt("gated_gelu", torch.zeros(2, 8))
    assert not try_kernels.failed


@torch.no_grad()
@pytest.mark.parametrize("works", [True, False])
def test_few_channels_over_frames_are_left_to_our_kernel_in_float16(monkeypatch, works):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(128, 128, (3, 1, 1)).half()
    x = torch.randn(2, 3, 20, 128, dtype=torch.float16).permute(0, 3, 1, 2)
    whole, none = over_frames(conv, x, apart=True)
    assert none is None
    taken = []

    def attempt(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        taken.append((name, tuple(weight.shape)))
        return F.conv2d(x, weight[..., None], padding=(1, 0)) if works else None

    monkeypatch.setattr(try_kernels, "suit", lambda name, *_: True)
    monkeypatch.setattr(try_kernels, "attempt", attempt)
    made, bias = over_frames(conv, x, apart=True)
    assert taken == [("frame_conv", (128, 128, 3))]
    assert (made + bias[:, None, None] - whole).abs().max() < 2e-3
    assert over_frames(conv.bfloat16(), x.bfloat16(), apart=True)[1] is conv.bias and len(taken) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("works", [True, False])
def test_a_unet_whose_kernels_take_biases_along_computes_the_same(monkeypatch, family, works):
    """With each kernel's formula in its place, and with kernels that fail."""
    unet = channels_last(_unet(family).double())
    inputs = _inputs(unet, torch.float64)
    expected = unet(**inputs).sample
    taken = set()

    def attempt(name: str, *args) -> torch.Tensor | None:
        taken.add(name)
        return KERNELS[name](*args) if works else None

    monkeypatch.setattr(try_kernels, "suit", lambda name, *_: True)
    monkeypatch.setattr(try_kernels, "attempt", attempt)
    assert (unet(**inputs).sample - expected).abs().max() < 1e-10
    assert {"group_norm", "add", "gated_gelu"} <= taken


def _group_norm(x, dtype, groups, weight, bias, eps, activation, scale, shift, added) -> torch.Tensor:
    norm = GroupNorm(groups, len(weight), eps)
    norm.weight.data, norm.bias.data = weight, bias
    return _formula(x, norm, activation, scale, shift, added).to(dtype)


def _attention(**variant) -> Attention:
    torch.manual_seed(0)
    return Attention(**{"query_dim": 40, "heads": 4, "dim_head": 10} | variant).double().eval()


def _scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


KERNELS = {
    "group_norm": _group_norm,
    "add": lambda x, y, bias: x + y + bias[(..., *[None] * (x.ndim - 2))],
    "gated_gelu": lambda x: x.chunk(2, dim=-1)[0] * F.gelu(x.chunk(2, dim=-1)[1]),
    "short_attention": _scaled_dot_product,
}


@pytest.mark.parametrize(
    ("variant", "shape", "ours"),
    [
        ({}, (6, 5, 40), True),
        ({"bias": True, "dropout": 0.5}, (6, 5, 40), True),
        ({}, (6, 17, 40), False),
        ({"dim_head": 16}, (6, 5, 40), True),
        ({"dim_head": 68}, (6, 5, 40), False),
    ],
)
@torch.no_grad()
def test_frame_attention_is_diffusers(monkeypatch, variant, shape, ours):
    """With a formula for the kernel, which is taken where it should be and nowhere else."""
    attention = _attention(**variant)
    hidden_states = torch.randn(shape).double()
    assert type(attention.processor) is AttnProcessor2_0
    expected = attention(hidden_states)
    attention.set_processor(FrameAttention())
    assert (attention(hidden_states) - expected).abs().max() < 1e-12
    taken = []
    monkeypatch.setattr(try_kernels, "suit", lambda name, *_: True)
    monkeypatch.setattr(try_kernels, "attempt", lambda name, *args: taken.append(name) or _scaled_dot_product(*args))
    assert (attention(hidden_states) - expected).abs().max() < 1e-12
    assert taken == ["short_attention"] * ours


@pytest.mark.parametrize("variant", [{}, {"cross_attention_norm": "group_norm"}, {"only_cross_attention": True}])
@torch.no_grad()
def test_text_attention_is_diffusers(variant):
    added = {"added_kv_proj_dim": 24, "cross_attention_norm_num_groups": 6}
    layer = _attention(norm_num_groups=4, bias=True, residual_connection=True, **added, **variant)
    layer.set_processor(AttnAddedKVProcessor2_0())
    frames, text = torch.randn(2 * 5, 40, 3, 4, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    expected = layer(frames, encoder_hidden_states=text.repeat_interleave(5, dim=0))
    layer.set_processor(TextAttention())
    assert (layer(frames, encoder_hidden_states=text) - expected).abs().max() < 1e-12
    last = channels_last(nn.ModuleList([layer]))[0](frames.to(memory_format=torch.channels_last), text)
    assert (last - expected).abs().max() < 1e-12 and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("at_once", [1, 3000, 2**20])
@torch.no_grad()
def test_frame_attention_on_a_cpu_is_diffusers_in_parts_of_any_size(monkeypatch, at_once):
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    taken, across = [], attention.attend_across
    monkeypatch.setattr(attention, "attend_across", lambda *given: taken.append(1) or across(*given))
    layer, tokens = _attention(), torch.randn(7, 5, 40, dtype=torch.float64)
    expected = layer(tokens)
    layer.set_processor(FrameAttention())
    assert (layer(tokens) - expected).abs().max() < 1e-12 and taken
    assert (layer.bfloat16()(tokens.bfloat16()) - expected).abs().max() < 0.03


def test_frame_attention_is_the_temporal_transformers():
    unet = channels_last(_unet("pixel"))
    ours = {name for name, processor in unet.attn_processors.items() if type(processor) is FrameAttention}
    assert ours == {name for name in unet.attn_processors if "temp_attentions" in name} != set()


@on_both
@torch.no_grad()
def test_kernels_make_no_numbers_of_what_is_none(kernels, device, dtype):
    kernels = importlib.import_module(f"show_1.models.{kernels}")
    numbers = torch.randn(2, 8, 24, device=device, dtype=dtype)
    for place in range(3):
        q, k, v = (torch.full_like(numbers, torch.nan) if place == n else numbers for n in range(3))
        assert kernels.short_attention(q, k, v, 3).isnan().all()
    nothing = torch.full_like(numbers, torch.nan)
    for activation in (None, *ACTIVATIONS):
        norm = torch.ones(2, 8, device=device, dtype=dtype)
        assert kernels.group_norm(nothing, dtype, 4, *norm, 1e-5, activation).isnan().all()
    assert kernels.gated_gelu(nothing).isnan().all()


@pytest.mark.parametrize("frames", [1, 5, 8, 16])
@pytest.mark.parametrize("features", [5, 10, 12, 15, 20, 64])
@pytest.mark.parametrize("heads", [3, 64])
@on_both
@torch.no_grad()
def test_short_attention_computes_the_formula(frames, features, heads, kernels, device, dtype):
    kernels = importlib.import_module(f"show_1.models.{kernels}")
    torch.manual_seed(0)
    channels = heads * features
    size = torch.tensor([1, 100])[:, None, None]  # of the second sequence's scores, exponentials would overflow
    q, k, v = torch.randn(3, 2, frames, channels)
    q, k, v = (x.to(device, dtype) for x in (q * size, k, v))
    k, v = torch.cat([k, v], dim=-1).split(channels, dim=-1)
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    y = kernels.short_attention(q, k, v, heads)
    assert (y.shape, y.dtype) == (q.shape, dtype) and y.is_contiguous()
    difference = (y - _scaled_dot_product(q.double(), k.double(), v.double(), heads)).abs().cpu()
    assert (difference <= 4 * torch.finfo(dtype).eps + 1e-6 * size).all()


@pytest.fixture
def uncompiled(monkeypatch, tmp_path):
    """CPU kernels as in a new process of a user whose cache is the folder given back, which is not there yet."""
    caches = (cpu_kernels._library, cpu_kernels._function)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(try_kernels, "failed", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", None])
@torch.no_grad()
def test_without_kernels_it_goes_on_and_says_so_once(uncompiled, monkeypatch, caplog, compiler):
    norm, x, *_ = _norm_case(8, (2, 32, 3, 4))
    attention, tokens = _attention(), torch.randn(6, 5, 40, dtype=torch.float64)
    expected = attention(tokens)
    normalised = _formula(x, norm, "silu", None, None)
    attention.float().set_processor(FrameAttention())
    norm.float()
    monkeypatch.setenv("CXX", compiler or "")
    if compiler is None:
        monkeypatch.setenv("PATH", "")
    for _ in range(2):
        assert (attention(tokens.float()) - expected).abs().max() < 1e-5
        assert (norm(x.float(), "silu") - normalised).abs().max() < 1e-5
    assert [record.name for record in caplog.records] == ["show-1"]
    assert (compiler or "g++") in caplog.text


@needs_compiler
def test_cpu_kernels_are_compiled_once(uncompiled, monkeypatch):
    g = torch.randn(3, 8)
    expected = cpu_kernels.gated_gelu(g)
    (kept,) = (uncompiled / "show-1").iterdir()
    for cache in (cpu_kernels._library, cpu_kernels._function):
        cache.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert cpu_kernels.gated_gelu(g).equal(expected)
    assert list((uncompiled / "show-1").iterdir()) == [kept]


@needs_compiler
@pytest.mark.parametrize("damaged", [b"", b"no library"])
def test_damaged_cpu_kernels_are_compiled_again(uncompiled, monkeypatch, damaged):
    compile_, kept = cpu_kernels._compile, []
    monkeypatch.setattr(cpu_kernels, "_compile", lambda command, file: kept.append(file))
    cpu_kernels._library()
    cpu_kernels._library.cache_clear()
    kept[0].parent.mkdir(parents=True)
    kept[0].write_bytes(damaged)
    monkeypatch.setattr(cpu_kernels, "_compile", compile_)
    g = torch.randn(3, 8)
    assert (cpu_kernels.gated_gelu(g) - g[:, :4] * F.gelu(g[:, 4:])).abs().max() < 1e-6
    assert kept[0].stat().st_size > len(damaged)


@needs_compiler
def test_cpu_kernels_need_no_cache(uncompiled):
    uncompiled.write_text("a file where the folder would be")
    g = torch.randn(3, 8)
    assert (cpu_kernels.gated_gelu(g) - g[:, :4] * F.gelu(g[:, 4:])).abs().max() < 1e-6


@needs_compiler
@torch.no_grad()
def test_cpu_kernels_compute_the_same_on_any_number_of_threads():
    norm, x, *_ = _norm_case(8, (1, 32, 50, 30))
    norm, x = norm.float(), x.float()
    made, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(cpu_kernels.group_norm(x, x.dtype, 8, norm.weight, norm.bias, norm.eps))
    finally:
        torch.set_num_threads(threads)
    assert made[0].equal(made[1]) and made[0].equal(made[2])


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"out_channels": 64, "non_linearity": "gelu", "dropout": 0.5},
        {"temb_channels": None, "out_channels": 64},
        {"up": True, "skip_time_act": True, "time_embedding_norm": "scale_shift"},
        {"down": True, "time_embedding_norm": "scale_shift", "output_scale_factor": 2**0.5, "non_linearity": "gelu"},
        {"time_embedding_norm": "scale_shift", "out_channels": 64, "non_linearity": "mish"},
    ],
)
@pytest.mark.parametrize(("batch", "size"), [(2, 6), (2, 32), (65, 4)])
def test_resnet_block_is_diffusers(variant, batch, size):
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 32, "temb_channels": 16, "groups": 8} | variant).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    quick = channels_last(copy.deepcopy(block))
    assert type(quick) is ResnetBlock and not quick.training
    x = torch.randn(batch, 32, size, size, dtype=torch.float64)
    temb = torch.randn(batch, 16, dtype=torch.float64) if block.time_emb_proj else None
    expected = block(x, temb)
    x = x.to(memory_format=torch.channels_last)
    assert (quick(x, temb) - expected).abs().max() < 1e-10
    with torch.no_grad():
        y = quick(x, temb)
    assert (y - expected).abs().max() < 1e-10
    assert y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_with_a_convolution_is_diffusers(bias):
    torch.manual_seed(0)
    models = torch.nn.ModuleList([Upsample2D(8, use_conv=True, out_channels=12, bias=bias), Upsample2D(8)]).double()
    expected, quick = models, channels_last(copy.deepcopy(models))
    assert [type(model) for model in quick] == [UpsampleConv, Upsample2D]  # without a convolution it stays as it is
    x = torch.randn(3, 8, 26, 28, dtype=torch.float64).to(memory_format=torch.channels_last)
    for sizes in ((), ((52, 56),), ((51, 55),)):
        made = quick[0](x, *sizes)
        assert (made - expected[0](x, *sizes)).abs().max() < 1e-12
    assert quick[0](x).is_contiguous(memory_format=torch.channels_last)
    halves = [model[0].bfloat16()(x.bfloat16()).double() for model in (quick, expected)]
    exact = expected[0].double()(x.bfloat16().double())  # of the rounded weights
    errors = [(half - exact).square().mean().sqrt() for half in halves]
    assert errors[0] < 1.5 * errors[1]


def test_strict_loading(tmp_path):
    _unet("pixel").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    UNet3DConditionModel.from_pretrained(tmp_path)
    save_file(
        {k: v for k, v in weights.items() if k != "down_blocks.0.temp_convs.0.conv2.3.weight"}, file, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"missing.*down_blocks\.0\.temp_convs\.0\.conv2\.3\.weight"):
        UNet3DConditionModel.from_pretrained(tmp_path)
    save_file(weights | {"stray.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected.*stray\.weight"):
        UNet3DConditionModel.from_pretrained(tmp_path)


def test_from_pretrained_in_float64(tmp_path):
    _unet("pixel").save_pretrained(tmp_path)
    unet = UNet3DConditionModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float64}


def test_temporal_attention_has_as_many_heads_as_the_spatial_ones_are_large():
    three = {
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["ResnetDownsampleBlock3D", "SimpleCrossAttnDownBlock3D", "SimpleCrossAttnDownBlock3D"],
        "up_block_types": ["SimpleCrossAttnUpBlock3D", "SimpleCrossAttnUpBlock3D", "ResnetUpsampleBlock3D"],
    }
    unet = UNet3DConditionModel.from_config(tiny.PIXEL | three | {"attention_head_dim": [8, 16, 32]})
    blocks = [block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if len(block.attentions)]
    sizes = [block.attentions[0].inner_dim // block.attentions[0].heads for block in blocks]
    assert sizes == [16, 32, 32, 8, 16]
    assert sizes == [block.temp_attentions[0].transformer_blocks[0].attn1.heads for block in blocks]


@pytest.mark.parametrize("key", ["class_embeddings_concat", "dual_cross_attention"])
def test_configurations_that_are_not_known_are_refused(key):
    with pytest.raises(ValueError, match=key):
        UNet3DConditionModel.from_config(tiny.UPSCALE | {key: True})
