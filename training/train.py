"""Train mini, stage by stage: `python -m training.train --minutes N [--device auto] [--stage all|NAME]`.

The text encoder comes first: it learns what captions mean from the captions alone and is frozen from then on, as T5 is
for the released models, so that all pixel stages read the same embeddings. Then pictures, then where motions have
things in which frame and which of two things is where, then clips, with pictures beside them where things have to be
made up: a video UNet starts as a trained picture UNet whose new temporal layers do nothing. The later stages learn to
repair true frames as the stages before them would draw them, or degraded. A run can be broken off at any moment: it
goes on from its last checkpoint, at most a minute old, and where there is none (checkpoints are not committed) from the
weights in show_1/mini.
"""

import argparse
import copy
import io
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor
from PIL import Image
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader

from show_1.device import check_device
from show_1.errors import Show1Error, exit_code, first_line
from show_1.files import write_atomically
from show_1.models import channels_last
from show_1.models.attention import TextAttention
from show_1.stages.denoise import fold
from training import models, stages, world
from training.batches import Batches, painted_on

LOG = Path(__file__).parent / "log.jsonl"
RATE = 1e-3  # of learning, at first
SAVED_APART = 20  # seconds from one saving to the next, at least; an evaluation and some updates may come on top
UPDATES_APART = 4  # that processes training together make by themselves before they average their weights


def run(name: str, minutes: float, seed: int, device: torch.device, rank: int = 0, rate: float = RATE) -> None:
    """Train a stage until it has had `minutes` of training in all, saving its averaged weights under show_1/mini.

    Where it is one of several processes, they average their weights every few updates (post-local SGD, arXiv
    1808.07217), and the one of rank 0 saves. On a CPU that is worth far more than threads: networks this small leave
    two of them 1.1 times as fast as one (measured). A GPU would wait for a single process most of the time.
    """
    build, _ = stages.STAGES[name]
    torch.manual_seed(seed)
    stage = build(device)
    for model in stage.models.values():
        model.to(device)
        if device.type == "cuda":
            channels_last(model)
        else:
            _attend_plainly(model)
    average = {key: copy.deepcopy(model).requires_grad_(False) for key, model in stage.models.items()}
    parameters = [parameter for model in stage.models.values() for parameter in model.parameters()]
    optimizers = optimizers_of(parameters, stage.muon)
    checkpoint = stages.RUNS / f"{name}.pt"
    step, seconds = _resume(checkpoint, stage.models, average, optimizers)
    if seconds >= minutes * 60:
        if rank == 0:
            print(f"{name}: trained for {seconds / 60:.1f} minutes already")
        return

    torch.manual_seed(seed + step + 1_000_003 * rank)
    if device.type == "cpu":
        made = Batches(stage.batches, (seed, step, rank))
        batches = DataLoader(made, batch_size=None, num_workers=1, prefetch_factor=4)
    else:
        batches = painted_on(device, stage.batches, (seed, step, rank))
    losses, last = [], time.monotonic()
    saved = sheeted = last
    for batch in batches:
        share = min(seconds / (minutes * 60), 1)
        loss = stage.loss(stage.models, batch)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * (1 - 0.95 * share)  # warm up, then fall
            optimizer.step()
        step += 1
        _move_average(average, stage.models, min(0.998, step / (step + 10)))
        if rank == 0:
            losses.append(loss.detach())
        if step % UPDATES_APART:
            continue
        now = time.monotonic()
        seconds, last = _meet(parameters, seconds + now - last), now
        done = seconds >= minutes * 60
        if rank == 0 and (now - saved > SAVED_APART or done):
            entry = {"loss": round(torch.stack(losses).mean().item(), 5)}
            if not (math.isfinite(entry["loss"]) and all(parameter.isfinite().all() for parameter in parameters)):
                raise Show1Error(
                    f"The training of {name} has come to no number; what was saved last is as it was.",
                    "Start again, with a lower --rate.",
                )
            losses = []
            with torch.no_grad():
                stage.finish(average)
            with models.telling_what_cannot_be_saved():
                for key, folder in stage.folders.items():
                    _export(average[key], stages.MINI / folder)
                _forget_later(name)
                if not done:  # before the evaluation, which may take as long as some updates
                    _save(checkpoint, step, seconds, stage.models, average, optimizers)
            saved = time.monotonic()
            if done or now - sheeted > 600:
                entry["evaluation"] = round(stage.evaluate(average, device), 5)
                if stage.sample is not None:
                    with torch.no_grad():
                        drawn = stage.sample(average, batch)
                    with models.telling_what_cannot_be_saved():
                        sheet(drawn, batch, stages.RUNS / "samples" / f"{name}.png")
                sheeted = now
            with models.telling_what_cannot_be_saved():
                _log(stage=name, step=step, seconds=round(seconds), **entry)
                if done:  # last: what is broken off in its last evaluation has not had it
                    _save(checkpoint, step, seconds, stage.models, average, optimizers)
        if done:
            break
    if distributed.is_initialized():
        distributed.barrier()  # the next stage starts from what has just been saved


