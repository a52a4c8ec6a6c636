"""The stages of mini's training: what each trains, on which batches, for which loss, and from which weights on."""

import copy
import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from show_1.cascade import Cascade
from show_1.errors import Show1Error, first_line
from show_1.models import channels_last
from show_1.stages.denoise import fold, unfold
from training import models, world
from training.batches import (
    KEYFRAME_TIMES,
    NOISE,
    SMALL,
    captions,
    enlarged_pictures,
    enlarged_windows,
    full_frames,
    full_windows,
    keyframe_clips,
    made_on,
    path_clips,
    pictures,
    pictures_for_pairs,
    segments,
    told,
)
from training.losses import (
    ALPHA,
    SIGMA,
    around,
    autoencoder_loss,
    draw,
    mostly,
    native_bfloat16,
    noise_like,
    of_sampler,
    pixel_error,
    velocity_loss,
)
from training.redraw import CPU, Redrawn

MINI = Path(__file__).parents[1] / "show_1" / "mini"
RUNS = Path(__file__).parent / "runs"
TEXT_ENCODER = "show-1-base/text_encoder"
TWICE = "encoder.embed_tokens.weight"  # what T5 has by two names is saved by the other
PATH_STRENGTH = 8.0  # of what the deepest features are to say of where things are: twice as much did no better
PIXEL_WEIGHT = 20.0  # of the latent upscale's error in decoded pixels, which are what is looked at


@dataclass
class Stage:
    """What one stage of the training trains, on what, and where its result goes."""

    models: dict[str, nn.Module]
    batches: Callable[..., dict]
    loss: Callable[[dict[str, nn.Module], dict], torch.Tensor]
    folders: dict[str, str]  # model name → folder under show_1/mini, where the result is saved
    finish: Callable[[dict[str, nn.Module]], None] = lambda trained: None  # last touches before each saving
    sample: Callable[[dict[str, nn.Module], dict], torch.Tensor] | None = None  # what the models make of a batch
    muon: bool = False  # whether Muon trains the matrices, see `optimizers_of`

    def evaluate(self, models: dict[str, nn.Module], device: torch.device, batches: int = 4) -> float:
        """Return the loss on the same few batches each time, which training does not see, with the same noise."""
        rng, losses = np.random.default_rng(2**32), []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(batches):
                losses.append(self.loss(models, made_on(device, self.batches, rng)).item())
        return float(np.mean(losses))


def _states(encoder: nn.Module, tokens) -> torch.Tensor:
    """Return the text's states, (batch, tokens, channels), as show_1's stages compute them."""
    mask = tokens.attention_mask if isinstance(encoder, T5EncoderModel) else None
    return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state


