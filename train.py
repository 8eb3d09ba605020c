"""Train the blind denoiser on pictures (paper A: Eq. 1, App. A.2, A.3).

    python train.py                          # built-in pictures -> ckpt.pt
    python train.py --data photos            # your folder; small without a GPU
    python train.py --data photos --preset paper        # the paper's settings
    torchrun --nproc_per_node=8 train.py --data photos         # on eight GPUs
    python train.py --resume                 # go on where ckpt.pt was saved

It writes ckpt.pt, ckpt.jsonl (the curve) and ckpt.png (pictures, denoised).
"""
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unet import (Parser, Progress, UNet, UserError, check_outputs, choose_device, explain, fixed_phi,
                  load_checkpoint, main_process, number, picture_rows, receptive_field, run,
                  save_checkpoint, say, seeded, to_batch, to_uint8, write)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn

# Names of random streams, so that nothing depends on what was drawn before
NOISE, ORDER, EVALUATION, HELD_OUT = 1, 2, 3, 4


PAPER = dict(size=64, width=64, batch=1024, epochs=1000.0)                     # A.1 – A.3: with Adam at 1e-3
SMALL = dict(size=32, width=16, batch=32, pictures=300_000)                    # 20 to 40 minutes on one core


# Eq. 1 and A.3, Training: noise, loss, step, rate

def draw_sigma(n, sigma_max, generator, device):
    """σ of n pictures, (n, 1, 1, 1): p(σ) ∝ 1/√σ on [0, σ_max] (A.3), as σ_max u² with u uniform."""
    u = torch.rand(n, 1, 1, 1, generator=generator, device=device)
    return sigma_max * u ** 2


def noisy_batch(pictures_x, rows, step, seed, sigma_max, device):
    """The clean and noisy pictures of one global batch: x, y = x + σz (B, C, H, W), sigma (B, 1, 1, 1).

    A function of (seed, step) only, whatever the micro-batch, and on every process, which uses its share.
    """
    x = to_batch(pictures_x[rows], device)
    generator = seeded(device, seed, NOISE, step)
    sigma = draw_sigma(len(x), sigma_max, generator, device)
    # drawn with the channels last, as x lies in memory; contiguous normals are several times faster to draw
    z = torch.randn(len(x), *x.shape[2:], x.shape[1], generator=generator, device=device).permute(0, 3, 1, 2)
    return x, torch.addcmul(x, sigma, z), sigma


def training_step(model, optimizer, x, y, batch, micro_batch, skips_closed=False, precision="fp32"):
    """Make one step of Adam on Eq. 1, the same on all processes; returns the batch's mean of ‖x − x̂(y)‖².

    x, y: (B, C, H, W), this process's share of the global batch of `batch` pictures, computed `micro_batch`
    at a time. skips_closed: the decoder's weights on the skips stay as they are.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for x_part, y_part in zip(x.split(micro_batch), y.split(micro_batch)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            x_hat = model(y_part)
        loss = (x_hat.float() - x_part).square().sum((1, 2, 3))                # ‖x − x̂(x_σ)‖², Eq. 1
        (loss.sum() / batch).backward()
        losses.append(loss.detach().sum().item())
    total = over_processes(sum(losses), x.device)
    if dist.is_initialized():
        add_gradients(model)
    centralise(model)
    if skips_closed:                           # what is left of these gradients is not centred
        for weight in first_decoder_weights(model):
            skip_part(weight.grad).zero_()
    optimizer.step()
    return total / batch


@torch.no_grad()
def centralise(model):
    """Take from the gradient of each 3×3 filter its mean over (c_in, 3, 3) (Yong et al. 2020).

    M's inputs are not negative, so a filter whose weights all move the same way moves its channel up or down
    for every picture alike, as fast as Adam can, and LayerNorm cannot take that out. Without this line, from
    PyTorch's start, a part of M's channels is on or off for all pictures after ten steps, and then for good.
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.grad -= conv.weight.grad.mean((1, 2, 3), keepdim=True)


def paper_schedule(epochs):
    """Does a run follow A.3's schedule? Only if its budget is given in epochs, and is 1000 at least.

    epochs: the budget in passes over the training pictures, or None where it is given in pictures.
    """
    return epochs is not None and epochs >= 1000


def warm_up(epochs):
    """The part of a run in which the rate grows and the skips are closed: 1 % of the paper's, else 10 %."""
    return 0.01 if paper_schedule(epochs) else 0.1


def learning_rate(fraction, epochs):
    """Adam's step size after a fraction of a run; in the warm-up, which A.3 lacks, it grows from 1e-6.

    epochs: the budget, as for `paper_schedule`. A.3: 1e-3, halved every 100 of 1000 epochs; here every tenth
    of a run. Halving starves shorter runs; theirs falls linearly to 0.
    """
    rate = 1e-3 * min(1, fraction / warm_up(epochs) + 1e-3)
    if paper_schedule(epochs):
        return rate * 0.5 ** min(9, int(10 * fraction))
    return rate * max(0, 1 - fraction)


def set_rate(optimizer, step, steps, epochs):
    """Give Adam its `learning_rate`, but at most the last one plus twice what a step of the warm-up adds.

    A new run never meets the limit. One that was made longer does: its last rate was near 0, and a jump to
    half of the full one can kill the middle block (assets/results.md, section 4).
    """
    adam, added = optimizer.param_groups[0], 1e-3 / (warm_up(epochs) * steps)
    adam["lr"] = min(learning_rate(step / steps, epochs), adam["lr"] + 2 * added)


# The start: what keeps the middle block alive (README: waking the middle block)

def first_decoder_weights(model):
    """The weights (d, 2d, 3, 3) of the first layer of each decoder block, from D1 on."""
    return [model.blocks[f"D{k}"][0].weight for k in range(1, model.levels + 1)]


def skip_part(weight):
    """What of such a weight, or of its gradient, sees the skip: the first d of its 2d inputs. A view."""
    return weight[:, :len(weight)]


def skips_are_closed(model):
    """Does the decoder see nothing of the skips?"""
    return not any(skip_part(weight).any() for weight in first_decoder_weights(model))


@torch.no_grad()
def initialise(model, y, mean):
    """The start of the network, in place: one data-dependent pass, skips at 0, and x̂ at the mean colour.

    y: (N, C, H, W), noisy: each channel of each LayerNorm and of each up-convolution gets mean 0 and variance
    1 over it. mean: (C,). With PyTorch's own start all channels of M are almost alike, and φ is a constant.
    The decoder's weights on the skips stay at 0 during the warm-up: the network can then denoise only through
    M and learns to put the picture's gist there. The output starts at the mean colour because Adam remembers
    the size of the first gradients for a thousand steps.
    """
    def whiten(module, inputs, out):           # a forward hook: what it returns is the module's output
        mu, scale = out.mean((0, 2, 3)), 1 / out.std((0, 2, 3)).nan_to_num().clamp_min(1e-3)
        module.bias.copy_((module.bias - mu) * scale)
        if isinstance(module, nn.GroupNorm):
            module.weight.mul_(scale)
            return module.forward(*inputs)
        module.weight.mul_(scale.view(1, -1, 1, 1))
        return (out - mu.view(-1, 1, 1)) * scale.view(-1, 1, 1)

    for weight in first_decoder_weights(model):
        skip_part(weight).zero_()
    hooks = [module.register_forward_hook(whiten) for module in model.modules()
             if isinstance(module, (nn.GroupNorm, nn.ConvTranspose2d))]
    model(y)
    for hook in hooks:
        hook.remove()
    last = model.blocks["D1"][-1]
    last.weight.zero_()
    last.bias.copy_(torch.as_tensor(mean))


