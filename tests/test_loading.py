"""Loading from folders as they are on the hub, and what is said of damaged ones."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from show_1 import Show1Pipeline, hub, loading
from show_1.cascade import Cascade
from show_1.errors import Show1Error
from show_1.models import UNet3DConditionModel
from tests import tiny

FOLDERS = {
    "keyframes": "showlab/show-1-base",
    "interpolation": "showlab/show-1-interpolation",
    "first_frame": "DeepFloyd/IF-II-L-v1.0",
    "pixel_upscale": "showlab/show-1-sr1",
    "latent_upscale": "showlab/show-1-sr2",
}
MODELS = {
    ("keyframes", "text_encoder"): T5EncoderModel,
    ("keyframes", "unet"): UNet3DConditionModel,
    ("interpolation", "unet"): UNet3DConditionModel,
    ("first_frame", "unet"): UNet2DConditionModel,
    ("pixel_upscale", "unet"): UNet3DConditionModel,
    ("latent_upscale", "text_encoder"): CLIPTextModel,
    ("latent_upscale", "vae"): AutoencoderKL,
    ("latent_upscale", "unet"): UNet3DConditionModel,
}
KINDS = [("keyframes", "text_encoder"), ("keyframes", "unet"), ("first_frame", "unet")]
KINDS += [("latent_upscale", "text_encoder"), ("latent_upscale", "vae")]  # one of each class
SCHEDULERS = [(table, name) for table, names in hub.COMPONENTS.items() for name in names if name.endswith("scheduler")]
STAGES = {
    "keyframes": loading.load_keyframes,
    "interpolation": loading.load_interpolation,
    "pixel_upscale": loading.load_pixel_upscale,
    "latent_upscale": loading.load_latent_upscale,
}
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The tiny cascade's folder, to be read only."""
    return tiny.build(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture
def copy(pristine, tmp_path):
    """Copies one table's model, to be changed; the cascade beside it still names them all."""
    shutil.copy(pristine / "cascade.toml", tmp_path)

    def copy(table: str) -> Path:
        return Path(shutil.copytree(pristine / FOLDERS[table], tmp_path / FOLDERS[table]))

    return copy


def repository(folder: Path, table: str, dtype: torch.dtype = torch.float32) -> loading.Repository:
    cascade = Cascade.load(folder / "cascade.toml")
    return loading.Repository(cascade, table, hub.find(cascade, table).folder, dtype)


def load_stage(folder: Path, table: str):
    cascade = Cascade.load(folder / "cascade.toml")
    return STAGES[table](cascade, hub.fetch(cascade), torch.float32)


def load(folder: Path, table: str, component: str, dtype: torch.dtype = torch.float32):
    """What loading makes of one component in a cascade's folder."""
    of_table = repository(folder, table, dtype)
    if component.endswith("scheduler"):
        return of_table.scheduler(component)
    if component == "tokenizer":
        return of_table.tokenizer(T5Tokenizer if table == "keyframes" else CLIPTokenizer)
    return of_table.model(MODELS[table, component], component)


def refusal(call: Callable, *words: str) -> Show1Error:
    """The error that `call` ends in; its problem must say all of `words`, in one sentence."""
    with pytest.raises(Show1Error) as caught:
        call()
    error = caught.value
    assert [word for word in words if word not in error.problem] == [], error.problem
    assert "\n" not in error.problem and re.search(r"[^.]\.$", error.problem) and error.remedy.endswith(".")
    return error


def weight_file(component: Path) -> Path:
    """The file that holds a component's weights, the first of several."""
    return min(component / name for name in hub.choose_weights(names_in(component), "fp16").names)


def names_in(component: Path) -> list[str]:
    return [file.name for file in component.iterdir()]


def read(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def write(weights: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(weights, file, metadata={"format": "pt"})
    else:
        torch.save(weights, file)


def rewrite(file: Path, change: Change) -> None:
    weights = read(file)
    change(weights)
    write(weights, file)


def weights_in(component: Path) -> dict[str, torch.Tensor]:
    """All that a component's weight files hold."""
    weights = {}
    for name in hub.choose_weights(names_in(component), "fp16").names:
        weights |= {} if name.endswith(".json") else read(component / name)
    return weights


def assert_holds(model: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """The model has just these weights, as they are in this dtype, and is ready to be used."""
    state = model.state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # T5's `shared.weight`, by another name
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name].to(dtype), tensor.to(dtype), rtol=0, atol=0)
    assert not model.training


# --- What is right


@pytest.mark.parametrize(("table", "component"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_models_hold_what_the_files_hold(pristine, table, component, dtype):
    model = load(pristine, table, component, dtype)
    assert type(model) is MODELS[table, component]
    assert_holds(model, weights_in(pristine / FOLDERS[table] / component), dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if isinstance(model, T5EncoderModel) and dtype == torch.float16:
        # transformers keeps these in float32, for the sums behind them overflow in float16.
        assert {dtypes.pop(name) for name in list(dtypes) if name.endswith(".wo.weight")} == {torch.float32}
    last = {name: dtypes.pop(name) for name in list(dtypes) if name.startswith(("conv_norm_out.", "conv_out."))}
    if isinstance(model, UNet3DConditionModel) and dtype == torch.float16:
        assert set(last.values()) == {torch.float32} and len(last) == 4  # or what they round is seen in the frames
    assert set(dtypes.values()) == {dtype}


@pytest.mark.parametrize("table", STAGES)
def test_stages_have_all_their_components(pristine, table):
    stage = load_stage(pristine, table)
    assert [name for name, component in stage.components.items() if component is None] == []


def test_module_that_does_not_exist_is_not_asked_for(pristine):
    """model_index.json names one, and any other library would import it."""
    index = json.loads((pristine / FOLDERS["keyframes"] / "model_index.json").read_text())
    assert index["unet"][0] == "showone.models.unet_3d_condition"
    load_stage(pristine, "keyframes")


def test_t5_is_taken_once(tmp_path, pristine):
    """The other pixel stages' repositories have it too: damaged or not, it is not looked at."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    for table in ("interpolation", "first_frame", "pixel_upscale"):
        for name in ("text_encoder", "tokenizer"):
            folder = tmp_path / FOLDERS[table] / name
            folder.mkdir()
            (folder / "config.json").write_text("no JSON")
    for table in ("interpolation", "pixel_upscale"):
        load_stage(tmp_path, table)


def test_t5_tokenizer_from_spiece_model_alone(copy, tmp_path):
    folder = copy("keyframes") / "tokenizer"
    for file in folder.iterdir():
        if file.name != "spiece.model":
            file.unlink()
    tokens = load(tmp_path, "keyframes", "tokenizer")("a cat jumps", padding="max_length", max_length=77).input_ids
    assert len(tokens) == 77
    assert tokens[12:15] == [1, 0, 0]  # the end of the sentence at its length, then padding
    assert 2 not in tokens  # unknown


def test_with_spiece_model_alone_a_cascade_makes_the_same(tmp_path, pristine):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    (tmp_path / "showlab/show-1-base/tokenizer/tokenizer_config.json").unlink()  # so there are a hundred sentinels
    made, true = (Show1Pipeline.from_cascade(folder / "cascade.toml", "cpu") for folder in (tmp_path, pristine))
    assert len(made.keyframes.tokenizer) == len(true.keyframes.tokenizer) + 100
    assert torch.equal(*(pipeline.keyframes.encode("a cat jumps").prompt for pipeline in (made, true)))


def test_clip_tokenizer(pristine):
    tokens = load(pristine, "latent_upscale", "tokenizer")("a cat").input_ids
    assert (tokens[0], tokens[-1], len(tokens)) == (512, 513, 6)


@pytest.mark.parametrize(("table", "component"), KINDS)
def test_safetensors_hold_the_same(copy, tmp_path, pristine, table, component):
    folder = copy(table) / component
    weights = weights_in(folder)
    _remove_weights(folder)
    write(weights, folder / f"{_stem(table, component)}.safetensors")
    assert_holds(load(tmp_path, table, component), weights)


@pytest.mark.parametrize(("table", "component"), KINDS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_hold_the_same(copy, tmp_path, capfd, table, component, form):
    folder = copy(table) / component
    weights = weights_in(folder)
    _remove_weights(folder)
    stem = "pytorch_model" if form == "bin" and component == "text_encoder" else _stem(table, component)
    index: dict[str, str] = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003.{form}"
        part = {name: weights[name] for name in list(weights)[number::3]}
        write(part, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_holds(load(tmp_path, table, component), weights)
    assert capfd.readouterr().err == ""  # no bar


def test_variant_comes_first(copy, tmp_path):
    """The fp16 files are half as large: the full ones are not to be read, whatever form they have."""
    folder = copy("first_frame") / "unet"
    weights = weights_in(folder)
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        (folder / name).write_text("not to be read")
    (folder / "diffusion_pytorch_model.fp16.bin").write_text("nor this, beside safetensors")
    assert_holds(load(tmp_path, "first_frame", "unet"), weights)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_plain_weights_where_there_is_no_variant(copy, tmp_path, form):
    folder = copy("first_frame") / "unet"
    weights = weights_in(folder)
    _remove_weights(folder)
    write(weights, folder / f"diffusion_pytorch_model.{form}")
    assert_holds(load(tmp_path, "first_frame", "unet"), weights)


def test_variant_that_is_not_asked_for_is_left(copy, tmp_path):
    folder = copy("keyframes") / "unet"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_text("not to be read")
    assert_holds(load(tmp_path, "keyframes", "unet"), read(folder / "diffusion_pytorch_model.bin"))


def test_clip_as_it_is_on_the_hub(copy, tmp_path):
    """Every name begins with text_model, and a buffer is among them that today's class does not keep."""
    file = copy("latent_upscale") / "text_encoder" / "pytorch_model.bin"
    weights = {name.removeprefix("text_model."): tensor for name, tensor in read(file).items()}
    on_the_hub = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    write(on_the_hub | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    model = load(tmp_path, "latent_upscale", "text_encoder")
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in weights.items())


def test_t5_with_its_embeddings_twice(copy, tmp_path):
    """Older files hold them under both names."""
    file = weight_file(folder := copy("keyframes") / "text_encoder")
    weights = weights_in(folder)
    rewrite(file, lambda held: held.update({"encoder.embed_tokens.weight": weights["shared.weight"].clone()}))
    assert_holds(load(tmp_path, "keyframes", "text_encoder"), weights)


def test_vae_with_old_names(copy, tmp_path):
    file = copy("latent_upscale") / "vae" / "diffusion_pytorch_model.bin"
    weights = read(file)
    old = {}
    for name, tensor in weights.items():
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        old[name] = tensor
    assert len(old.keys() - weights.keys()) == 16  # encoder and decoder, four layers, weight and bias
    write(old, file)
    assert_holds(load(tmp_path, "latent_upscale", "vae"), weights)


@pytest.mark.parametrize(("table", "component"), SCHEDULERS)
def test_schedulers_end_as_the_original_ones(pristine, table, component):
    file = pristine / FOLDERS[table] / component / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert "final_sigmas_type" not in config
    scheduler = load(pristine, table, component)
    assert type(scheduler).__name__ == config.pop("_class_name")
    assert {key: scheduler.config[key] for key in config} == config
    if type(scheduler).__name__ == "DPMSolverMultistepScheduler":
        assert scheduler.config.final_sigmas_type == "sigma_min"


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_schedulers_that_say_how_they_end_are_believed(copy, tmp_path, end):
    file = copy("latent_upscale") / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"final_sigmas_type": end}))
    assert load(tmp_path, "latent_upscale", "scheduler").config.final_sigmas_type == end


@pytest.mark.parametrize(
    ("table", "file", "change", "same"),
    [
        ("keyframes", "scheduler/scheduler_config.json", {"solver_order": 1}, False),
        ("keyframes", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, False),
        ("keyframes", "text_encoder/config.json", {"layer_norm_epsilon": 1e-3}, False),
        ("latent_upscale", "vae/config.json", {"scaling_factor": 0.5}, False),
        ("latent_upscale", "vae/config.json", {"_diffusers_version": "0.1.0"}, True),
        ("latent_upscale", "text_encoder/config.json", {"transformers_version": "4.0.0", "_name_or_path": "x"}, True),
    ],
)
def test_the_fingerprint_is_of_weights_and_configurations(copy, pristine, tmp_path, table, file, change, same):
    file = copy(table) / file
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    there, here = (load_components(folder, table) for folder in (pristine, tmp_path))
    assert (loading.fingerprint([there]) == loading.fingerprint([here])) == same


def load_components(folder: Path, table: str) -> SimpleNamespace:
    names = [name for name in hub.COMPONENTS[table] if name != "unet"]  # which takes longest
    return SimpleNamespace(components={name: load(folder, table, name) for name in names})


# --- What is missing


@pytest.mark.parametrize(
    ("table", "missing", "said"),
    [
        ("keyframes", "unet", "unet lacks config.json"),
        ("keyframes", "text_encoder", "text_encoder lacks config.json"),
        ("interpolation", "scheduler", "/scheduler lacks scheduler_config.json"),
        ("pixel_upscale", "image_noising_scheduler", "lacks scheduler_config.json"),
        ("latent_upscale", "vae", "vae lacks config.json"),
        ("keyframes", "unet/config.json", "unet lacks config.json"),
        ("keyframes", "text_encoder/config.json", "text_encoder lacks config.json"),
        ("interpolation", "unet/diffusion_pytorch_model.bin", "unet lacks a weight file"),
        ("first_frame", "unet/diffusion_pytorch_model.fp16.safetensors", "unet lacks a weight file"),
        ("latent_upscale", "text_encoder/pytorch_model.bin", "text_encoder lacks a weight file"),
        ("keyframes", "text_encoder/pytorch_model-00001-of-00002.bin", "pytorch_model-00001-of-00002.bin"),
        ("keyframes", "text_encoder/pytorch_model-00002-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ("keyframes", "text_encoder/pytorch_model.bin.index.json", "text_encoder lacks the index"),
        ("keyframes", "tokenizer/spiece.model", "tokenizer lacks spiece.model"),
        ("latent_upscale", "tokenizer/vocab.json", "tokenizer lacks vocab.json"),
        ("latent_upscale", "tokenizer/merges.txt", "tokenizer lacks merges.txt"),
        ("pixel_upscale", "scheduler/scheduler_config.json", "/scheduler lacks scheduler_config.json"),
        ("first_frame", "image_noising_scheduler/scheduler_config.json", "lacks scheduler_config.json"),
    ],
)
def test_what_is_missing_is_named(copy, tmp_path, table, missing, said):
    gone = copy(table) / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    refusal(lambda: repository(tmp_path, table), f"[{table}]", FOLDERS[table], said)


def test_a_component_may_be_a_link(copy, tmp_path):
    folder = copy("keyframes")
    (folder / "unet").rename(tmp_path / "another")
    (folder / "unet").symlink_to(tmp_path / "another", target_is_directory=True)
    load(tmp_path, "keyframes", "unet")


def test_missing_model_folder(tmp_path):
    toml = tmp_path / "cascade.toml"
    toml.write_text(tiny.CASCADE.replace("showlab/show-1-sr1", "models/here/sr1"))
    refusal(lambda: repository(tmp_path, "pixel_upscale"), "[pixel_upscale]", str(tmp_path / "models/here/sr1"))


def test_missing_model_folder_that_could_be_a_hub_id(copy, tmp_path):
    folder = copy("pixel_upscale")
    shutil.rmtree(folder)
    (tmp_path / "cascade.toml").write_text(tiny.CASCADE)
    refusal(lambda: repository(tmp_path, "pixel_upscale"), "[pixel_upscale]", f"there is no folder {folder}")


# --- What is damaged


@pytest.mark.parametrize(("table", "component"), MODELS)
@pytest.mark.parametrize("kept", [0.5, 0], ids=["cut", "empty"])
def test_weight_files_cut_short(copy, tmp_path, table, component, kept):
    cut_short(file := weight_file(copy(table) / component), kept)
    refusal(lambda: load(tmp_path, table, component), f"[{table}]", "damaged or cut short", str(file))


@pytest.mark.parametrize(("table", "component"), KINDS)
def test_safetensors_cut_short(copy, tmp_path, table, component):
    weights = weights_in(folder := copy(table) / component)
    _remove_weights(folder)
    write(weights, file := folder / f"{_stem(table, component)}.safetensors")
    cut_short(file, 0.99)
    refusal(lambda: load(tmp_path, table, component), f"[{table}]", "damaged or cut short", str(file))


def test_second_shard_cut_short(copy, tmp_path):
    """The one that is damaged is named, not its whole neighbour."""
    folder = copy("keyframes") / "text_encoder"
    cut_short(folder / "pytorch_model-00002-of-00002.bin", 0.5)
    error = refusal(lambda: load(tmp_path, "keyframes", "text_encoder"), "pytorch_model-00002-of-00002.bin")
    assert "pytorch_model-00001-of-00002.bin" not in error.problem


@pytest.mark.parametrize(
    "text", ["", '{"weight_map": {', "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "x"}}', "[" * 5000]
)
def test_index_of_shards_damaged(copy, tmp_path, text):
    file = copy("keyframes") / "text_encoder" / "pytorch_model.bin.index.json"
    file.write_text(text)
    refusal(lambda: load(tmp_path, "keyframes", "text_encoder"), "[keyframes]", "damaged or cut short", str(file))


def test_shards_that_lack_what_their_index_promises(copy, tmp_path):
    folder = copy("keyframes") / "unet"
    weights = weights_in(folder)
    _remove_weights(folder)
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(weights)}
    for name in names:
        write({key: weights[key] for key in weights if places[key] == names[0]}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refusal(lambda: load(tmp_path, "keyframes", "unet"), "[keyframes]", names[1], "lacks the weight")


@pytest.mark.parametrize(
    ("table", "component", "change"),
    [
        ("latent_upscale", "vae", {"scaling_factor": "0.18215"}),
        ("latent_upscale", "vae", {"scaling_factor": None}),
        ("latent_upscale", "vae", {"shift_factor": "0"}),
        ("keyframes", "unet", {"norm_eps": "1e-5"}),
    ],
)
def test_a_text_in_the_place_of_a_number(copy, tmp_path, table, component, change):
    file = copy(table) / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refusal(lambda: load(tmp_path, table, component), f"[{table}]", *change)


def test_code_in_a_weight_file_is_not_run(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    file = copy("keyframes") / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Trap()}, file)
    refusal(lambda: load(tmp_path, "keyframes", "unet"), "[keyframes]", str(file))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("table", "component"), KINDS)
def test_weights_that_do_not_fit(copy, tmp_path, table, component):
    """A wrong shape, a key too few, a key too many: the error names file and key."""
    file = weight_file(copy(table) / component)
    whole = read(file)
    key = min(whole)
    faults: list[tuple[Change, tuple[str, ...]]] = [
        (lambda held: held.update({key: torch.zeros(3, 5)}), (key, "wrong shape, [3, 5] instead of")),
        (lambda held: held.pop(key), ("lacks the weight", key)),
        (lambda held: held.update({"left.over": torch.zeros(3)}), ("holds left.over, which the model does not have",)),
    ]
    for change, said in faults:
        write(whole, file)
        rewrite(file, change)
        refusal(lambda: load(tmp_path, table, component), f"[{table}]", str(file), *said)


def test_another_models_weights(copy, tmp_path):
    """Those of the keyframes, in the interpolation's place, which has more channels."""
    file = copy("interpolation") / "unet" / "diffusion_pytorch_model.bin"
    shutil.copy(copy("keyframes") / "unet" / file.name, file)
    refusal(lambda: load(tmp_path, "interpolation", "unet"), str(file), "conv_in.weight", "[32, 7, 3, 3]")


@pytest.mark.parametrize(("table", "component"), KINDS)
@pytest.mark.parametrize("text", ["", '{"in_channels": ', "[]"])
def test_config_that_is_none(copy, tmp_path, table, component, text):
    folder = copy(table) / component
    (folder / "config.json").write_text(text)
    refusal(lambda: load(tmp_path, table, component), f"[{table}]", str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"_class_name": ',
        "[]",
        "{}",
        '{"_class_name": "EulerDiscreteScheduler"}',
        '{"_class_name": "DDPMScheduler", "prediction_type": "nonsense"}',
        '{"_class_name": ["DDPMScheduler"]}',
        '{"_class_name": "DDPMScheduler", "beta_schedule": "steep"}',
        '{"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": "many"}',
    ],
)
@pytest.mark.parametrize(
    ("table", "component"), [("interpolation", "scheduler"), ("first_frame", "image_noising_scheduler")]
)
def test_scheduler_that_is_none(copy, tmp_path, table, component, text):
    folder = copy(table) / component
    (folder / "scheduler_config.json").write_text(text)
    error = refusal(lambda: load(tmp_path, table, component), f"The {component} of [{table}]", str(folder))
    assert "Euler" not in text or "'EulerDiscreteScheduler' is none of DDPMScheduler, " in error.problem


def test_other_schedulers_load_but_not_for_an_images_noise(copy, tmp_path):
    text = '{"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}'
    folder = copy("first_frame")
    for component in ("scheduler", "image_noising_scheduler"):
        (folder / component / "scheduler_config.json").write_text(text)
    assert load(tmp_path, "first_frame", "scheduler").config.beta_schedule == "squaredcos_cap_v2"
    refusal(lambda: load(tmp_path, "first_frame", "image_noising_scheduler"), "is a DDPMScheduler")


def test_loading_silences_the_libraries_alone(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # else nothing of it would be seen here
    logging.disable(logging.INFO)  # as some programs do that use the package
    try:
        with loading._quiet():
            logging.getLogger("somebody.else").error("Heard.")
            logging.getLogger("diffusers.models").error("Not heard.")
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    assert [record.message for record in caplog.records] == ["Heard."]


@pytest.mark.parametrize(("table", "name"), [("keyframes", "spiece.model"), ("latent_upscale", "vocab.json")])
@pytest.mark.parametrize("kept", [0.5, 0], ids=["cut", "empty"])
def test_tokenizer_damaged(copy, tmp_path, table, name, kept):
    cut_short((folder := copy(table) / "tokenizer") / name, kept)
    refusal(lambda: load(tmp_path, table, "tokenizer"), f"The tokenizer of [{table}]", str(folder))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("merges.txt", lambda text: "\n".join(text.splitlines()[:100]) + "\n"),  # cut between two lines
        ("merges.txt", lambda text: ""),
        ("tokenizer_config.json", lambda text: json.dumps(json.loads(text) | {"model_max_length": "77"})),
        ("tokenizer_config.json", lambda text: json.dumps(json.loads(text) | {"pad_token": None})),
    ],
)
def test_a_tokenizer_that_would_read_otherwise(copy, tmp_path, file, change):
    folder = copy("latent_upscale") / "tokenizer"
    shutil.copytree(Path(loading.__file__).parent / "mini" / "show-1-sr2" / "tokenizer", folder, dirs_exist_ok=True)
    assert load(tmp_path, "latent_upscale", "tokenizer")("a cat").input_ids
    (folder / file).write_text(change((folder / file).read_text()))
    refusal(lambda: load(tmp_path, "latent_upscale", "tokenizer"), "The tokenizer of [latent_upscale]", str(folder))


@pytest.mark.parametrize(("table", "component"), MODELS)
def test_a_broken_component_is_named_and_no_other(tmp_path, pristine, table, component):
    """Where the whole stage is loaded."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    cut_short(file := weight_file(tmp_path / FOLDERS[table] / component), 0.5)
    stage = "pixel_upscale" if table == "first_frame" else table
    error = refusal(lambda: load_stage(tmp_path, stage), f"[{table}]", str(file))
    names = {f"[{other}]" for other in FOLDERS} | {f"/{name}/" for _, name in MODELS}
    assert {name for name in names if name in error.problem} == {f"[{table}]", f"/{component}/"}


def cut_short(file: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])


def _stem(table: str, component: str) -> str:
    """What safetensors are called: transformers has another name for them than diffusers."""
    return "model" if component == "text_encoder" else "diffusion_pytorch_model"


def _remove_weights(component: Path) -> None:
    for name in hub.choose_weights(names_in(component), "fp16").names:
        (component / name).unlink()