def _tokens(tokenizer, batch: dict):
    tokens = tokenizer(batch["captions"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return tokens.to(batch["clean"].device if "clean" in batch else batch["objects"].device)


def _captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [world.sample(rng).caption for _ in range(count)]


def t5_tokenizer() -> T5Tokenizer:
    """Return the text encoder's tokenizer, trained now where there is none; raises Show1Error if it cannot be saved."""
    folder = MINI / "show-1-base" / "tokenizer"
    if folder.exists():
        return T5Tokenizer.from_pretrained(folder)
    return models.train_t5_tokenizer(_captions(20000), folder)


def clip_tokenizer() -> CLIPTokenizer:
    """Return the latent upscale's tokenizer, as `t5_tokenizer` does."""
    folder = MINI / "show-1-sr2" / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    return models.train_clip_tokenizer(_captions(20000), folder)


def appearances() -> list[torch.Tensor]:
    """Return what objects, places and motions look like, a row of principal components each.

    Objects by their pictures, 40 components; places by the mean of some frames, 11; motions by their mean path, 8.
    """
    sprites = F.adaptive_avg_pool2d(world.sprites()[0], 16)
    rng = np.random.default_rng(0)

    def scenes(place: str, motion: str) -> list[world.Scene]:
        return [world.Scene(("ball",), place, motion, "", int(rng.integers(2**31))) for _ in range(16)]

    places = [world.render(scenes(place, "standing still"), *SMALL, torch.zeros(1)).mean(0) for place in world.PLACES]
    motions = [world.paths(scenes("in space", motion), KEYFRAME_TIMES).mean(1) for motion in world.MOTIONS]
    tables = []
    for looks, components in ((sprites, 40), (torch.stack(places), 11), (torch.stack(motions), 8)):
        looks = looks.flatten(1) - looks.flatten(1).mean(0)
        left, strengths, _ = torch.linalg.svd(looks, full_matrices=False)
        # Square roots: the strongest components would drown the details that tell a cat from a fox.
        table = left[:, :components] * strengths[:components].sqrt()
        tables.append(table / table.std())
    return tables


def text_stage() -> Stage:
    """The text encoder, judged by what can be read from the mean of its states: what is meant, and how it looks.

    Padding counts: the UNets attend to all 77 states and their text embedding pools them, so padding has to carry what
    the caption means too. That things which look alike have states alike spares the UNets learning each by itself.
    """
    looks = appearances()
    tokenizer = t5_tokenizer()
    sizes = [len(world.OBJECTS), len(world.PLACES), len(world.MOTIONS)]
    trained = {
        "text_encoder": models.text_encoder(len(tokenizer)),
        "reader": nn.Linear(models.TEXT_WIDTH, sum(sizes)),
    }
    _start_from(trained["text_encoder"], MINI / TEXT_ENCODER)

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        states = _states(trained["text_encoder"], _tokens(tokenizer, batch)).mean(1)
        objects, place, motion = trained["reader"](states).split(sizes, dim=1)
        named = F.binary_cross_entropy_with_logits(objects, batch["objects"], reduction="sum") / len(objects)
        tables = [table.to(states.device) for table in looks]
        seen = torch.cat([batch["objects"] @ tables[0], tables[1][batch["place"]], tables[2][batch["motion"]]], dim=1)
        looking = F.mse_loss(states[:, : seen.shape[1]], seen)
        return named + F.cross_entropy(place, batch["place"]) + F.cross_entropy(motion, batch["motion"]) + 4 * looking

    return Stage(trained, captions, loss, {"text_encoder": TEXT_ENCODER})


def reader(device: torch.device) -> Callable[[dict], torch.Tensor]:
    """Return what turns a batch's captions into the trained text encoder's states, (batch, 77, channels).

    Raises Show1Error where there is none.
    """
    tokenizer = t5_tokenizer()
    encoder = models.text_encoder(len(tokenizer))
    _start_from(encoder, needed(MINI / TEXT_ENCODER, "text"))
    encoder.eval().requires_grad_(False).to(device)
    return lambda batch: _states(encoder, _tokens(tokenizer, batch))


def needed(folder: Path, stage: str) -> Path:
    """Return a folder that an earlier stage has filled; raise Show1Error where no weights are there."""
    if not any(folder.glob("*.safetensors")):
        raise Show1Error(f"What an earlier stage has to train is missing: {folder}", f"Train it first: --stage {stage}")
    return folder


def pixel_stage(
    unet: nn.Module,
    batches: Callable,
    folder: str,
    device: torch.device,
    draw_levels: Callable[[int], torch.Tensor],
    steps: int = 1,
    shared_noise: float = 0.0,
    **weights: float,
) -> Stage:
    """A UNet that predicts pixels; `steps` are those that its sample sheets are drawn in, `weights` velocity_loss's."""
    read = reader(device)

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        states = read(batch)
        return velocity_loss(trained["unet"], states, batch, draw_levels, shared_noise=shared_noise, **weights)

    def sample(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        return draw(trained["unet"], read(batch), batch, steps, shared_noise)

    return Stage({"unet": unet}, batches, loss, {"unet": folder}, sample=sample, muon=True)


def pictures_stage(device: torch.device) -> Stage:
    """The keyframes' UNet without its temporal layers, from single frames, (batch, 3, 20, 32).

    Raises Show1Error, as all stages after the text's do, where what it needs is missing or of another configuration.
    """
    unet = models.picture_unet("keyframes")
    _start_from(unet, MINI / "show-1-base" / "unet")
    levels = around(0.5, 1.1)
    return pixel_stage(unet, pictures, str(RUNS / "pictures"), device, levels, steps=12)


def paths_stage(device: torch.device) -> Stage:
    """The way from a motion's name to where things are in each frame, for the keyframes' deepest up block alone.

    Clips teach that too slowly: in much noise, where it has to come from the text, it is a small part of the error. But
    a trained picture UNet draws a thing wherever its deepest features say that one is. So the block learns to say it
    frame by frame: to add to its features what goes with a thing being there, times how much more often one is there in
    this frame than in others. What enters the block is computed once a clip and used eight times.
    """
    unet = models.video_unet("keyframes")
    # show_1/mini will not do: what has been taught would be taught on top of it.
    _start_from(unet, needed(RUNS / "pictures", "pictures"))
    unet.to(device).requires_grad_(False)
    read, frames = reader(device), len(KEYFRAME_TIMES)
    block = unet.up_blocks[0].requires_grad_(True)
    untaught = copy.deepcopy(block).requires_grad_(False)

    def entering(batch: dict, lowest: int) -> list[torch.Tensor]:
        """Return what the block is given for each clip, noised: (batch, frames, …) each, but the text, (batch, …)."""
        clean = batch["clean"]
        levels = torch.randint(lowest, 1000, (len(clean),)).to(device)
        noisy = NOISE.add_noise(clean, torch.randn_like(clean), levels)
        with torch.no_grad():
            hidden, temb, text, _, skips, _ = models.inputs_of(unet.up_blocks[0], unet, noisy, levels, read(batch))
        return [text, *(each.contiguous().unflatten(0, (len(clean), frames)) for each in (hidden, temb, *skips))]

    def features(block: nn.Module, entered: list[torch.Tensor]) -> torch.Tensor:
        """Return what the block makes of it, (batch, frames, channels, height, width)."""
        text, (hidden, temb, *skips) = entered[0], (each.flatten(0, 1) for each in entered[1:])
        return block(hidden, temb, text, frames, skips, resample=False)[-1].unflatten(0, (-1, frames))

    # How the features of a cell differ with how much of it is covered: a regression on true clips.
    rng, found, covered = np.random.default_rng(0), [], []
    for _ in range(8):
        batch = made_on(device, path_clips, rng, 4)
        with torch.no_grad():
            found.append(features(block, entering(batch, 600)).movedim(2, 0))
        cells = found[-1].shape[-2:]
        covered.append(coverage(batch["scenes"], cells).to(device))
    found, covered = torch.cat(found, 1).flatten(1), torch.cat(covered).flatten()
    covered = covered - covered.mean()
    there = (found * covered).mean(1) / covered.square().mean()  # (channels,)
    expected = expected_coverage(rng, cells).to(device)
    _tell_motions_apart(unet, block, read, rng)
    bank = deque(maxlen=256)

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        entered = entering(batch, 940)  # less noise would show the path, which has to come from the text
        more = expected[(batch["objects"].sum(1) - 1).long(), batch["motion"]]  # (batch, frames, height, width)
        more = more * told(batch).view(-1, 1, 1, 1).to(device)
        with torch.no_grad():
            goal = features(trained["untaught"], entered) + PATH_STRENGTH * more[:, :, None] * there[:, None, None]
        rows = list(zip(*entered, goal, strict=True))
        if torch.is_grad_enabled():
            bank.extend(rows)
            rows = [bank[k] for k in torch.randperm(len(bank))[:8].tolist()]
        *entered, goal = (torch.stack(each) for each in zip(*rows, strict=True))
        return F.mse_loss(features(trained["unet"].up_blocks[0], entered), goal)

    return Stage({"unet": unet, "untaught": untaught}, path_clips, loss, {"unet": "show-1-base/unet"})


def _tell_motions_apart(unet: nn.Module, block: nn.Module, read: Callable, rng: np.random.Generator) -> None:
    """Add a sign of the motion to what a block's ResNets take from the text: pictures leave hardly any there."""
    device = unet.device
    batches = [made_on(device, captions, rng) for _ in range(40)]
    motion = torch.cat([batch["motion"] for batch in batches])
    named = torch.cat([told(batch) for batch in batches])[:, None].to(device)
    with torch.no_grad():
        levels = torch.randint(900, 1000, (len(motion),)).to(device)
        text = torch.cat([unet.get_aug_embed(None, read(batch), {}) for batch in batches])
        temb = unet.time_embedding(unet.get_time_embed(text, levels)) + text
        for resnet in block.resnets:
            seen, layer = resnet.nonlinearity(temb), resnet.time_emb_proj
            signs = 0.25 * torch.randn(len(world.MOTIONS), layer.out_features).to(device)
            layer.weight += torch.linalg.lstsq(seen, (signs - signs.mean(0))[motion] * named).solution.T


def coverage(scenes: list[world.Scene], cells: tuple[int, int]) -> torch.Tensor:
    """Return how much of each cell of the keyframes objects cover, (scenes, frames, height, width) in [0, 1]."""
    return F.adaptive_avg_pool3d(world.render(scenes, *SMALL, KEYFRAME_TIMES, coverage=True)[:, 3], (None, *cells))


def expected_coverage(rng: np.random.Generator, cells: tuple[int, int], count: int = 32) -> torch.Tensor:
    """Return how much more each motion's objects cover each cell at each time than any motion's do.

    (one or two objects, motions, frames, height, width): means over `count` scenes each.
    """
    scenes: dict[tuple[int, str], list[world.Scene]] = {}
    wanted = [(number, motion) for number in (1, 2) for motion in world.MOTIONS]
    while any(len(scenes.get(key, ())) < count for key in wanted):
        scene = world.sample(rng)
        kept = scenes.setdefault((len(scene.objects), scene.motion), [])
        if len(kept) < count:
            kept.append(scene)
    means = torch.stack([coverage(scenes[key], cells).mean(0) for key in wanted]).unflatten(0, (2, -1))
    return means - means.mean((1, 2), keepdim=True)


def pairs_stage(device: torch.device) -> Stage:
    """The way from the names of two things to which of them is where, for the keyframes' deepest blocks.

    A picture UNet takes what to draw from the text's summary in the time embedding, the same all over the picture, and
    hardly anything from its attention to the text's states (measured: with an empty caption's summary 1 thing of 24 was
    right, with the summary alone 22). So of two things it draws the same one twice. Asked for one of them twice it
    draws that one, and the features that it has then, put together, half a picture each, are what the blocks have to
    learn to make when asked for both; half the time with an empty caption's summary, so that they have to attend. For
    one thing they learn to make what they made.
    """
    unet, untaught = models.video_unet("keyframes"), models.picture_unet("keyframes")
    saved = needed(MINI / "show-1-base" / "unet", "pictures, then paths")
    for each in (unet, untaught):
        _start_from(each, saved)
        each.requires_grad_(False)
    for block in (unet.down_blocks[-1], unet.mid_block, *unet.up_blocks[:2]):
        block.requires_grad_(True)
    read, draw_levels = reader(device), around(1.2, 1.3)
    spatial_part = functools.cache(lambda unet: models.spatial_part(unet, "keyframes"))
    bank = deque(maxlen=256)

    def entering(noisy: torch.Tensor, levels: torch.Tensor, captions: list[str], unsaid: torch.Tensor) -> list:
        """Return what the deepest down block is given: features, embedding, text and what is handed on.

        Where it is `unsaid`, (batch,), what is told is not in the summary.
        """
        states, silent = (read({"captions": told, "clean": noisy}) for told in (captions, [""] * len(captions)))
        summed = torch.where(unsaid[:, None, None], silent, states)
        embedding = untaught.time_embedding(untaught.get_time_embed(noisy, levels))
        embedding = embedding + untaught.get_aug_embed(embedding, summed, {})
        hidden = untaught.conv_in(noisy)
        skips = [hidden]
        for block in untaught.down_blocks[:-1]:
            hidden, passed = block(hidden, embedding)
            skips += passed
        return [hidden, embedding, untaught.process_encoder_hidden_states(states, {}), *skips]

    def features(unet: nn.Module, entered: list[torch.Tensor]) -> torch.Tensor:
        """Return what the blocks make of it, (batch, channels, height, width)."""
        hidden, embedding, text, *skips = entered
        hidden, passed = unet.down_blocks[-1](hidden, embedding, encoder_hidden_states=text)
        skips += passed
        hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=text)
        for block in unet.up_blocks[:2]:
            count = len(block.resnets)
            skips, passed = skips[:-count], tuple(skips[-count:])
            hidden = block(hidden, passed, embedding, encoder_hidden_states=text)
        return hidden

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        said = torch.zeros(len(batch["clean"]), dtype=torch.bool, device=device)
        clean, levels = batch["clean"], draw_levels(len(batch["clean"]))
        noisy, levels = NOISE.add_noise(clean, torch.randn_like(clean), levels), levels.to(device)
        with torch.no_grad():
            sides = (entering(noisy, levels, batch[key], said) for key in ("left", "right"))
            left, right = (features(untaught, entered) for entered in sides)
            width = left.shape[-1]
            columns = torch.arange(width, device=device) - (width - 1) / 2
            goal = torch.lerp(left, right, torch.sigmoid(columns * SMALL[1] / width))
            unsaid = torch.rand(len(clean), device=device) < 0.5
            rows = list(zip(*entering(noisy, levels, batch["captions"], unsaid), goal, strict=True))
        if torch.is_grad_enabled():
            bank.extend(rows)
            rows = [bank[k] for k in torch.randperm(len(bank))[:16].tolist()]
        *entered, goal = (torch.stack(each) for each in zip(*rows, strict=True))
        return F.mse_loss(features(spatial_part(trained["unet"]), entered), goal)

    def sample(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        return draw(spatial_part(trained["unet"]), read(batch), batch, steps=12)

    chosen = {"unet": unet, "untaught": untaught}
    return Stage(chosen, pictures_for_pairs, loss, {"unet": "show-1-base/unet"}, sample=sample)


def keyframes_stage(device: torch.device) -> Stage:
    """The keyframes' whole UNet, from clips of eight frames, (batch, 3, 8, 20, 32), with pictures beside them."""
    unet = models.video_unet("keyframes")
    _start_from(unet, MINI / "show-1-base" / "unet")
    # Where things are and go is decided in much noise: clips teach that. What they look like is decided in less: drawn
    # on from true pictures noised to level 600, airplanes had two pairs of wings. Pictures teach that: they are more.
    levels, shared = around(0.4, 1.6), Cascade.load("mini").keyframes.shared_noise
    how = {"steps": 12, "shared_noise": shared, "movement_weight": 3.0}
    stage = pixel_stage(unet, keyframe_clips, "show-1-base/unet", device, levels, **how)
    return with_pictures(stage, "keyframes", device, around(0.2, 1.2))


def with_pictures(
    stage: Stage, name: str, device: torch.device, draw_levels: Callable[[int], torch.Tensor], **weights: float
) -> Stage:
    """Train a video UNet's spatial layers on the "pictures" of each batch besides."""
    read = reader(device)
    spatial_part = functools.cache(lambda unet: models.spatial_part(unet, name))

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        spatial, stills = spatial_part(trained["unet"]), batch["pictures"]
        return stage.loss(trained, batch) + velocity_loss(spatial, read(stills), stills, draw_levels, **weights)

    return dataclasses.replace(stage, loss=loss)


def interpolation_stage(device: torch.device) -> Stage:
    """The frames between two keyframes, (batch, 3, 5, 20, 32), at the noise levels where the sampler looks."""
    unet = models.video_unet("interpolation")
    _start_from(unet, MINI / "show-1-interpolation" / "unet")
    batches = functools.partial(segments, redrawn=_redrawn(device, interpolated=False))
    steps = Cascade.load("mini").interpolation.steps
    return pixel_stage(unet, batches, "show-1-interpolation/unet", device, of_sampler(steps), steps, edge_weight=0.3)


def first_frame_stage(device: torch.device) -> Stage:
    """Single frames four times as large, (batch, 3, 80, 128) or squares of them."""
    unet = models.picture_unet("pixel_upscale").to(memory_format=torch.channels_last)
    _start_from(unet, MINI / "IF-II-L" / "unet")
    batches = functools.partial(enlarged_pictures, redrawn=_redrawn(device))
    steps = Cascade.load("mini").first_frame.steps
    return pixel_stage(unet, batches, "IF-II-L/unet", device, of_sampler(steps), steps, edge_weight=0.3)


def pixel_upscale_stage(device: torch.device) -> Stage:
    """Clips four times as large, (batch, 3, 3 to 8 frames, 80, 128) or squares of them, that the first frame leads."""
    unet = models.video_unet("pixel_upscale")
    _start_from(unet, MINI / "show-1-sr1" / "unet", MINI / "IF-II-L" / "unet")
    make = functools.partial(enlarged_windows, redrawn=_redrawn(device), first_frame=Upscale(device, "first_frame"))
    settings = Cascade.load("mini").pixel_upscale
    levels, how = of_sampler(settings.steps), {"steps": settings.steps, "shared_noise": settings.shared_noise}
    stage = pixel_stage(unet, make, "show-1-sr1/unet", device, levels, **how, edge_weight=0.3)
    return with_pictures(stage, "pixel_upscale", device, levels, edge_weight=0.3)


def vae_stage(device: torch.device) -> Stage:
    """The autoencoder of the last stage, from frames in full size, (batch, 3, 160, 288) or squares of them."""
    frames = full_frames(np.random.default_rng(0), scale=4)["clean"].to(device)

    def scale_latents(trained: dict[str, nn.Module]) -> None:
        # The diffusion model wants latents of unit variance.
        deviation = trained["vae"].encode(frames).latent_dist.mean.std().item()
        trained["vae"].register_to_config(scaling_factor=1 / deviation)

    vae = models.autoencoder()
    _start_from(vae, MINI / "show-1-sr2" / "vae")
    return Stage(
        {"vae": vae},
        full_frames,
        lambda trained, batch: autoencoder_loss(trained["vae"], batch),
        {"vae": "show-1-sr2/vae"},
        scale_latents,
        lambda trained, batch: trained["vae"](batch["clean"]).sample,
    )


def latent_upscale_stage(device: torch.device) -> Stage:
    """Redrawing in latents what the stages before make of clips, (batch, 3, 4, 160, 288) or squares; and its CLIP."""
    folder = MINI / "show-1-sr2"
    needed(folder / "vae", "vae")
    vae = models.autoencoder().requires_grad_(False).to(device)
    _start_from(vae, folder / "vae")
    scaling, half = AutoencoderKL.load_config(folder / "vae")["scaling_factor"], native_bfloat16(device)
    shared, top = Cascade.load("mini").latent_upscale.shared_noise, 50  # the noise level where its one step starts
    tokenizer = clip_tokenizer()
    trained = {"unet": models.video_unet("latent_upscale"), "text_encoder": models.latent_text_encoder(tokenizer)}
    for name, model in trained.items():
        _start_from(model, folder / name)

    def latents(clips: torch.Tensor) -> torch.Tensor:
        return unfold(vae.encode(fold(clips)).latent_dist.mean, clips.shape).float() * scaling

    def decoded(sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return vae.decode(fold(sample) / scaling).sample.float()

    def loss(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        def error_of(sample: torch.Tensor) -> torch.Tensor:
            return PIXEL_WEIGHT * pixel_error(decoded(sample), fold(batch["clean"]))

        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            pair = {"clean": latents(batch["clean"]), "degraded": latents(batch["condition"])}
        states = _states(trained["text_encoder"], _tokens(tokenizer, batch))
        levels = mostly(top)
        return velocity_loss(trained["unet"], states, pair, levels, top=top, shared_noise=shared, error_of=error_of)

    def sample(trained: dict[str, nn.Module], batch: dict) -> torch.Tensor:
        degraded = latents(batch["condition"])
        noisy = ALPHA[top] * degraded + SIGMA[top] * noise_like(degraded, shared)
        states = _states(trained["text_encoder"], _tokens(tokenizer, batch))
        velocity = trained["unet"](noisy, torch.tensor(top, device=device), encoder_hidden_states=states).sample
        return unfold(decoded(ALPHA[top] * noisy - SIGMA[top] * velocity), degraded.shape)

    return Stage(
        trained,
        functools.partial(
            full_windows,
            redrawn=_redrawn(device),
            first_frame=Upscale(device, "first_frame"),
            enlarge=Upscale(device, "pixel_upscale"),
        ),
        loss,
        {"unet": "show-1-sr2/unet", "text_encoder": "show-1-sr2/text_encoder"},
        sample=sample,
    )


class Upscale:
    """A trained upscale in pixels, "first_frame" or "pixel_upscale", as the cascade runs it.

    It is loaded where it is first used: on a CPU in the process that makes the batches.
    """

    def __init__(self, device: torch.device, stage: str):
        self.device, self.stage, self.settings = device, stage, Cascade.load("mini").stream_settings(stage)
        self.folder = needed(MINI / {"first_frame": "IF-II-L", "pixel_upscale": "show-1-sr1"}[stage] / "unet", stage)
        _start_from(self.untrained(), self.folder)  # what does not fit is told here, not by a worker

    def untrained(self) -> nn.Module:
        return (models.picture_unet if self.stage == "first_frame" else models.video_unet)("pixel_upscale")

    @functools.cached_property
    def loaded(self) -> tuple[nn.Module, Callable[[dict], torch.Tensor]]:
        with CPU:
            unet = self.untrained()
            _start_from(unet, self.folder)
            return channels_last(unet.requires_grad_(False).to(self.device)), reader(self.device)

    def __call__(self, batch: dict) -> torch.Tensor:
        """Return what it makes of the batch's "condition", in the shape of its "clean"."""
        unet, read = self.loaded
        return draw(unet, read(batch), batch, self.settings["steps"], self.settings.get("shared_noise", 0.0))


def _redrawn(device: torch.device, interpolated: bool = True) -> Redrawn:
    reader(CPU)  # what does not fit is told here, as `Upscale` does
    _start_from(models.video_unet("keyframes"), needed(MINI / "show-1-base" / "unet", "keyframes"))
    if interpolated:
        _start_from(models.video_unet("interpolation"), needed(MINI / "show-1-interpolation" / "unet", "interpolation"))
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    # Drawing a clip takes a CPU as long as some updates of an upscaler; a GPU draws many in the time of one.
    fresh = 0.05 if device.type == "cpu" else 0.5
    return Redrawn(MINI, device, dtype, fresh, interpolated)


# Name → how to build it and its share of the time, in order: each may start from what those before it have saved.
STAGES: dict[str, tuple[Callable[[torch.device], Stage], float]] = {
    "text": (lambda device: text_stage(), 0.02),
    "pictures": (pictures_stage, 0.16),
    "paths": (paths_stage, 0.06),
    "pairs": (pairs_stage, 0.06),
    "keyframes": (keyframes_stage, 0.22),
    "interpolation": (interpolation_stage, 0.06),
    "first_frame": (first_frame_stage, 0.14),
    "pixel_upscale": (pixel_upscale_stage, 0.12),
    "vae": (vae_stage, 0.06),
    "latent_upscale": (latent_upscale_stage, 0.10),
}
ONE_UNET = ("pictures", "paths", "pairs", "keyframes")  # which train the same weights, one after the other


def _start_from(model: nn.Module, *folders: Path) -> None:
    """Load the weights of the first folder that has some; temporal layers may be missing or too many.

    Raises Show1Error for weights that are damaged or of another configuration.
    """
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    if not files:
        return
    try:
        weights = load_file(files[0])
    except (SafetensorError, OSError) as error:
        raise Show1Error(
            f"The weights {files[0]} cannot be read: {first_line(error)}.",
            "Bring them back, or remove them to start that stage from nothing.",
        ) from error
    expected = model.state_dict()
    strays = [key for key in weights.keys() ^ expected.keys() if "temp_" not in key and key != TWICE]
    strays += [key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape]
    if strays:
        raise Show1Error(
            f"{files[0]} holds weights of another configuration: {sorted(strays)[0]} does not fit.",
            f"Remove {files[0].parent} to start that stage from nothing.",
        )
    model.load_state_dict({key: weights[key].float() for key in weights.keys() & expected.keys()}, strict=False)