def random_network(checkpoint, seed, device):
    """A network like a checkpoint's, with PyTorch's random weights; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(**checkpoint["model"]).to(device).eval()


def untrained_network(checkpoint, x, seed):
    """The network of a checkpoint as before its training, from another seed: a null that has learnt nothing.

    x: (N, C, H, W), pictures for the data-dependent pass, with noise as in training.
    """
    model = random_network(checkpoint, seed, x.device)
    generator = seeded("cpu", seed, "noise of the start")
    sigma = draw_sigma(len(x), checkpoint["sigma_max"], generator, "cpu")
    z = torch.randn(x.shape, generator=generator)
    initialise(model, x + (sigma * z).to(x.device), checkpoint["mean"])
    return model


# Training: the loop

def never():
    """Nobody asks the run to stop."""
    return False


def train(settings, out, device="cpu", resume=None, micro_batch=None, compiled=False, save_every=300,
          stop_requested=never, on_start=None):
    """Minimise Eq. 1 (A.3); writes `out`, its .jsonl and its .png. Returns True if the run is complete.

    settings: what defines the run, as `complete_settings` returns it. resume: a checkpoint's dict to go on
    from. save_every: seconds between evaluations, each with a save. stop_requested: asked after every step;
    the run then saves and ends. on_start: called once the pictures are read. Raises UserError for unusable
    data, a loss that is not finite, and a checkpoint that cannot be written.
    """
    session = prepare(settings, out, torch.device(device), resume, micro_batch)
    model, optimizer, steps = session.model, session.optimizer, session.steps
    batch, seed, epochs = settings["batch"], settings["seed"], settings["epochs"]
    if on_start:
        on_start()
    describe(session)
    step = session.checkpoint["step"]
    if step >= steps:
        say(f"{out}: already complete; a larger --pictures or --epochs makes it longer")
        return True
    if compiled:
        model.compile()

    losses, stopping, saved_at, share = [], False, time.monotonic(), share_of_batch(batch)
    progress = Progress(step / steps)
    while step < steps and not stopping:
        # A noisy batch x + σz with p(σ) ∝ 1/√σ. It depends on seed and step: a resumed run sees the same.
        rows = batch_rows(session.training_rows, step, batch, seed)
        x, y, _ = noisy_batch(session.pictures.x, rows, step, seed, settings["sigma_max"], session.device)

        # A step of Adam on ‖x − x̂(y)‖². During the warm-up the decoder sees nothing but M, unless its skips
        # were open already, as in a run that was made longer.
        set_rate(optimizer, step, steps, epochs)
        closed = step / steps < warm_up(epochs) and skips_are_closed(model)
        loss = training_step(model, optimizer, x[share], y[share], batch, session.micro_batch, closed,
                             settings["precision"])
        step += 1
        losses.append(loss)
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is not finite; the last save of {out} is as it was. Try "
                            "another --seed, or --precision fp32")
        progress(step / steps, f"{session.rate(step):.0f} pictures/s  loss {loss:.1f}")

        # At intervals, at the end and when asked to stop: is it learning, and through M? Save.
        stopping = step < steps and any_process(stop_requested(), session.device)
        if step == steps or stopping or time.monotonic() - saved_at > save_every:
            save(session, step, losses, stopping)
            losses, saved_at = [], time.monotonic()
    conclude(session, step)
    return step == steps


@dataclass(eq=False)
class Session:
    """What the loop works with, until the run ends or is stopped."""
    settings: dict
    out: str
    device: torch.device
    pictures: "Pictures"
    training_rows: np.ndarray
    held_out_rows: np.ndarray  # in the order in which they are evaluated
    model: UNet
    optimizer: torch.optim.Adam
    checkpoint: dict           # of the file `out`, as it was last saved or is to be
    steps: int                 # of the whole run
    micro_batch: int           # pictures at a time
    first_step: int            # of this session
    earlier: float             # seconds that earlier sessions trained
    began: float               # the clock when this one did
    stamp: tuple               # of the file `out`, as this run left it

    def elapsed(self):
        """Seconds of training, earlier sessions included."""
        return self.earlier + time.monotonic() - self.began

    def rate(self, step):
        """Pictures a second, in this session."""
        return (step - self.first_step) * self.settings["batch"] / (self.elapsed() - self.earlier)

    def held_out(self, n):
        """The first n held-out pictures, (n, C, H, W)."""
        return to_batch(self.pictures.x[self.held_out_rows[:n]], self.device)


def prepare(settings, out, device, resume, micro_batch):
    """Pictures, network and optimiser of a run, new or resumed: a Session. Raises UserError."""
    batch, seed = settings["batch"], settings["seed"]
    pictures, training_rows, held_out_rows = training_data(settings)
    torch.manual_seed(seed)                    # the same weights on every process
    model, optimizer = new_network(settings, device)
    if resume:
        checkpoint = resumed_checkpoint(resume, pictures, settings, out)
        restore(model, optimizer, resume, out)
    else:
        checkpoint = first_checkpoint(settings, pictures, training_rows)
        first_rows = batch_rows(training_rows, 0, min(batch, 64), seed)
        _, y, _ = noisy_batch(pictures.x, first_rows, 0, seed, settings["sigma_max"], device)
        initialise(model, y, checkpoint["mean"])
    if dist.is_initialized():
        for p in model.parameters():
            dist.broadcast(p.data, 0)

    pictures_to_see = settings["pictures"] or settings["epochs"] * len(training_rows)
    share = math.ceil(batch / rank_and_processes()[1])
    return Session(
        settings, out, device, pictures, training_rows,
        held_out_rows=np.random.default_rng((seed, HELD_OUT)).permutation(held_out_rows),
        model=model, optimizer=optimizer, checkpoint=checkpoint,
        steps=math.ceil(pictures_to_see / batch),
        micro_batch=equal_parts(share, micro_batch or fitting_micro_batch(settings, device)),
        first_step=checkpoint["step"], earlier=checkpoint["elapsed"], began=time.monotonic(),
        stamp=file_stamp(out))


def first_checkpoint(settings, pictures, training_rows):
    """The dict of a checkpoint before the first step, without weights."""
    mean = pictures.x[training_rows[:10_000]].mean((0, 1, 2)) / 255            # the mean colour m
    return dict(model={name: settings[name] for name in ("width", "channels", "levels")},
                size=settings["size"], sigma_max=settings["sigma_max"], mean=mean.tolist(),
                fingerprint=pictures.fingerprint, step=0, elapsed=0.0, training={}, curve=[],
                run=os.urandom(8).hex())


def resumed_checkpoint(resume, pictures, settings, out):
    """The dict of a checkpoint to go on with. UserError if it was trained on other pictures."""
    if resume["fingerprint"] != pictures.fingerprint:
        raise UserError(f"--data {settings['data']}: these are not the pictures that {out} was trained on; "
                        "were some added or removed?")
    checkpoint = {"run": os.urandom(8).hex(), **resume}    # older files hold no name of the run
    checkpoint.pop("sha256", None)
    return checkpoint


def new_network(settings, device):
    """A network for these settings, and its optimiser."""
    model = UNet(settings["width"], settings["channels"], settings["levels"]).to(device)
    rate = learning_rate(0, settings["epochs"])
    return model, torch.optim.Adam(model.parameters(), lr=rate, fused=device.type in ("cpu", "cuda"))


def restore(model, optimizer, checkpoint, path):
    """Weights and Adam's state from a checkpoint, in place. UserError if they are another network's."""
    with explain(path, "cannot be resumed"):
        model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for p in model.parameters():           # fused Adam would write beyond the end of its own memory
            if optimizer.state[p]["exp_avg"].shape != p.shape:
                raise ValueError("Adam's state is another network's")


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The seeded permutation of 0 … n−1 in which an epoch visits the training pictures."""
    return np.random.default_rng((seed, ORDER, epoch)).permutation(n)