def _forget_later(name: str) -> None:
    """Remove the checkpoints of the stages that train the same UNet after this one: they hold what was before it."""
    if name in stages.ONE_UNET:
        for later in stages.ONE_UNET[stages.ONE_UNET.index(name) + 1 :]:
            (stages.RUNS / f"{later}.pt").unlink(missing_ok=True)


class Muon(torch.optim.Muon):
    """PyTorch's Muon (kellerjordan.github.io/posts/muon) for convolutions too: as matrices, a row an output channel."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        matrices = [nn.Parameter(parameter.detach().flatten(1)) for parameter in parameters]
        super().__init__(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        pairs = list(zip(self.param_groups[0]["params"], self.parameters, strict=True))
        for matrix, parameter in pairs:
            matrix.data = parameter.flatten(1)  # a view, or where it is channels-last a copy
            matrix.grad = parameter.grad.flatten(1)
        super().step()
        for matrix, parameter in pairs:
            if matrix.data_ptr() != parameter.data_ptr():  # a view has moved it already
                parameter.copy_(matrix.view_as(parameter))


def optimizers_of(parameters: list[nn.Parameter], muon: bool) -> list[torch.optim.Optimizer]:
    """Return what trains the parameters: AdamW, and where `muon` is asked for Muon for the matrices.

    Ten minutes each with the keyframes' pictures, from the same weights, took the loss at noise level 400 from 0.0704
    to 0.0698 with AdamW and to 0.0689 with Muon.
    """
    # Not the first and the last layer, which have three colours on one side.
    matrices = [p for p in parameters if muon and p.ndim > 1 and min(len(p), p[0].numel()) > 3 * 3**2]
    kept = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in kept]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99))
    return [adamw, Muon(matrices)] if matrices else [adamw]


def _attend_plainly(model: nn.Module) -> None:
    """Have a model's attention be plain matrix products, but that of a video UNet to its text.

    Over a clip's few frames PyTorch's own takes, forth and back on a CPU, half of an interpolation's update (measured).
    """
    for module in model.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, TextAttention):
            module.set_processor(AttnProcessor() if module.added_kv_proj_dim is None else AttnAddedKVProcessor())


def join(address: str, rank: int, processes: int) -> None:
    """Become one of several processes that train together; they find each other at `address`, file://…"""
    torch.set_num_threads(max(1, models.cores() // processes))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = timedelta(minutes=5)  # for another that is gone; evaluating takes less
    distributed.init_process_group("gloo", address, patience, rank=rank, world_size=processes)


def _meet(parameters: list[nn.Parameter], seconds: float) -> float:
    """Average weights and time among the processes that train together; return the time."""
    if not distributed.is_initialized():
        return seconds
    with torch.no_grad():
        device = parameters[0].device
        flat = torch.cat([*(parameter.flatten() for parameter in parameters), torch.tensor([seconds], device=device)])
        means = flat.cpu()  # which is where processes can share
        distributed.all_reduce(means)
        means /= distributed.get_world_size()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, mean in zip(parameters, means.to(device).split([*sizes, 1]), strict=False):
            parameter.copy_(mean.view_as(parameter))
    return means[-1].item()


def _move_average(average: dict[str, nn.Module], trained: dict[str, nn.Module], decay: float) -> None:
    for key, model in average.items():
        fast = [parameter.detach() for parameter in trained[key].parameters()]
        torch._foreach_lerp_(list(model.parameters()), fast, 1 - decay)


Models = dict[str, nn.Module]
Optimizers = list[torch.optim.Optimizer]


def _save(
    checkpoint: Path, step: int, seconds: float, trained: Models, average: Models, optimizers: Optimizers
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_suffix(".part")
    state = {
        "models": {key: model.state_dict() for key, model in trained.items()},
        "average": {key: model.state_dict() for key, model in average.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    try:
        torch.save(state, temporary)
        os.replace(temporary, checkpoint)
    finally:
        temporary.unlink(missing_ok=True)


def _resume(checkpoint: Path, trained: Models, average: Models, optimizers: Optimizers) -> tuple[int, float]:
    """Bring back what `_save` has saved; return the steps and the seconds of training so far."""
    if not checkpoint.exists():
        return 0, 0.0
    try:
        # On the CPU: what belongs on a GPU is copied there, and optimizers want their counts of steps here.
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        for key in trained:
            trained[key].load_state_dict(state["models"][key])
            average[key].load_state_dict(state["average"][key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:  # it may be cut short
        raise Show1Error(
            f"{checkpoint} does not fit this stage: {first_line(error)}.",
            f"Remove it to start that stage from the weights in {stages.MINI}.",
        ) from None


def sheet(drawn: torch.Tensor, batch: dict, file: Path) -> None:
    """Save what a model has drawn below what it should be, with its condition between them where it has one."""
    rows = []
    for clips in (batch["clean"], batch.get("condition"), drawn):
        if clips is not None:
            clips = clips[:, :3].float().cpu()
            rows.append(torch.cat([F.pad(picture, (1, 1, 1, 1), value=1.0) for picture in fold(clips)[:16]], dim=2))
    picture = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    scale = max(1, 1600 // picture.shape[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1)).save(content, "PNG")
    write_atomically(file, content.getvalue())


def _export(model: nn.Module, folder: Path) -> None:
    """Save in half precision; every file is whole at any moment.

    All but the layers that are kept in float32 is saved in numbers that bfloat16 holds, too, so that a CPU that
    computes in it has the same weights as one in float32: other ones were most of what kept their keyframes apart. In
    those layers rounding took the interpolation's error up by a tenth (both measured).
    """
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    saved = copy.deepcopy(model)
    for name, parameter in saved.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.bfloat16()
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        saved.half().save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _export_schedulers() -> None:
    for folder in ("show-1-base", "show-1-interpolation", "show-1-sr1", "IF-II-L"):
        _export_scheduler(models.scheduler(thresholding=True), stages.MINI / folder / "scheduler")
    for folder in ("show-1-sr1", "IF-II-L"):
        _export_scheduler(models.image_noising_scheduler(), stages.MINI / folder / "image_noising_scheduler")
    _export_scheduler(models.scheduler(thresholding=False), stages.MINI / "show-1-sr2" / "scheduler")


def _export_scheduler(scheduler: SchedulerMixin, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / scheduler.config_name, scheduler.to_json_string().encode())


def _export_words() -> None:
    """Save what the page and the command line call known words."""
    write_atomically(stages.MINI / "words.txt", ("\n".join(sorted(world.vocabulary())) + "\n").encode())


def _log(**entry) -> None:
    print(json.dumps(entry), flush=True)
    with LOG.open("a") as log:
        log.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="of training in all, shared out among the stages")
    parser.add_argument("--stage", default="all", help=f"all, or one of: {', '.join(stages.STAGES)}")
    parser.add_argument(
        "--rate", type=float, default=RATE, help="of learning at first; less suits weights that are good already"
    )
    parser.add_argument("--seed", type=int, help="default: a new one at each start, so that it goes on with new scenes")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    parser.add_argument("--processes", type=int, help="default: four on a GPU, one a core on a CPU")
    arguments = parser.parse_args()
    if arguments.stage not in ("all", *stages.STAGES):
        parser.error(f"there is no stage {arguments.stage!r}; choose all or one of: {', '.join(stages.STAGES)}")
    if not (0 < arguments.minutes < math.inf and 0 < arguments.rate < math.inf):
        parser.error("minutes and rate have to be numbers above 0")
    if arguments.processes is not None and arguments.processes < 1:
        parser.error("at least one process has to train")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**62:
        parser.error("a seed is a whole number from 0 to 2^62")
    device = check_device(None if arguments.device == "auto" else arguments.device)
    if arguments.seed is None:
        arguments.seed = int.from_bytes(os.urandom(3), "little")
    world.sprites()  # a missing font is said here, not by a worker
    processes = arguments.processes or (4 if device.type == "cuda" else models.cores())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    with models.telling_what_cannot_be_saved():
        _log(
            command=" ".join(["python -m training.train", *sys.argv[1:]]),
            seed=arguments.seed,
            device=f"{name}, {processes} processes",
            versions=versions,
        )
        _export_schedulers()
        _export_words()
    stages.t5_tokenizer()  # before several processes learn them at once
    stages.clip_tokenizer()
    if processes == 1:
        _train(0, None, arguments, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        meeting = (f"file://{folder}/meeting", processes)
        others = [context.Process(target=_assist, args=(n, meeting, arguments, device)) for n in range(1, processes)]
        try:
            # Who joins in ignores it from its first moment on: one that is missing would be waited for, for minutes.
            asked = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for process in others:
                process.start()
            signal.signal(signal.SIGINT, asked)
            _train(0, meeting, arguments, device)
        except RuntimeError as error:  # gloo's, where another is gone
            time.sleep(1)
            if all(process.is_alive() for process in others):
                raise
            raise Show1Error(
                f"A process that trained along has ended: {first_line(error)}.",
                "What it says above is why; start again, and it goes on from its last checkpoint.",
            ) from error
        finally:
            for process in others:
                if process.is_alive():  # or it has not begun
                    process.terminate()


def _cancel(*_) -> None:
    """End as after Ctrl-C where `timeout` ends all processes at once; torch would tell each that is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt


def _assist(*how) -> None:
    """Train along; the process of rank 0 ends this one, and tells what both meet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(exit_code(lambda: _train(*how)))


def _train(rank: int, meeting: tuple[str, int] | None, arguments: argparse.Namespace, device: torch.device) -> None:
    """Train the wanted stages as one of several processes that know each other by `meeting`, or alone.

    Raises Show1Error where something is missing or damaged, cannot be saved, or the GPU's memory is full.
    """
    if meeting is not None:
        join(meeting[0], rank, meeting[1])
    if rank == 0:
        signal.signal(signal.SIGTERM, _cancel)  # not before: while the processes meet, nothing but the signal ends them
    if device.type == "cpu":
        # Of so few numbers a head, attention's flash kernel takes longer backwards on a CPU than plain products.
        torch.backends.cuda.enable_flash_sdp(False)
    for name, (_, share) in stages.STAGES.items():
        if arguments.stage in ("all", name):
            share = share if arguments.stage == "all" else 1
            try:
                run(name, arguments.minutes * share, arguments.seed, device, rank, arguments.rate)
            except torch.OutOfMemoryError as error:
                raise Show1Error(
                    "The GPU's memory is full.", "Close what else uses it, or give fewer --processes."
                ) from error


if __name__ == "__main__":
    sys.exit(exit_code(main))