def batch_rows(training_rows, step, batch, seed):
    """Rows of global batch `step`: epochs laid end to end and cut, so that every picture counts equally."""
    n = len(training_rows)
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    parts = []
    for epoch in np.unique(epochs).tolist():
        order = epoch_order(n, seed, epoch)
        parts.append(training_rows[order[places[epochs == epoch]]])
    return np.concatenate(parts)


def save(session, step, losses, stopping):
    """Evaluate (unless the run is to stop early) and write the checkpoint, the curve and the picture.

    Raises UserError for weights that are not finite, if another run has written the file meanwhile, and if
    the disk refuses.
    """
    if not main_process():
        return
    model, checkpoint, out = session.model, session.checkpoint, session.out
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"the weights are not finite after step {step}; {out} is as it was last saved")
    if file_stamp(out) != session.stamp:
        raise UserError(f"{out}: another run has written it meanwhile; this one stops after step {step}")
    elapsed = session.elapsed()
    summary = {**checkpoint["training"], "step": step, "pictures_seen": step * session.settings["batch"],
               "loss": float(np.mean(losses)), "minutes": elapsed / 60,
               "images_per_second": session.rate(step), "training_pictures": len(session.training_rows),
               "device": str(session.device)}
    if not stopping:
        summary |= measure(session)
        checkpoint["curve"] = [*checkpoint["curve"], summary]
        say_measured(summary)
    checkpoint |= dict(weights=model.state_dict(), optimizer=session.optimizer.state_dict(),
                       flags=session.settings, step=step, elapsed=elapsed, training=summary)
    save_checkpoint(out, checkpoint)
    session.stamp = file_stamp(out)
    write_companions(session)


def measure(session):
    """The evaluation on held-out pictures, 256 at most: a dict of numbers for the curve.

    `phi_distance` is the mean distance between the φ of two pictures, to compare sample.py's distances with.
    """
    model, sigma_max, micro_batch = session.model, session.settings["sigma_max"], session.micro_batch
    x = session.held_out(256)
    numbers = {"psnr": {}, "use": {}, "use_error": {}}
    for sigma, values in evaluate(model, x, known_sigmas(SIGMAS, sigma_max), micro_batch).items():
        numbers["psnr"][sigma] = float(values.mean())
    use_of = use_of_M(model, x[:128], known_sigmas(USE_SIGMAS, sigma_max), micro_batch)
    for sigma, values in use_of.items():
        numbers["use"][sigma], numbers["use_error"][sigma] = mean_error(values)
    code = fixed_phi(model, x[:64]).cpu()                                      # (64, d)
    if len(code) > 1:
        numbers["phi_distance"] = float(torch.pdist(code).mean())
    return numbers | variety(code)


def known_sigmas(sigmas, sigma_max):
    """Those of the noise levels that the network is trained for; σ_max if none is."""
    return [sigma for sigma in sigmas if sigma <= sigma_max] or [sigma_max]


def write_companions(session):
    """The curve, a line of JSON an evaluation, and rows of held-out pictures: clean, noisy, denoised."""
    run_name = session.checkpoint["run"]
    curve_path, picture_path = companions(session.out)
    with write(curve_path) as file:
        for numbers in session.checkpoint["curve"] or [{}]:                    # before the first: the name
            line = json.dumps({"run": run_name, **numbers})
            file.write(f"{line}\n".encode())
    mark = PngImagePlugin.PngInfo()
    mark.add_text("run", run_name)                         # a resumed run may replace what bears its name
    with write(picture_path) as file:
        draw_evaluation(session.model, session.held_out(8)).save(file, "png", pnginfo=mark)


def companions(out):
    """The files beside a checkpoint: its curve and its picture."""
    return [out[:-3] + ".jsonl", out[:-3] + ".png"]


@torch.no_grad()
def draw_evaluation(model, x):
    """Held-out pictures x (≤ 8, C, H, W): clean, noisy and denoised at three σ. A PIL image."""
    sheet = [("clean", x)]
    for k, sigma in enumerate((0.1, 0.3, 0.7)):
        y = x + sigma * torch.randn(x.shape, generator=seeded(x.device, HELD_OUT, k), device=x.device)
        sheet += [(f"σ {sigma:g}", y), ("denoised", model(y))]
    return picture_rows(sheet, side=96)


def describe(session):
    """Say at the start what will be done, with what."""
    settings, classes, size = session.settings, session.pictures.classes, session.settings["size"]
    parameters = sum(p.numel() for p in session.model.parameters()) / 1e6
    sees = receptive_field(settings["levels"])
    say(f"device    {session.device}, {settings['precision']}, processes: {rank_and_processes()[1]}")
    say(f"network   width {settings['width']}, {settings['levels']} levels, {parameters:.2f} M parameters; "
        f"M sees {sees}×{sees} pixels")
    if sees < size:
        say(f"warning: that is less than the picture, {size}×{size}; φ will be local")
    say(f"pictures  {len(session.training_rows)} to train on, {len(session.held_out_rows)} held out, "
        f"{size}×{size}, {settings['channels']} channels")
    if classes:
        say(f"classes   {len(classes)}: {', '.join(classes[:5])} …")
    say(f"run       {session.steps} steps of {settings['batch']} pictures, {session.micro_batch} at a time, "
        f"from step {session.checkpoint['step']}")


def say_measured(numbers):
    """Say what an evaluation has measured."""
    say(f"{numbers['pictures_seen']:,} pictures seen; cosine of φ of two pictures {numbers['cosine']:.2f}")
    psnr_of = [f"{value:.2f} (σ {sigma:g})" for sigma, value in numbers["psnr"].items()]
    say(f"  PSNR      {', '.join(psnr_of)} dB")
    use_of = []
    for sigma, value in numbers["use"].items():
        use_of.append(f"{value:.2f} ± {numbers['use_error'][sigma]:.2f} (σ {sigma:g})")
    say(f"  use of M  {', '.join(use_of)} dB")


def conclude(session, step):
    """Say at the end how it went and what comes next."""
    out, done = shlex.quote(session.out), f"{step} steps, {step * session.settings['batch']:,} pictures"
    say(f"wrote {session.out}, and beside it its curve (.jsonl) and pictures (.png)")
    if step == session.steps:
        say(f"complete after {done}; next: python sample.py {out} and python analyze.py {out}")
    else:
        say(f"stopped after {done}; go on with: python train.py --out {out} --resume")


# Memory, files and processes

def rank_and_processes():
    """The number of this process, and of how many that train together; one, unless torchrun started more."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of_batch(batch):
    """What this process computes of a global batch, a slice."""
    rank, processes = rank_and_processes()
    return slice(rank * batch // processes, (rank + 1) * batch // processes)


def equal_parts(n, largest):
    """The size of equal parts of n pictures, none of more than `largest`: 32 by 30 makes parts of 16."""
    parts = math.ceil(max(1, n) / largest)
    return math.ceil(max(1, n) / parts)


def fitting_micro_batch(settings, device):
    """Pictures whose activations fit: 256 MiB on a CPU (more is no faster), half of a GPU's free memory."""
    room = 2 ** 28
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 2
    # a level keeps about 19 maps of its channels, and each level is half the size of the one above it
    values = 36 * settings["width"] * settings["size"] ** 2
    return max(1, room // (4 * values))


def file_stamp(path):
    """What changes when another program writes the file, however coarse its clock; None if there is none."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


def over_processes(value, device, op=dist.ReduceOp.SUM):
    """A number, summed (or by `op`) over all processes, so that all of them decide alike."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(value, op)
    return value.item()


def any_process(flag, device):
    """Does any of the processes say so?"""
    return bool(over_processes(float(flag), device, dist.ReduceOp.MAX))


def add_gradients(model):
    """The sum of all processes' gradients, in place; a process whose share is empty adds nothing."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


# Evaluation, on held-out pictures: is it learning, and through M?

SIGMAS = 0.05, 0.1, 0.2, 0.3, 0.5, 1.0         # noise levels at which PSNR is measured
USE_SIGMAS = 0.1, 0.3, 0.5, 1.0                # and the use of M


def psnr(x_hat, x):
    """10 log₁₀(1 / mean squared error) of each picture, (N,), in dB, at most 100; both (N, C, H, W)."""
    return -10 * (x_hat - x).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


@torch.no_grad()
def evaluate(model, x, sigmas=SIGMAS, micro_batch=128, swap_M=False):
    """PSNR of x̂(x + σz) at each σ: {σ: (N,), in dB, one a picture}; their mean is the papers' PSNR.

    x: (N, C, H, W); z is always the same. swap_M: M's maps are those of the picture before.
    """
    values = {}
    for sigma in sigmas:
        z = torch.randn(x.shape, generator=seeded(x.device, EVALUATION, round(1000 * sigma)), device=x.device)
        y, parts = x + sigma * z, []
        y_before = y.roll(1, 0)
        for i in range(0, len(x), micro_batch):
            some = slice(i, i + micro_batch)
            maps, skips = model.encode(y[some])
            if swap_M:
                maps, _ = model.encode(y_before[some])
            parts.append(psnr(model.decode(maps, skips), x[some]))
        values[sigma] = torch.cat(parts).cpu().numpy()
    return values


def use_of_M(model, x, sigmas=USE_SIGMAS, micro_batch=128):
    """{σ: dB of PSNR that each picture loses when its M-maps are another picture's, (N,)}; x: (N, C, H, W).

    0: the decoder does not listen to M, and φ, whatever it says about pictures, is not what denoises them.
    """
    with_its_own = evaluate(model, x, sigmas, micro_batch)
    with_another = evaluate(model, x, sigmas, micro_batch, swap_M=True)
    return {sigma: with_its_own[sigma] - with_another[sigma] for sigma in sigmas}


def input_psnr(sigmas):
    """PSNR of the noisy pictures at each σ, in dB, an array."""
    return -20 * np.log10(sigmas)


def variety(code):
    """Does φ vary? dict(cosine, the mean between two pictures; silent: channels 0 for all); code: (N, d)."""
    unit, n = F.normalize(code, dim=1), len(code)
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / max(1, n * (n - 1))
    return {"cosine": float(cosine), "silent": int((code.amax(0) <= 1e-6).sum())}


def mean_error(values):
    """Mean and standard error of one value a picture, (n,)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# A.2, Pictures

class Pictures(NamedTuple):
    """A data set, decoded once. Everything but `x` is small."""
    x: np.ndarray           # (N, H, W, C) uint8
    paths: list             # N names: the file, and the row or tile in it
    labels: np.ndarray      # (N,) index into `classes`, −1 for none; never used in training
    classes: list           # names of the sub-folders; with tiles and no sub-folders, of the pictures
    groups: np.ndarray      # (N,) pictures of one group stay on one side of every split
    hashes: np.ndarray      # (N,) of the pixels: an order that does not depend on the names of files
    fingerprint: str        # of all pictures, whatever their order


def training_data(settings):
    """(Pictures, training rows, held-out rows) for the settings of a run. Errors: as `load_pictures`."""
    pictures = load_pictures(settings["data"], settings["size"], settings["channels"], settings["patches"])
    return pictures, *divide(pictures, settings)


def divide(pictures, settings):
    """(training rows, held-out rows in the order of their content) for the settings of a run. UserError."""
    seed = settings["seed"]
    training_rows, held_out_rows = split(pictures, settings["val"], seed)
    training_rows = training_part(pictures, training_rows, settings["subset"], settings["limit"], seed)
    return training_rows, held_out_rows[np.argsort(pictures.hashes[held_out_rows])]


def load_pictures(data=None, size=64, channels=3, patches=False):
    """Read a data set: a folder, a .npy/.npz file, "disc", "calpha:A", or None for the built-in pictures.

    x is (N, size, size, channels). UserError if nothing is usable.
    """
    if is_synthetic(data):
        x, labels, classes = synthetic_pictures(data, size, channels)
        source = np.arange(len(x))
        paths = [f"{data or 'built-in'}#{i}" for i in range(len(x))]
    else:
        x, source, names, class_names = read_pictures(data, size, channels, patches)
        labels, classes = class_numbers(class_names)
        labels = labels[source]
        paths = [names[s] for s in source]
        if patches:
            tile = np.arange(len(x)) - np.searchsorted(source, source)
            paths = [f"{path}#{t}" for path, t in zip(paths, tile)]
    hashes = np.frombuffer(b"".join(digest(picture) for picture in x), np.uint64)
    joins = np.ones(len(x), bool)
    if patches:                                # tiles of one colour would join files that share nothing
        joins = np.array([bool((picture != picture[0, 0]).any()) for picture in x])
    groups = join_groups(source, hashes, joins)
    return Pictures(x, paths, labels, classes, groups, hashes, digest(np.sort(hashes)).hex())


def is_synthetic(data):
    """Does --data name pictures that are computed? What exists on the disk is read."""
    if data is None:
        return True
    return (data == "disc" or data.startswith("calpha:")) and not os.path.exists(data)


def digest(array):
    """A hash of 8 bytes."""
    return hashlib.blake2b(array.tobytes(), digest_size=8).digest()


def class_numbers(class_names):
    """Class names, "" for no class -> numbers (n,), −1 for no class, and the names in their order."""
    classes = sorted(set(class_names) - {""})
    number_of = {name: k for k, name in enumerate(classes)}
    return np.array([number_of.get(name, -1) for name in class_names]), classes


def read_pictures(data, size, channels, patches):
    """Read a folder or an array file: x (N, size, size, channels) uint8, (N,) sources, their names, classes.

    A source is a picture file or a row of an array; its class is a string, or "". UserError if there is no
    picture.
    """
    files, arrays = list_pictures(data)
    if arrays:
        sources, names, class_names = read_arrays(arrays)
        if sources.shape[1:] == (size, size, channels):
            return sources, np.arange(len(sources)), names, class_names        # a .npy stays on the disk
    else:
        sources, names, class_names = files, files, class_folders(files, data)
        if patches and not any(class_names):
            class_names = [Path(file).stem for file in files]
    with warnings.catch_warnings(action="ignore"):         # Pillow's, of large files and odd EXIF
        x, source = decode_all(sources, names, size, channels, patches)
    if not len(x):
        raise UserError(f"--data {data}: none of what is there could be used as a picture")
    return x, source, names, class_names


HIDDEN = ".", "@eaDir", "__MACOSX"             # files and folders whose names start so are no pictures
NO_CLASSES = {"train", "val", "valid", "validation", "test", "images"}


def list_pictures(data):
    """The picture files below a folder, and the array files (.npz in a folder; `data` itself if a file).

    Everything that Pillow can open is a picture file. Raises UserError if there is nothing, or both kinds.
    """
    if not os.path.exists(data):
        raise UserError(f"--data {data}: there is no such file or folder")
    if not os.path.isdir(data):
        if not data.lower().endswith((".npy", ".npz")):
            raise UserError(f"--data {data}: must be a folder of pictures, or a .npy or .npz file")
        return [], [data]
    endings = Image.registered_extensions().items()
    readable = {ending for ending, name in endings if name in Image.OPEN}
    paths = walk(data)
    files = [path for path in paths if os.path.splitext(path)[1].lower() in readable]
    arrays = [path for path in paths if path.lower().endswith(".npz")]
    if len(files) + len(arrays) < len(paths):
        say(f"passed over {len(paths) - len(files) - len(arrays)} files in {data} that are no pictures")
    if files and arrays:
        raise UserError(f"--data {data}: holds {len(files)} picture files and {len(arrays)} .npz files; "
                        "keep one kind")
    if not files and not arrays:
        raise UserError(f"--data {data}: holds no pictures that Pillow opens, at any depth, and no .npz")
    return files, arrays


def walk(folder):
    """All regular files below a folder but hidden ones, sorted; links are followed once."""
    paths, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:                                   # a link may lead back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        paths += [os.path.join(root, name) for name in files if not name.startswith(HIDDEN)]
    return sorted(filter(os.path.isfile, paths))           # a FIFO would be waited for


def class_folders(files, data):
    """The class of every file: the first sub-folder that tells files apart, or "".

    `train`, `val`, `images` and the like tell no classes, nor does a folder in which all files lie.
    """
    folders = []
    for file in files:
        parts = Path(file).relative_to(data).parts[:-1]
        folders.append([part for part in parts if part.lower() not in NO_CLASSES])
    while all(folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    return ["".join(parts[:1]) for parts in folders]


def decode_all(sources, names, size, channels, patches):
    """Decode sources in parallel: x (N, size, size, channels) uint8, and the source of each (N,).

    x is filled directly, so pictures of files are never in memory twice. Says what could not be used.
    """
    counts, skipped = np.ones(len(sources), int), []
    if patches:
        counts = np.array([count_tiles(source, size) for source in sources])
    starts = np.cumsum(counts) - counts
    x = np.empty((counts.sum(), size, size, channels), np.uint8)

    def decode(i):
        try:
            with open_image(sources[i]) as image:
                x[starts[i]:starts[i] + counts[i]] = to_pixels(image, size, channels, patches)
        except Exception as error:             # damaged files raise nearly anything, by format
            skipped.append(f"{names[i]}: {error}")
            counts[i] = 0

    with ThreadPoolExecutor(8) as pool:
        progress = Progress()
        for first in range(0, len(sources), 1024):
            last = min(first + 1024, len(sources))
            list(pool.map(decode, range(first, last)))
            progress(last / len(sources), "reading pictures")
    if skipped:
        say(f"skipped {len(skipped)} of {len(sources)} pictures: {'; '.join(skipped[:3])}")
    n = 0
    for start, count in zip(starts, counts):   # what was skipped has left gaps
        x[n:n + count] = x[start:start + count]
        n += count
    return x[:n], np.repeat(np.arange(len(sources)), counts)


def open_image(source):
    """A picture file, or a row of an array (H, W, C), as a PIL image."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(np.repeat(source, 3 // source.shape[2], axis=2))
    return Image.open(source)


def count_tiles(source, size):
    """How many size×size tiles a source holds, from its header; 0 if it cannot be read."""
    try:
        with open_image(source) as image:
            return (image.width // size) * (image.height // size)
    except Exception:                          # `decode` says why
        return 0


def read_arrays(files):
    """Pictures of .npy and .npz files, (N, H, W, C) uint8, their names and classes. Or a UserError.

    Several files are joined, which takes twice their memory for a moment.
    """
    parts, names, class_names = [], [], []
    for file in files:
        with explain(file, "not a whole .npy or .npz file of pictures"):
            part, labels = load_array(file)
        parts.append(part)
        names += [f"{file}#{i}" for i in range(len(part))]
        class_names += labels
    if len(parts) == 1:
        return parts[0], names, class_names
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"{files[0]}: the pictures of other files beside it have another shape")
    return np.concatenate(parts), names, class_names


def load_array(file):
    """A .npy or .npz file: its pictures, (N, H, W, C), and N class names. ValueError if it holds none.

    In a .npz the pictures are `data`, `images`, `x_train` or `arr_0`; integers `labels` (N,) are classes.
    """
    arrays = np.load(file, mmap_mode="r", allow_pickle=False)
    if isinstance(arrays, np.ndarray):
        return as_pictures(arrays), [""] * len(arrays)
    names = [name for name in ("data", "images", "x_train", "arr_0") if name in arrays]
    if not names:
        raise ValueError(f"which are the pictures? {', '.join(arrays)}: name one of them `data`")
    say(f"reading {names[0]} of {file}")
    x = as_pictures(arrays[names[0]])
    if "labels" not in arrays:
        return x, [""] * len(x)
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != (len(x),):
        raise ValueError(f"labels must be {len(x)} integers, not {labels.dtype} {labels.shape}")
    return x, [str(label) for label in labels]


def as_pictures(array):
    """A uint8 array of pictures in any known layout -> (N, H, W, C), a view. Else a ValueError."""
    shape = array.shape
    if array.dtype == np.uint8 and len(array):
        if array.ndim == 2:                    # ImageNet64: all red, all green, all blue
            side = math.isqrt(shape[1] // 3)
            if shape[1] == 3 * side ** 2:
                return array.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        if array.ndim == 3 and shape[2] not in (1, 3):     # else one picture (H, W, C)
            return array[..., None]
        if array.ndim == 4 and shape[3] in (1, 3):
            return array
    raise ValueError("pictures must be uint8 of shape (N, H, W), (N, H, W, 1 or 3) or (N, 3·side²), not "
                     f"{array.dtype} {shape}")


def load_picture(path, size=None, channels=3, patches=False):
    """One picture file -> (H, W, channels) uint8: as in training if `size` is given, else at full resolution.

    With `patches` the central tile. UserError if it cannot be read as a picture, or is smaller than a tile.
    """
    with explain(path, "cannot be read as a picture"), warnings.catch_warnings(action="ignore"):
        with Image.open(path) as image:
            if not size:
                return np.atleast_3d(flatten(image, channels))
            if patches and min(image.size) >= size:
                image = flatten(image, channels)
                left, top = (image.width - size) // 2, (image.height - size) // 2
                image = image.crop((left, top, left + size, top + size))
            return to_pixels(image, size, channels, patches)[0]


def to_pixels(image, size, channels, patches=False):
    """A PIL image -> (1, size, size, channels) uint8: the central square, resized with antialiasing.

    With `patches`: all its k size×size tiles at full resolution, (k, …); ValueError if there is none.
    """
    if not patches:                            # a large JPEG is decoded at a fraction, at least 2·size
        image.draft(None, (2 * size, 2 * size))
        square = ImageOps.fit(flatten(image, channels), (size, size), Image.BICUBIC)
        return np.asarray(square).reshape(1, size, size, channels)
    image = flatten(image, channels)
    w, h = image.size
    down, across = h // size, w // size
    if not down or not across:
        raise ValueError(f"{w}×{h} pixels hold no {size}×{size} tile")
    tiles = np.asarray(image)[:down * size, :across * size].reshape(down, size, across, size, channels)
    return tiles.swapaxes(1, 2).reshape(-1, size, size, channels)


def flatten(image, channels):
    """A PIL image of any mode, upright, as 8-bit "L" or "RGB": alpha over white, 16 bits reduced to 8."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:                          # what cannot be read of EXIF turns nothing; the pixels count
        image.load()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):             # 16-bit gray; convert("L") would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


# A.2, Pictures: what is held out

def join_groups(source, hashes, joins):
    """Group of every picture (N,): those cut from one file, and exact duplicates, share one, transitively.

    source: (N,) index of the file. hashes: (N,) uint64 of the pixels. joins: (N,) bool, whether a picture's
    duplicates join it; tiles of one colour join no files. A group is named by its smallest hash: that depends
    on the pictures alone, not on their names or order.
    """
    hashes = hashes.copy()
    for value in np.unique(hashes[~joins]):                # each gets a hash of its own
        same = np.flatnonzero(hashes == value)
        hashes[same] += np.arange(len(same), dtype=np.uint64)
    copies = np.unique(hashes, return_inverse=True)[1]
    groups, before = hashes, None
    while not np.array_equal(groups, before):
        before = groups
        for kind in (source, copies):
            smallest = np.full(kind.max() + 1, np.uint64(2 ** 64 - 1))
            np.minimum.at(smallest, kind, groups)
            groups = smallest[kind]
    return groups


def split(pictures, val=0.05, seed=0):
    """Split the rows into (training, held-out) by the seed and the pictures alone.

    A share `val` is held out, at least one picture and at most 2,000. No group (tiles of one picture, exact
    duplicates) has members on both sides; one that is larger stays in training, unless all are: then the
    smallest is held out. Raises UserError if there is only one group.
    """
    members = group_members(pictures.groups, np.arange(len(pictures.x)), seed)
    if len(members) < 2:
        raise UserError("only one distinct picture: nothing to hold out (tiles of one picture stay together)")
    room = min(max(1, round(val * len(pictures.x))), 2000, len(pictures.x) - 1)
    training_groups, held_out_groups = [], []
    for group in members:
        if len(group) <= room:
            held_out_groups.append(group)
            room -= len(group)
        else:
            training_groups.append(group)
    if not held_out_groups:                    # every group is larger than asked for: the smallest one, then
        smallest = np.argmin([len(group) for group in training_groups])
        held_out_groups.append(training_groups.pop(smallest))
    return np.concatenate(training_groups), np.concatenate(held_out_groups)


def group_members(groups, rows, seed):
    """`rows` in one array a group, in an order drawn from the seed and the pictures alone."""
    rows_by_group = rows[np.argsort(groups[rows], kind="stable")]
    _, starts = np.unique(groups[rows_by_group], return_index=True)
    members = np.split(rows_by_group, starts[1:])
    return [members[i] for i in np.random.default_rng(seed).permutation(len(members))]


def training_part(pictures, training_rows, subset=None, limit=None, seed=0):
    """Paper B's training sets: one half of the training rows (no group in both), at most `limit` of them.

    A smaller limit's are among a larger one's. UserError if nothing is left.
    """
    members = group_members(pictures.groups, training_rows, seed)
    if subset:
        sizes = np.cumsum([len(group) for group in members])
        half = np.argmin(abs(sizes - len(training_rows) / 2)) + 1
        members = members[:half] if subset == "first" else members[half:]
    if not members:
        raise UserError(f"--subset {subset}: too few distinct pictures for two halves")
    return np.concatenate(members)[:limit]


# Built-in pictures, for a machine without any: a random field for each, low inside its things

def dots(s, t):
    """A disc around (0, 0). s, t: coordinates in a cell of a lattice, −0.5 … 0.5; so for the next four."""
    return np.hypot(s, t)


def crosses(s, t):
    """A bar along s and one along t."""
    along_s = np.maximum(np.abs(s), 3 * np.abs(t))
    along_t = np.maximum(np.abs(t), 3 * np.abs(s))
    return np.minimum(along_s, along_t)


def triangles(s, t):
    """A triangle: the greatest of the distances to its three sides."""
    return np.maximum(-s, 0.5 * s + 0.87 * np.abs(t))


def rings(s, t):
    """Concentric rings: the distance of 3 r to the nearest integer."""
    r = 3 * np.hypot(s, t)
    return np.abs(r - np.round(r))


def stars(s, t):
    """A star of seven rays."""
    ray = 7 * np.arctan2(t, s) / (2 * np.pi)
    return np.hypot(s, t) * np.abs(ray - np.round(ray))


def lines(x, y, uniform):
    """Distance to the nearest of twelve random lines. x, y: of the pixels, in [0, 1]; so for the next two."""
    field = np.float32(9)
    for _ in range(12):
        angle = uniform(0, 2 * np.pi)
        across = (x - uniform(0, 1)) * np.cos(angle) + (y - uniform(0, 1)) * np.sin(angle)
        field = np.minimum(field, np.abs(across))
    return field


def circles(x, y, uniform):
    """Distance to the nearest of twelve random circles."""
    field = np.float32(9)
    for _ in range(12):
        r = np.hypot(x - uniform(-0.1, 1.1), y - uniform(-0.1, 1.1))
        field = np.minimum(field, np.abs(r - uniform(0.08, 0.2)))
    return field


def cells(x, y, uniform):
    """Walls between 24 random points: how much farther the second nearest is than the nearest."""
    nearest = second = np.float32(9)
    for _ in range(24):
        r = np.hypot(x - uniform(-0.1, 1.1), y - uniform(-0.1, 1.1))
        second = np.minimum(second, np.maximum(nearest, r))
        nearest = np.minimum(nearest, r)
    return second - nearest


def blobs(k, uniform):
    """The spectrum of smooth noise. k: frequencies, in periods a picture; so for the next one."""
    return np.exp(-(k / uniform(4, 5)) ** 2)


def labyrinth(k, uniform):
    """A ring of frequencies: stripes of one width in all directions."""
    return np.exp(-((k - uniform(3.5, 6)) / 1.2) ** 2)


LATTICES = {"dots": dots, "crosses": crosses, "triangles": triangles, "rings": rings, "stars": stars}
SCATTERED = {"lines": lines, "circles": circles, "cells": cells}
NOISES = {"blobs": blobs, "labyrinth": labyrinth}
BUILTIN_CLASSES = [*LATTICES, *SCATTERED, *NOISES]


def turned(x, y, angle):
    """Coordinates x, y in axes that are turned by an angle."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def random_field(name, m, size, rng):
    """m random fields of one class, (m, size, size), low inside its things."""
    def uniform(low, high):
        return rng.uniform(low, high, (m, 1, 1)).astype(np.float32)

    if name in NOISES:
        k = size * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
        white = np.fft.rfft2(rng.standard_normal((m, size, size), np.float32))
        return np.fft.irfft2(white * NOISES[name](k, uniform), s=(size, size))
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = pixel[None, None, :], pixel[None, :, None]
    if name in SCATTERED:
        return SCATTERED[name](x, y, uniform)
    angle, period = uniform(0, 2 * np.pi), uniform(0.24, 0.36)
    if name in ("rings", "stars"):                         # large enough to show what is in them
        period = 1.6 * period
    x, y = x - uniform(0, 1), y - uniform(0, 1)
    x, y = turned(x, y, angle)
    p, q = x / period, y / period              # (m, size, size)
    row, column = np.floor(p).astype(int), np.floor(q).astype(int)
    jitter = rng.uniform(0, 1, (3, m, 8, 8)).astype(np.float32)                # of each cell; it repeats
    down, across, turn = jitter[:, np.arange(m)[:, None, None], row % 8, column % 8]
    s, t = p - row - 0.38 - 0.24 * down, q - column - 0.38 - 0.24 * across
    return LATTICES[name](*turned(s, t, 2 * np.pi * turn))


def paint(field, rng, channels):
    """Fields (m, size, size) -> pictures (m, size, size, channels) uint8 of two colours.

    The share of each colour, the mean (gray) and the contrast are drawn alike for all classes: only structure
    tells them apart.
    """
    m = len(field)
    level = np.quantile(field, 0.4, axis=(1, 2), keepdims=True)                # 40 % of a picture is inside
    down, across = np.gradient(field, axis=(1, 2))
    slope = np.sqrt(down ** 2 + across ** 2 + 1e-6)                            # per pixel: edges are one wide
    shape = np.clip(0.5 + (field - level) / slope, 0, 1)
    shape = shape - shape.mean((1, 2), keepdims=True)
    contrast = rng.choice([-1, 1], (m, 1)) * rng.uniform(0.55, 0.75, (m, 1))
    tint = rng.uniform(-0.08, 0.08, (m, 3))
    x = 0.5 + shape[..., None] * (contrast + tint)[:, None, None, :]           # (m, size, size, 3)
    if channels == 1:
        x = x.mean(-1, keepdims=True)
    return to_uint8(x)


def builtin_pictures(n, size, channels, seed=0):
    """Ten textures of things at random places, angles and scales.

    Returns x (n, size, size, channels) uint8, labels (n,) and the names of the classes; the same for a seed.
    """
    rng = np.random.default_rng(seed)
    x = np.empty((n, size, size, channels), np.uint8)
    for label, name in enumerate(BUILTIN_CLASSES):
        rows = np.arange(label, n, len(BUILTIN_CLASSES))
        for first in range(0, len(rows), 500):                                 # memory: 500 at a time
            part = rows[first:first + 500]
            x[part] = paint(random_field(name, len(part), size, rng), rng, channels)
    return x, np.arange(n) % len(BUILTIN_CLASSES), BUILTIN_CLASSES


# Paper B's pictures, of known regularity (its Fig. 4, 5), by its authors' recipe

def synthetic_pictures(data, size, channels, n=20_000):
    """Pictures that are computed, not read: (x (n, size, size, channels) uint8, labels (n,), class names).

    data: None (the built-in ones), "disc" or "calpha:A". Raises UserError for an A that is not a positive
    number.
    """
    if data is None:
        return builtin_pictures(n, size, channels)
    rng, alpha = np.random.default_rng(0), data.partition(":")[2]
    if data == "disc":
        parts = [disc_pictures(500, size, rng) for _ in range(n // 500)]
    elif alpha.replace(".", "", 1).isdecimal() and 0 < float(alpha) < 100:
        parts = [calpha_pictures(500, size, rng, float(alpha)) for _ in range(n // 500)]
    else:
        raise UserError(f"--data {data}: the A of calpha:A must be a positive number, as in calpha:2")
    return np.repeat(np.concatenate(parts), channels, axis=-1), np.full(n, -1), []


def disc_pictures(m, size, rng):
    """Fig. 5: discs of five degrees of freedom (position 2, radius, two intensities).

    Returns (m, size, size, 1) uint8. The centre is anywhere in the picture, the radius 3 pixels to half the
    side.
    """
    across, down, ground, intensity = rng.uniform(0, 1, (4, m, 1, 1))
    radius = rng.uniform(min(3 / size, 0.5), 0.5, (m, 1, 1))
    return to_uint8(draw_disc(size, across, down, radius, ground, intensity))[..., None]


def draw_disc(size, x, y, radius, ground, intensity):
    """A disc on a ground, (1 or m, size, size); lengths in parts of the side, each a number or (m, 1, 1)."""
    pixel = (np.arange(size) + 0.5) / size
    r = np.hypot(pixel[None, None, :] - x, pixel[None, :, None] - y)
    inside = 1 / (1 + np.exp(-2 * size * (radius - r)))    # an edge two pixels wide: a smooth manifold
    return ground + (intensity - ground) * inside


def calpha_pictures(m, size, rng, alpha):
    """Fig. 4: two C^α regions with a C^α contour between them, (m, size, size, 1) uint8.

    Contour and regions have the spectrum |k|^−α. The lower region is stretched over [0, a], the other one
    over [b, 1], a and b random; the mask is averaged over 2×2 pixels.
    """
    middle, height = rng.uniform(0.3, 0.7, (m, 1)), rng.uniform(0.1, 0.3, (m, 1))
    shape = stretched(random_spectrum(m, 1, size + 1, rng, alpha))             # (m, size + 1)
    contour = middle + height * (shape - 0.5)
    pixel = (np.arange(size + 1) + 0.5) / size
    mask = (pixel[None, :, None] < contour[:, None, :]).astype(float)          # (m, size + 1, size + 1)
    mask = (mask[:, 1:] + mask[:, :-1]) / 2
    mask = (mask[:, :, 1:] + mask[:, :, :-1]) / 2
    low, high = rng.uniform(0, 1, (2, m, 1, 1))
    dark = low * stretched(random_spectrum(m, 2, size, rng, alpha))
    bright = high + (1 - high) * stretched(random_spectrum(m, 2, size, rng, alpha))
    x = bright + (dark - bright) * mask
    turned = rng.random((m, 1, 1)) < 0.5                   # contours of every orientation
    return to_uint8(np.where(turned, x.transpose(0, 2, 1), x))[..., None]


def random_spectrum(m, dimensions, size, rng, alpha):
    """m Gaussian fields (m, size, …) of amplitude |k|^−α. They are cut from twice the size: no period."""
    shape = (m, *[2 * size] * dimensions)
    axes = tuple(range(1, dimensions + 1))
    white = np.fft.rfftn(rng.standard_normal(shape), axes=axes)
    frequency = [np.fft.fftfreq(2 * size) * 2 * size] * (dimensions - 1) + [np.arange(size + 1)]
    k = np.sqrt(sum(np.square(f) for f in np.meshgrid(*frequency, indexing="ij")))
    field = np.fft.irfftn(white * np.maximum(k, 1) ** -alpha * (k > 0), s=shape[1:], axes=axes)
    return field[(slice(None), *[slice(size)] * dimensions)]


def stretched(field):
    """Fields (m, …), each stretched over [0, 1]."""
    axes = tuple(range(1, field.ndim))
    low, high = field.min(axes, keepdims=True), field.max(axes, keepdims=True)
    return (field - low) / (high - low)


# Command line

COMMON = dict(data=None, channels=3, levels=None, patches=False, val=0.05, seed=0, subset=None, limit=None,
              sigma_max=1.0, precision="auto", epochs=None, pictures=None)


def arguments():
    """The command line. Flags that define the run default to None: --resume must see which were given."""
    parser = Parser(description=__doc__, usage="python train.py [flags]")
    add, positive = parser.add_argument, number(float, 0)
    add_count = functools.partial(add, type=number(int, 1), metavar="N")
    add("--data", metavar="PATH", help="folder, .npy, .npz, disc, calpha:A (default: built-in)")
    add("--out", default="ckpt.pt", metavar="FILE", help="checkpoint to write (default: ckpt.pt)")
    add("--preset", choices=("small", "paper"), help="small: 32×32, an hour at most (default without CUDA)")
    add_count("--pictures", help="train on N, repeats counted (small: 300000)")
    add("--epochs", type=positive, metavar="N", help="times through them (paper: 1000)")
    add("--resume", action="store_true", help="go on with --out exactly where it was saved")
    add("--force", action="store_true", help="overwrite --out and what is beside it")
    add_count("--size", help="side in pixels (small: 32, paper: 64)")
    add("--channels", type=int, choices=(1, 3), help="gray or colour (default: 3)")
    add("--patches", action="store_true", default=None, help="cut pictures into size×size tiles")
    add_count("--width", help="channels of E1 (small: 16, paper: 64)")
    add_count("--levels", help="encoder blocks (default: M sees all)")
    add_count("--batch", help="pictures a step (small: 32, paper: 1024)")
    add("--seed", type=number(int, 0), metavar="N", help="of split, order, noise, weights")
    add("--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 where it is fast")
    add("--sigma-max", type=positive, metavar="σ", help="largest σ (default: 1)")
    add("--val", type=number(float, 0, 0.9), metavar="P", help="part held out (default: 0.05)")
    add("--subset", choices=("first", "second"), help="half of the training pictures (paper B)")
    add_count("--limit", help="at most N training pictures (paper B)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: the fastest)")
    add_count("--micro-batch", help="pictures at a time (default: what fits)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-every", type=positive, default=300, metavar="S", help="seconds between saves (default: 300)")
    return parser.parse_args()


def complete_settings(given, device, resume=None, path=""):
    """What defines a run: the flags given, then (resuming) the checkpoint's, else the preset's.

    given: a dict with None for what was not given. Raises UserError, naming the flag, for one that
    contradicts the checkpoint or another flag. The budget of a resumed run may be raised. A given budget
    replaces another.
    """
    chosen = {name: given[name] for name in COMMON | PAPER if given[name] is not None}
    if given["pictures"] and given["epochs"]:
        raise UserError("--pictures and --epochs: give one of them")
    if resume:
        settings = COMMON | resume["flags"]
        if chosen.get("precision") == "auto":
            del chosen["precision"]
        check_against(settings, given["preset"], chosen, path)
    else:
        settings = COMMON | preset(given, device)
    if given["pictures"] or given["epochs"]:
        settings |= dict(pictures=None, epochs=None)
    settings |= chosen
    if settings["precision"] == "auto":
        settings["precision"] = fast_precision(device)
    size = settings["size"]
    if settings["levels"] is None:
        settings["levels"] = next(n for n in range(1, 9) if receptive_field(n) >= min(size, 700))
    multiple = 2 ** settings["levels"]
    if size % multiple:
        raise UserError(f"--size {size}: must be a multiple of {multiple} (2^levels)")
    return settings


def preset(given, device):
    """The settings of the preset given; if none is, the paper's for pictures on a GPU, else the small one."""
    synthetic, name = is_synthetic(given["data"]), given["preset"]
    if name == "paper" or (name is None and device.type == "cuda" and not synthetic):
        settings = PAPER
    else:
        settings = SMALL
    if name is None and settings is SMALL:
        say("small preset: 32×32 pictures, width 16, batch 32. The paper's, --preset paper: 64×64, width 64, "
            "batch 1024, 1000 epochs, which is weeks without a GPU")
    if given["data"] and synthetic:            # discs and C^α pictures are gray
        return settings | dict(channels=1)
    return settings


def check_against(saved, preset_given, chosen, path):
    """Raises UserError if a flag contradicts the settings that a checkpoint was trained with."""
    if preset_given:
        raise UserError("--preset: a resumed run keeps its checkpoint's settings; leave it out")
    for name, value in chosen.items():
        if name == "data":                     # `prepare` compares the pictures themselves
            continue
        longer = name in ("pictures", "epochs") and (saved[name] or 0) <= value
        if value != saved[name] and not longer:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: contradicts {path}, trained with {saved[name]}; leave it out "
                            "to go on, or give another --out")


def fast_precision(device):
    """bf16 where the hardware multiplies in it, else fp32. What is judged is computed in fp32 everywhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return "bf16"
    return "fp32"


def join_processes(device):
    """Under torchrun: join the other processes."""
    if device.type == "mps":
        raise UserError("torchrun: processes cannot meet on mps; --device cpu, or start without torchrun")
    import torch.distributed.nn.functional     # noqa: F401; imported later, it keeps the group alive
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop_on_signal(signals):
    """Ctrl-C and SIGTERM append to the list `signals`: the run can save and end."""
    def on_signal(signal_number, _):
        if not signals:
            say("stopping after this step")
        signals.append(signal_number)
        if "RANK" not in os.environ:           # the second one kills; torchrun itself sends several
            signal.signal(signal_number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def check_out(out, resume, force, data):
    """Before the work: raises UserError if the checkpoint or a file beside it must not be written."""
    if not out.endswith(".pt"):
        raise UserError(f"--out {out or repr(out)}: the name must end in .pt")
    if os.path.exists(out) and not (resume or force):
        raise UserError(f"{out}: exists; --resume goes on with it, --force overwrites it, --out names "
                        "another")
    check_outputs([out], force or resume, data)
    for path in companions(out):
        written_by_us = False
        if resume and "run" in resume and os.path.isfile(path):
            written_by_us = resume["run"].encode() in Path(path).read_bytes()
        check_outputs([path], force or written_by_us, data)


def main():
    """The command line's work; returns the exit code."""
    given, resume, signals = arguments(), None, []
    out, device = given.out, choose_device(given.device)
    if "RANK" in os.environ:
        join_processes(device)
    if given.resume:
        _, resume = load_checkpoint(out)
        if "optimizer" not in resume:
            raise UserError(f"{out}: weights only, without Adam's state, which --resume needs")
    settings = complete_settings(vars(given), device, resume, out)
    check_out(out, resume, given.force, settings["data"])
    train(settings, out, device, resume, given.micro_batch, given.compile, given.save_every,
          stop_requested=lambda: bool(signals), on_start=lambda: stop_on_signal(signals))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    run(main)
