"""Train the blind denoiser on a folder of pictures (paper A: Eq. 1, App. A.2, A.3).

    python train.py                                        # built-in pictures, about 10 minutes on a laptop
    python train.py --data photos --size 32 --width 16 --batch 32 --pictures 300000     # yours, on a laptop
    python train.py --data photos                                                  # the paper's run, one GPU
    torchrun --nproc_per_node=8 train.py --data photos.npy                         # the same run on eight
    python train.py --resume                                                       # go on with ckpt.pt

It writes ckpt.pt, ckpt.jsonl (the curve) and ckpt.png (held-out pictures, denoised) at every evaluation.
"""
import functools
import hashlib
import io
import json
import math
import os
import shlex
import signal
import time
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from unet import (FORMAT, Parser, Progress, UNet, UserError, check_outputs, duration, load_checkpoint,
                  number, phi, printable, receptive_field, run, say, write)

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional          # imported later, by Adam, it keeps the process group alive
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn


# Eq. 1 and A.3, Training: noise, loss, step, rate, start

def noisy_batch(pictures_x, rows, step, seed, sigma_max, device):
    """The clean and noisy pictures of one global batch: x, y = x + σz (B, C, H, W), sigma (B, 1, 1, 1).

    A function of (seed, step) only, whatever the micro-batch, and on every process, which uses its share.
    """
    x = to_batch(pictures_x[rows], device)
    generator = seeded(device, seed, 1, step)
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=device)
    sigma = sigma_max * u ** 2                 # one a picture: p(σ) ∝ 1/√σ on [0, σ_max] (A.3)
    # drawn with the channels last, as x lies in memory; contiguous normals are several times faster to draw
    z = torch.randn(len(x), *x.shape[2:], x.shape[1], generator=generator, device=device).permute(0, 3, 1, 2)
    return x, torch.addcmul(x, sigma, z), sigma


def accumulate_gradient(model, x, y, batch, micro_batch, precision="fp32", stop=lambda done: False):
    """Add ∇ of Eq. 1, summed over pixels and averaged over `batch` pictures, micro-batch by micro-batch.

    x, y: (B, C, H, W), this process's share. Returns the loss of each picture (≤ B,) in the unit of pixels²;
    fewer than B if stop(pictures done) became true.
    """
    losses = [x.new_zeros(0)]
    for i in range(0, len(x), micro_batch):
        if stop(i):
            break
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            x_hat = model(y[i:i + micro_batch])
        loss = (x_hat.float() - x[i:i + micro_batch]).square().sum((1, 2, 3))      # ‖x − x̂(x_σ)‖², Eq. 1
        (loss.sum() / batch).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def training_step(model, optimizer, x, y, batch, micro_batch, skips_closed=False, **options):
    """One step of Adam on Eq. 1, the same on all processes: its loss (a picture's mean, in pixels²).

    x, y: this process's share of the batch. None, and no step, if `stop` cut it short. options: as above.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradient(model, x, y, batch, micro_batch, **options)
    total, cut = over_processes([loss.sum().item(), len(loss) < len(x)], x.device)
    if cut:
        return None
    for p in model.parameters() if dist.is_initialized() else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad             # a share may be empty
        dist.all_reduce(p.grad)
    centralise(model)
    for gradient in skip_weights(model, gradients=True) if skips_closed else ():
        gradient.zero_()
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


def skip_weights(model, gradients=False):
    """The decoder's weights on the skips, or their gradients, [(d, d, 3, 3)]: views, for changes in place.

    The first layer of D_k, (d, 2d, 3, 3), sees the skip in its input channels 0 … d−1, what comes from M in
    the others.
    """
    first = [model.blocks[f"D{k}"][0].weight for k in range(1, model.levels + 1)]
    return [(weight.grad if gradients else weight)[:, :len(weight)] for weight in first]


def warm_up(epochs=None):
    """The part of a run in which Adam's step grows and the skips are closed: a tenth; of the paper's, 1 %."""
    return 0.01 if (epochs or 0) >= 1000 else 0.1


def learning_rate(fraction, epochs=None):
    """Adam's step size after a fraction of the run; during the warm-up it grows from a thousandth of that.

    A.3, for runs of its 1000 epochs or more: 1e-3, halved every tenth. Shorter runs, which that would starve:
    1e-3 falling linearly to 0 at the end. epochs: the length of the run, None if only its minutes are known.
    """
    rate = 1e-3 * min(1, fraction / warm_up(epochs) + 1e-3)
    if (epochs or 0) >= 1000:
        return rate * 0.5 ** min(9, int(10 * fraction))
    return rate * max(0, 1 - fraction)


@torch.no_grad()
def initialise(model, y, mean):
    """The start of the network, in place: one data-dependent pass, skips at 0, and x̂ at the mean colour.

    y: (N, C, H, W), noisy: each channel of each LayerNorm and of each up-convolution gets mean 0 and variance
    1 over it. mean: (C,). With PyTorch's own start all channels of M are almost alike, and φ is a constant.
    The decoder's weights on the skips stay at 0 during the warm-up: the network can then denoise only through
    M and learns to put the picture's gist there; with open skips it does so far less (README: use of M). The
    output starts at the mean colour because Adam remembers the size of the first gradients for a thousand
    steps: 300 steps of 32 photos then gave 21.9 dB at σ = 0.1, and 19.8 dB without.
    """
    def whiten(module, inputs, out):           # a forward hook: what it returns is the module's output
        scale, mu = 1 / out.std((0, 2, 3)).clamp_min(1e-3), out.mean((0, 2, 3))
        module.weight.mul_(scale if module.weight.ndim == 1 else scale.view(1, -1, 1, 1))
        module.bias.copy_((module.bias - mu) * scale)
        return module.forward(*inputs) if isinstance(module, nn.GroupNorm) else (
            (out - mu.view(-1, 1, 1)) * scale.view(-1, 1, 1))

    for weight in skip_weights(model):
        weight.zero_()
    hooks = [module.register_forward_hook(whiten) for module in model.modules()
             if isinstance(module, (nn.GroupNorm, nn.ConvTranspose2d))]
    model(y)
    for hook in hooks:
        hook.remove()
    last = model.blocks["D1"][-1]
    last.weight.zero_()
    last.bias.copy_(torch.as_tensor(mean))


# Training: the loop

def train(flags, out, device="cpu", resume=None, micro_batch=None, compiled=False, save_every=None,
          stop=lambda: False, ready=lambda: None):
    """Minimise Eq. 1 as A.3 does; writes `out`, its .jsonl and its .png. Returns True if the run is complete.

    flags: what defines the run, as `complete_flags` returns it. resume: a checkpoint's dict to go on from.
    save_every: seconds between evaluations, each with a save. stop: asked between micro-batches; the run then
    saves and returns. ready: called once the pictures are read. Raises UserError for unusable data, a loss
    that is not finite, and a checkpoint that cannot be written.
    """
    run = Run(flags, out, torch.device(device), resume, micro_batch, compiled)
    ready()
    describe(run)
    stopped, losses, saved_at, failure = False, [], time.monotonic(), None
    while run.fraction() < 1 and not stopped:
        x, y = run.next_batch()
        loss = training_step(run.model, run.optimizer, x, y, flags["batch"], run.micro,
                             skips_closed=run.skips_closed(), precision=flags["precision"],
                             stop=lambda done: run.show(done) or stop() or run.seconds() >= run.limit)
        if loss is not None:                   # a step cut short is dropped, and done again on --resume
            if not math.isfinite(loss):
                raise UserError(f"step {run.step}: the loss is not finite; the last save of {out} is as it "
                                "was. Try another --seed or fp32")
            run.step += 1
            losses.append(loss)
        # all processes take the latest clock for theirs, and stop if one of them is to
        run.clock, stopped = over_processes([run.seconds(), bool(stop())], run.device, dist.ReduceOp.MAX)
        run.began = time.monotonic() - run.clock
        every = save_every or min(300, max(30, (run.clock + run.progress.left(run.fraction())) / 12))
        begun = run.step > run.first           # a run stopped before its first step leaves all as it was
        if run.fraction() >= 1 or begun and (stopped or time.monotonic() - saved_at > every):
            failure = run.save(losses, measured=not stopped)         # Ctrl-C and SIGTERM save at once
            losses, saved_at = [], time.monotonic()
    if failure:
        raise failure
    return conclude(run)


class Run:
    """A training run: its network, optimiser, pictures and budget, and how far it has come.

    step: steps of Adam done; seconds(): time spent, over all sessions; clock: the same after the last step,
    as all processes know it; fraction(): of the budget, by step and clock, in [0, 1].
    """

    def __init__(self, flags, out, device, resume, micro_batch, compiled):
        self.flags, self.out, self.device, seed = flags, out, device, flags["seed"]
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.pictures, self.rows, held_out = training_data(flags)
        if resume and resume["fingerprint"] != self.pictures.fingerprint:
            raise UserError(f"--data {flags['data']}: these are not the pictures that {out} was trained on; "
                            "were some added (a .png of ours?) or removed?")
        self.held_out = np.random.default_rng((seed, 4)).permutation(held_out)
        self.mean = (self.pictures.x[self.rows[:10_000]].mean((0, 1, 2)) / 255).tolist()  # the mean colour m
        torch.manual_seed(seed)                # the same weights on every process
        self.model, self.optimizer = new_network(flags, device)
        self.step, elapsed, self.summary, self.curve = 0, 0.0, {}, []
        if resume:
            self.step, elapsed, self.summary = resume["step"], resume["elapsed"], resume["training"]
            self.curve = list(resume.get("curve", []))
            self.model.load_state_dict(resume["weights"])
            self.optimizer.load_state_dict(resume["optimizer"])
        else:
            first = batch_rows(self.rows, 0, min(flags["batch"], 64), seed)
            _, y, _ = noisy_batch(self.pictures.x, first, 0, seed, flags["sigma_max"], device)
            initialise(self.model, y, self.mean)
            several = len(self.pictures.classes) > 1
            self.summary["agreement_untrained"] = self.code_quality()["agreement"] if several else None
        for p in self.model.parameters() if self.world > 1 else ():
            dist.broadcast(p.data, 0)
        if compiled:
            self.model.compile()
        self.micro = min(flags["batch"], micro_batch or fitting_micro_batch(flags, device))
        budgets = flags["pictures"], flags["epochs"] and flags["epochs"] * len(self.rows)
        self.total = min((math.ceil(n / flags["batch"]) for n in budgets if n), default=math.inf)
        self.limit = 60 * (flags["minutes"] or math.inf)   # it may end the run first: epochs are not known
        self.epochs = None if flags["minutes"] else self.total * flags["batch"] / len(self.rows)
        self.began, self.clock = time.monotonic() - elapsed, elapsed
        self.first, self.progress = self.step, Progress(self.fraction())

    def seconds(self):
        return time.monotonic() - self.began

    def fraction(self, part=0, clock=None):
        return min(1.0, max((self.step + part) / self.total, (clock or self.clock) / self.limit))

    def rate(self):
        """Pictures a second, of this session."""
        return (self.step - self.first) * self.flags["batch"] / (time.monotonic() - self.progress.start)

    def skips_closed(self):
        """During the warm-up; once open, they stay so, also when a run is lengthened."""
        opened = any(weight.any() for weight in skip_weights(self.model))
        return not opened and self.fraction() < warm_up(self.epochs)

    def next_batch(self):
        """x, y of this process's share of the next batch; Adam's rate is set for it."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.fraction(), self.epochs)
        batch, seed, sigma_max = (self.flags[k] for k in ("batch", "seed", "sigma_max"))
        rows = batch_rows(self.rows, self.step, batch, seed)
        share = slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)
        x, y, _ = noisy_batch(self.pictures.x, rows, self.step, seed, sigma_max, self.device)
        return x[share], y[share]

    def show(self, done):
        """Status line after `done` of this process's share of a step."""
        found, text = self.summary, f"{self.rate():.0f}/s"
        if "psnr" in found:
            psnr = " ".join(f"{v:.1f}" for sigma, v in found["psnr"].items() if sigma in (0.1, 0.5))
            text += f"  PSNR {psnr} dB  use of M {found['use'][0.5]:.2f} dB  cos φ {found['cosine']:.2f}"
        self.progress(self.fraction(done / self.flags["batch"] * self.world, self.seconds()), text)

    def code_quality(self):
        """`variety` and class agreement, of training pictures too: few held-out *files* make many tiles."""
        rows = np.concatenate([self.held_out[:500], self.rows[epoch_order(len(self.rows), 0, 0)[:1000]]])
        v = fixed_phi(self.model, to_batch(self.pictures.x[rows], self.device), 2)
        share = float(own_class(v, self.pictures.labels[rows]).mean())
        return dict(variety(v), agreement=None if math.isnan(share) else share)

    def measure(self):
        """Held-out PSNR, the use of M, and what φ is worth: a dict for the curve."""
        x = to_batch(self.pictures.x[self.held_out[:256]], self.device)
        psnr = evaluate(self.model, x, self.micro, self.flags["sigma_max"], self.flags["precision"])
        between = torch.pdist(fixed_phi(self.model, x[:64]).cpu())
        return dict(psnr=psnr, use=use_of_M(self.model, x[:128], micro_batch=self.micro),
                    **self.code_quality(),
                    phi_distance=float(between.mean()) if len(between) else None)

    def save(self, losses, measured=True):
        """Write the checkpoint, the curve and the picture; with `measured`, evaluate first.

        Returns the UserError, already said, if they cannot be written: there may be room next time.
        """
        if self.rank:
            return None
        model, flags, seen = self.model, self.flags, self.step * self.flags["batch"]
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"the weights are not finite after step {self.step}; {self.out} is as it was")
        self.summary = self.summary | (self.measure() if measured else {}) | dict(
            step=self.step, epoch=seen / len(self.rows), pictures_seen=seen,
            loss=float(np.mean(losses)) if losses else None, lr=self.optimizer.param_groups[0]["lr"],
            minutes=self.seconds() / 60, images_per_second=self.rate(),
            training_pictures=len(self.rows), device=str(self.device))
        self.curve += [self.summary] if measured else []
        buffer = io.BytesIO()                  # torch's own writer hides why a disk refused it
        torch.save(dict(
            format=FORMAT, model={k: flags[k] for k in ("width", "channels", "levels")}, mean=self.mean,
            weights=model.state_dict(), optimizer=self.optimizer.state_dict(), size=flags["size"],
            sigma_max=flags["sigma_max"], flags=flags, step=self.step, elapsed=self.seconds(),
            fingerprint=self.pictures.fingerprint, training=self.summary, curve=self.curve), buffer)
        try:
            with write(self.out) as file:
                file.write(buffer.getbuffer())
            with write(self.out[:-3] + ".jsonl") as file:
                file.write("".join(json.dumps(record) + "\n" for record in self.curve).encode())
            if measured:
                x = to_batch(self.pictures.x[self.held_out[:8]], self.device)
                with write(self.out[:-3] + ".png") as file:
                    draw_evaluation(model, x, self.curve).save(file, "png")
        except UserError as error:
            say(str(error))
            return error


def describe(run):
    """Say at the start what will be done, with what."""
    flags, sees, skipped = run.flags, receptive_field(run.model.levels), run.pictures.skipped
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    budget = " or ".join(f"{flags[name]:,.10g} {name}" for name in BUDGETS if flags[name])
    say(f"device        {run.device}, {run.world} process{'es' * (run.world > 1)}, {flags['precision']}")
    say(f"network       width {flags['width']}, {flags['levels']} levels, {parameters:.2f} M parameters; M "
        f"sees {sees}×{sees} pixels" + ", not the picture: φ will be local" * (sees < flags["size"]))
    say(f"pictures      {len(run.rows)} to train on, {len(run.held_out)} held out, {flags['size']}×"
        f"{flags['size']}×{flags['channels']}, {len(run.pictures.classes)} classes")
    if skipped:
        say(f"skipped       {len(skipped)} files: {'; '.join(skipped[:3])}")
    say(f"run           {budget}, batch {flags['batch']} in micro-batches of {run.micro}"
        + f", resumed at step {run.step}" * bool(run.step))


def conclude(run):
    """Say at the end how it went and what comes next; True if the run is complete."""
    complete, found, out = run.fraction() >= 1, run.summary, shlex.quote(run.out)
    done = f"{run.step} steps, {run.step * run.flags['batch']:,} pictures, {duration(run.seconds())}"
    if run.step == run.first:
        say(f"{out}: already complete ({done}); a larger --pictures, --epochs or --minutes makes it longer"
            if complete else "stopped before the first step; nothing was written")
        return complete
    say(f"{'complete' if complete else 'stopped'} after {done}")
    if "psnr" in found:
        psnr, use = (", ".join(f"{v:.2f} dB (σ {s:g})" for s, v in found[k].items()) for k in ("psnr", "use"))
        say(f"held-out PSNR {psnr}")
        say(f"use of M      {use}; cosine of φ between pictures {found['cosine']:.2f}, "
            f"{found['silent']} channels silent")
        if found["agreement"] is not None:
            say(f"class agreement {found['agreement']:.2f}, untrained {found['agreement_untrained']:.2f}")
    say(f"wrote {run.out}, .jsonl{' and .png' * ('psnr' in found)} beside it; " + (
        f"next: python sample.py {out}; python analyze.py {out}" if complete else
        f"go on with: python train.py --out {out} --resume"))
    return complete


def new_network(flags, device):
    """A network for these flags, and its optimiser."""
    model = UNet(flags["width"], flags["channels"], flags["levels"]).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=device.type in ("cpu", "cuda"))


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The seeded permutation of 0 … n−1 in which an epoch visits the training pictures."""
    return np.random.default_rng((seed, 2, epoch)).permutation(n)


def batch_rows(train, step, batch, seed):
    """Rows of global batch `step`: epochs laid end to end and cut: every picture counts equally."""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), len(train))
    return np.concatenate([train[epoch_order(len(train), seed, epoch)[places[epochs == epoch]]]
                           for epoch in np.unique(epochs).tolist()])


def seeded(device, *words):
    """A torch.Generator on `device` for these integers: no noise depends on what was drawn before."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def over_processes(numbers, device, op=dist.ReduceOp.SUM):
    """A few numbers, summed (or by `op`) over all processes, so that all of them decide alike."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def fitting_micro_batch(flags, device):
    """Pictures whose activations fit: 256 MiB on a CPU (more is no faster), half of a GPU's free memory."""
    width, levels, size = flags["width"], flags["levels"], flags["size"]
    # per level 8 layers, each kept before and after its normalisation, and three maps' worth of concatenation
    layers = sum(19 * width * 2 ** k * (size // 2 ** k) ** 2 for k in range(levels))
    layers += 6 * width * 2 ** levels * (size // 2 ** levels) ** 2
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 ** 28
    return max(1, room // (4 * layers))


# Evaluation, on held-out pictures: is it learning, and through M?

SIGMAS = 0.05, 0.1, 0.2, 0.3, 0.5, 1.0         # noise levels of the evaluation


@torch.no_grad()
def evaluate(model, x, micro_batch=128, sigma_max=1.0, precision="fp32", sigmas=SIGMAS, swap_M=False):
    """Held-out PSNR at each σ ≤ sigma_max, {σ: 10 log₁₀(1 / mean squared error of x̂(x + σz)), in dB}.

    x: (N, C, H, W); z is always the same. swap_M: M-maps are those of the picture before.
    """
    psnr = {}
    for sigma in [s for s in sigmas if s <= sigma_max] or [sigma_max]:
        z = torch.randn(x.shape, generator=seeded(x.device, 3, round(1000 * sigma)), device=x.device)
        y, error = x + sigma * z, 0.0
        for clean, noisy, before in zip(*(v.split(micro_batch) for v in (x, y, y.roll(1, 0)))):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                maps, skips = model.encode(noisy)
                x_hat = model.decode(model.encode(before)[0] if swap_M else maps, skips)
            error += (x_hat.float() - clean).square().sum().item()
        psnr[sigma] = -10 * math.log10(max(error, 1e-30) / x.numel())
    return psnr


def input_psnr(sigmas):
    """PSNR of the noisy pictures at each σ, in dB, an array."""
    return -20 * np.log10(sigmas)


def use_of_M(model, x, sigmas=(0.1, 0.3, 0.5, 1.0), **options):
    """{σ: dB of PSNR lost when every picture's M-maps are another picture's}, for x (N, C, H, W).

    0: the decoder does not listen to M, and φ, whatever it says about pictures, is not what denoises them.
    """
    own, swapped = (evaluate(model, x, sigmas=sigmas, swap_M=swap, **options) for swap in (False, True))
    return {sigma: own[sigma] - swapped[sigma] for sigma in own}


def fixed_phi(model, x, draws=20):
    """φ at σ = 0.3, (N, d), always with the same noise: what distances between pictures are measured in."""
    return torch.cat([phi(model, part, 0.3, draws, seeded(x.device, 77, i))
                      for i, part in enumerate(x.split(256))])


def variety(code):
    """Does φ vary? dict(cosine, the mean between two pictures; silent: channels 0 for all); code: (N, d)."""
    u, n = F.normalize(code, dim=1), len(code)
    cosine = (u.sum(0).square().sum() - u.square().sum()) / max(1, n * (n - 1))
    return dict(cosine=float(cosine), silent=int((code.amax(0) <= 1e-6).sum()))


def aliveness(model, x):
    """Is φ a code that the denoiser uses? dict(use of M {σ: dB}, cosine, silent), for x (N, C, H, W)."""
    return dict(use=use_of_M(model, x), **variety(fixed_phi(model, x, 4)))


def nearest(code, queries, k):
    """Indices (q, k) of the k rows of code (n, d) nearest to its rows `queries` by cosine, nearest first."""
    unit = F.normalize(code, dim=1)
    cosine = unit[queries] @ unit.T
    cosine[torch.arange(len(queries)), torch.as_tensor(queries)] = -2          # not itself
    return cosine.topk(min(k, len(code) - 1), dim=1).indices.cpu().numpy()


def own_class(code, labels, k=10):
    """Share of the k nearest that are of a picture's own class, a value for each that has one, or one NaN.

    code: (N, d); labels: (N,), −1 for no class.
    """
    code, labels = code[labels >= 0], labels[labels >= 0]
    if len(set(labels)) < 2:
        return np.array([math.nan])
    return (labels[nearest(code, np.arange(len(labels)), k)] == labels[:, None]).mean(1)


# A.2, Pictures

EXTENSIONS = set(".jpg .jpeg .png .bmp .gif .tif .tiff .webp .ppm .pgm .jp2 .avif".split())


class Pictures(NamedTuple):
    """A data set, decoded once. Everything but `x` is small."""
    x: np.ndarray           # (N, H, W, C) uint8
    paths: list             # N names: the file, and the row or tile in it
    labels: np.ndarray      # (N,) index into `classes`, −1 for none; never used in training
    classes: list           # names of the sub-folders; with tiles and no sub-folders, of the pictures
    groups: np.ndarray      # (N,) pictures of one group stay on one side of every split
    skipped: list           # "file: reason" for each file that could not be used
    fingerprint: str        # hash of the pictures, whatever their order


def load_pictures(data=None, size=64, channels=3, patches=False):
    """Read a data set: a folder, a .npy/.npz file, "disc", "calpha:A", or None for the built-in pictures.

    x is (N, size, size, channels). UserError if nothing is usable.
    """
    if is_synthetic(data):
        x, labels, classes = builtin_pictures(20_000, size, channels, data)
        paths, source, skipped = [f"{data or 'built-in'}#{i}" for i in range(len(x))], np.arange(len(x)), []
    else:
        parts, counts, names, kinds, skipped = deque(), [], [], [], []
        for items, item_names, item_kinds in read(data):
            for tiles, count, unusable in decode_pictures(items, item_names, size, channels, patches):
                parts.append(tiles)
                counts += count
                skipped += unusable
            names, kinds = names + item_names, kinds + item_kinds
        source, row = np.repeat(np.arange(len(names)), counts), 0
        x = parts.pop() if len(parts) == 1 else np.empty((len(source), size, size, channels), np.uint8)
        while parts:                           # each freed once it is copied: the data are never there twice
            x[row:row + len(parts[0])] = parts[0]
            row += len(parts.popleft())
        if not len(x):
            raise UserError(f"--data {data}: none of its {len(skipped)} pictures could be used, for instance "
                            + "; ".join(skipped[:3]))
        if patches and not any(kinds):
            kinds = [Path(name).stem for name in names]
        classes = sorted(set(kinds) - {None}, key=lambda c: (len(c) * c.isdigit(), c))     # "10" after "9"
        number_of = {name: k for k, name in enumerate(classes)} | {None: -1}
        labels = np.array([number_of[k] for k in kinds])[source]
        tile = np.arange(len(x)) - np.searchsorted(source, source)
        paths = [names[s] + f"#{t}" * patches for s, t in zip(source, tile)]
    digests, constant = zip(*((digest(picture), (picture == picture[0, 0]).all()) for picture in x))
    hashes = np.frombuffer(b"".join(digests), np.uint64)
    groups = join_groups(source, hashes, np.array(constant))
    return Pictures(x, paths, labels, classes, groups, skipped, digest(np.sort(hashes)).hex())


def digest(array):
    """A hash of 8 bytes."""
    return hashlib.blake2b(array.tobytes(), digest_size=8).digest()


def is_synthetic(data):
    """Does --data name pictures that are computed, not read?"""
    return data is None or data == "disc" or data.startswith("calpha:")


def read(data):
    """Yields (pictures, their names, their classes or None): of a folder the files, else arrays (N, H, W, C).

    The arrays: of a .npy, a .npz, or each .npz in a folder. A .npz's pictures are its `data`, or its first
    uint8 array, the classes its `labels`.
    """
    if not os.path.exists(data):
        raise UserError(f"--data {data}: no such file or folder")
    if files := list_files(data, EXTENSIONS):
        inside = [Path(f).relative_to(data).parts[:-1] for f in files]
        yield files, files, [p[0] if p else None for p in inside]              # class: the first sub-folder
        return
    files = list_files(data, {".npz"}) if os.path.isdir(data) else [data]
    if not files or not files[0].lower().endswith((".npy", ".npz")):
        raise UserError(f"--data {data}: looked for a folder with pictures ({' '.join(sorted(EXTENSIONS))}, "
                        f"at any depth) or .npz batches, or one .npy or .npz file; found none")
    for path in files:
        try:
            file = np.load(path, mmap_mode="r", allow_pickle=False)
            found = {"data": file} if isinstance(file, np.ndarray) else dict(file)
        except Exception as error:             # numpy and zipfile raise nearly anything for a damaged file
            raise UserError(f"{path}: not a whole {path[-4:]} file ({error})") from None
        x, labels = found.get("data"), found.get("labels")
        if x is None:
            x = next((a for a in found.values() if a.dtype == np.uint8 and a.ndim > 1), np.zeros(0))
        side = math.isqrt(x.shape[1] // 3) if x.ndim == 2 else 0
        if side and x.shape[1] == 3 * side * side:         # ImageNet64: all red, all green, all blue
            x = x.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        x = x[..., None] if x.ndim == 3 else x
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or not x.size:
            raise UserError(f"{path}: pictures must be uint8 of shape (N, H, W), (N, H, W, 1), (N, H, W, 3) "
                            f"or (N, 3·side²); this is {x.dtype} {x.shape}")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(x),)):
            raise UserError(f"{path}: labels must be {len(x)} integers, not {labels.dtype} {labels.shape}")
        kinds = [None] * len(x) if labels is None else [str(v) if v >= 0 else None for v in labels]
        yield x, [f"{path}#{i}" for i in range(len(x))], kinds


def decode_pictures(items, names, size, channels, patches):
    """Files, or arrays (H, W, C), in parallel; yields (x, how many come from each item, ["name: reason"])."""
    if isinstance(items, np.ndarray) and items.shape[1:] == (size, size, channels):
        yield items, [1] * len(items), []      # a .npy stays on the disk
        return

    def some(block):
        tiles, skipped = [], []
        for item, name in zip(items[block], names[block]):
            try:
                with (Image.open(item) if isinstance(item, str) else
                      Image.fromarray(np.repeat(item, 3 // item.shape[2], 2))) as image:
                    tiles.append(to_pixels(image, size, channels, patches))
            except Exception as error:         # damaged files raise nearly anything, by format
                tiles.append(np.empty((0, size, size, channels), np.uint8))
                skipped.append(f"{name}: {error}")
        return np.concatenate(tiles), list(map(len, tiles)), skipped

    blocks, progress = [slice(i, i + 64) for i in range(0, len(items), 64)], Progress()
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for k, found in enumerate(pool.map(some, blocks)):
            yield found
            progress((k + 1) / len(blocks), "reading pictures")


def list_files(folder, extensions):
    """All files below a folder with one of the extensions in any case, sorted; links are followed once."""
    def unreadable(error):
        if isinstance(error, PermissionError):             # a whole class may lie there
            raise UserError(f"--data {folder}: {error.filename} cannot be read") from None

    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(folders)         # a link may lead back up
        if real not in seen:
            found += [os.path.join(root, f) for f in files if os.path.splitext(f)[1].lower() in extensions]
        seen.add(real)
    return sorted(found)


def load_picture(path, size=None, channels=3, patches=False):
    """One picture file -> (H, W, channels) uint8: as in training if `size` is given, else at full resolution.

    With `patches` the central tile. UserError if it cannot be read as a picture, or is smaller than a tile.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if not size:
                return np.atleast_3d(flatten(image, channels))
            if patches and min(image.size) >= size:
                image = flatten(image, channels)
                left, top = ((side - size) // 2 for side in image.size)
                image = image.crop((left, top, left + size, top + size))
            return to_pixels(image, size, channels, patches)[0]
    except Exception as error:                 # damaged files raise nearly anything, by format
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


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
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):             # 16-bit gray; convert("L") would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


def to_batch(x, device):
    """(B, H, W, C) uint8 -> (B, C, H, W) float in [0, 1] on `device`, channels-last in memory."""
    return torch.from_numpy(np.array(x, order="C")).to(device).permute(0, 3, 1, 2).float().div_(255)


def to_uint8(x):
    """[0, 1] -> 0 … 255, rounded."""
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def join_groups(source, hashes, constant):
    """Group of every picture (N,): those cut from one file, and exact duplicates, share one, transitively.

    source: index of the file; hashes: uint64; constant: bool, blank tiles join no files. A group is named by
    its smallest hash: that depends on the pictures alone, not on their names or order.
    """
    hashes = hashes.copy()
    for h in np.unique(hashes[constant]):                  # each blank one gets a hash of its own
        same = np.flatnonzero(hashes == h)
        hashes[same] += np.arange(len(same), dtype=np.uint64)
    groups, before, copies = hashes, None, np.unique(hashes, return_inverse=True)[1]
    while not np.array_equal(groups, before):
        before = groups
        for kind in source, copies:
            smallest = np.full(kind.max() + 1, np.uint64(2 ** 64 - 1))
            np.minimum.at(smallest, kind, groups)
            groups = smallest[kind]
    return groups


def split(pictures, val=0.05, seed=0):
    """Seeded split into (training, held-out) indices, 1 to 2,000; depends on the pictures and the seed alone.

    No group (tiles of one picture, exact duplicates) has members on both sides, and one larger than what is
    to be held out stays in training. Raises UserError if that leaves none.
    """
    members = group_members(pictures.groups, np.arange(len(pictures.x)), seed)
    room = min(max(1, round(val * len(pictures.x))), 2000, len(pictures.x) - 1)
    held_out, train = [], []
    for group in members if len(members) > 1 else ():
        fits = len(group) <= room
        (held_out if fits else train).append(group)
        room -= len(group) * fits
    if train and not held_out:                 # every group is larger than asked for: the smallest one, then
        held_out.append(train.pop(min(range(len(train)), key=lambda g: len(train[g]))))
    if not train:
        raise UserError("only one distinct picture: nothing to hold out (tiles of one picture stay together)")
    return np.concatenate(train), np.concatenate(held_out)


def group_members(groups, index, seed):
    """The rows `index`, an array a group, in an order drawn from the seed and the pictures alone."""
    order = np.argsort(groups[index], kind="stable")
    ids, start = np.unique(groups[index][order], return_index=True)
    members = np.split(index[order], start[1:])
    return [members[i] for i in np.random.default_rng(seed).permutation(len(ids))]


def training_part(pictures, train, subset=None, limit=None, seed=0):
    """Paper B's training sets: one half of the training rows (no group in both), at most `limit` of them.

    A smaller limit's are among a larger one's. UserError if nothing is left.
    """
    members = group_members(pictures.groups, train, seed)
    if subset:
        half = np.argmin(abs(np.cumsum([len(m) for m in members]) - len(train) / 2)) + 1
        members = members[:half] if subset == "first" else members[half:]
    if not members:
        raise UserError(f"--subset {subset}: too few distinct pictures for two halves")
    return np.concatenate(members)[:limit]


def training_data(flags):
    """(Pictures, training rows, held-out rows) for the flags of a run. Errors: as `load_pictures`."""
    pictures = load_pictures(flags["data"], flags["size"], flags["channels"], flags["patches"])
    rows, held_out = split(pictures, flags["val"], flags["seed"])
    return pictures, training_part(pictures, rows, flags["subset"], flags["limit"], flags["seed"]), held_out


# Built-in pictures, for a machine without any

LATTICES = ["dots", "crosses", "triangles", "sticks", "rings", "stars", "parquet"]
BUILTIN_CLASSES = [*LATTICES, "lines", "circles", "cells", "mosaic", "dead leaves", "blobs", "labyrinth",
                   "grain"]


def builtin_pictures(n, size, channels, family=None, seed=0):
    """Deterministic synthetic pictures: (x (n, size, size, channels) uint8, labels (n,), class names).

    family None: fifteen textures of things at random places, angles and scales. Their two colours, the share
    of each, the mean (gray) and the contrast are drawn alike for all classes: only structure differs.
    "disc" and "calpha:A": paper B's Fig. 5 and 4. Raises UserError for an A that is not a positive number.
    """
    rng = np.random.default_rng(seed)
    if family:
        alpha = family.partition(":")[2]
        if family != "disc" and not (alpha.replace(".", "", 1).isdecimal() and 0 < float(alpha) < 100):
            raise UserError(f"--data {family}: the A of calpha:A must be a positive number, as in calpha:2")
        draw, more = (calpha_pictures, [float(alpha)]) if alpha else (disc_pictures, [])
        x = np.concatenate([draw(min(500, n - i), size, rng, *more) for i in range(0, n, 500)])
        return np.repeat(x, channels, axis=-1), np.full(n, -1), []
    k = len(BUILTIN_CLASSES)
    x = np.empty((n, size, size, channels), np.uint8)
    for c, name in enumerate(BUILTIN_CLASSES[:n]):
        m = len(range(c, n, k))
        f = (lattice if name in LATTICES else field)(name, m, size, rng)
        level = np.sort(f.reshape(m, -1), axis=1)[:, int(0.4 * size ** 2)].reshape(m, 1, 1)
        down, right = np.gradient(f, axis=(1, 2))          # per pixel: edges are one pixel wide
        f = np.clip(0.5 + (f - level) / np.sqrt(down ** 2 + right ** 2 + 1e-6), 0, 1)      # 40 % of it are 0
        contrast = rng.choice([-1, 1], (m, 1)) * rng.uniform(0.55, 0.75, (m, 1))
        contrast = contrast + rng.uniform(-0.08, 0.08, (m, 3))             # a tint
        f -= f.mean((1, 2), keepdims=True)
        rgb = 0.5 + f[..., None] * contrast[:, None, None].astype(np.float32)
        x[c::k] = to_uint8(rgb if channels == 3 else rgb.mean(-1, keepdims=True))
    return x, np.arange(n) % k, BUILTIN_CLASSES


def field(name, m, size, rng):
    """m random fields of one class, (m, size, size), low inside its things. Lengths: parts of the side."""
    u = lambda low, high: rng.uniform(low, high, (m, 1, 1)).astype(np.float32)
    if name in ("blobs", "labyrinth", "grain"):            # noise with a disc or a ring of frequencies
        k = size * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).astype(np.float32)
        middle, width = {"blobs": (0, u(4, 5)), "labyrinth": (u(3.5, 6), 1.2), "grain": (0, u(11, 16))}[name]
        white = np.fft.rfft2(rng.standard_normal((m, size, size), np.float32))
        noise = np.fft.irfft2(white * np.exp(-((k - middle) / width) ** 2), s=(size, size))
        return noise / noise.std((1, 2), keepdims=True)
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, None, :]      # the pixels' centres
    y = x.transpose(0, 2, 1)
    from_point = lambda: np.sqrt((x - u(-0.1, 1.1)) ** 2 + (y - u(-0.1, 1.1)) ** 2)
    f = second = np.full((m, size, size), 9, np.float32)
    for _ in range({"lines": 12, "circles": 12, "dead leaves": 30, "cells": 24, "mosaic": 30}[name]):
        if name == "lines":                                # distance to the nearest of random lines
            angle = u(0, 2 * np.pi)
            f = np.minimum(f, np.abs((x - u(0, 1)) * np.cos(angle) + (y - u(0, 1)) * np.sin(angle)))
        elif name == "circles":
            f = np.minimum(f, np.abs(from_point() - u(0.08, 0.2)))
        elif name == "dead leaves":                        # dark and light discs, each over the earlier ones
            f = np.maximum(np.minimum(f, from_point() - u(0.05, 0.12)), u(0.05, 0.12) - from_point())
        elif name == "cells":                              # walls between the nearest two of random points
            d = from_point()
            f, second = np.minimum(f, d), np.minimum(second, np.maximum(f, d))
        else:                                              # mosaic: the cells of points of either colour
            f, second = np.minimum(f, from_point()), np.minimum(second, from_point())
    return {"cells": second - f, "mosaic": f - second}.get(name, f)


def lattice(name, m, size, rng):
    """As `field`: one thing in each cell of a lattice, shifted and turned; s, t are its own coordinates."""
    u = lambda low, high, *shape: rng.uniform(low, high, (m, *(shape or (1, 1)))).astype(np.float32)
    wave = lambda t: np.abs(t - np.round(t))               # distance to the next integer, ≤ 0.5
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, None, :]
    angle, period = u(0, 2 * np.pi), u(0.24, 0.36) * (1.6 if name in ("rings", "stars", "parquet") else 1)
    x, y = x - u(0, 1), x.transpose(0, 2, 1) - u(0, 1)
    p = (x * np.cos(angle) + y * np.sin(angle)) / period
    q = (y * np.cos(angle) - x * np.sin(angle)) / period
    i, j = np.floor(p), np.floor(q)
    cell = 64 * np.arange(m)[:, None, None] + (8 * (i % 8) + j % 8).astype(int)
    each = lambda low, high: u(low, high, 64).ravel()[cell]
    s, t, turn = p - i - each(0.38, 0.62), q - j - each(0.38, 0.62), each(0, 2 * np.pi)
    s, t = s * np.cos(turn) + t * np.sin(turn), np.abs(t * np.cos(turn) - s * np.sin(turn))
    return dict(
        dots=lambda: np.sqrt(s ** 2 + t ** 2),
        crosses=lambda: np.minimum(np.maximum(np.abs(s), 3 * t), np.maximum(t, 3 * np.abs(s))),
        triangles=lambda: np.maximum(-s, 0.5 * s + 0.87 * t),
        sticks=lambda: np.maximum(np.abs(s), 3.5 * t),
        rings=lambda: wave(u(2.6, 3.2) * np.sqrt(s ** 2 + t ** 2)),
        stars=lambda: np.hypot(s, t) * wave(7 * np.arctan2(t, s) / (2 * np.pi)),
        parquet=lambda: wave(2.2 * t))[name]()


def disc_pictures(m, size, rng):
    """Paper B, Fig. 5: discs with five degrees of freedom (position 2, radius, two intensities)."""
    u = lambda low, high: rng.uniform(low, high, (m, 1, 1))
    return to_uint8(draw_disc(size, u(0.3, 0.7), u(0.3, 0.7), u(0.1, 0.3), u(0, 1), u(0, 1)))[..., None]


def draw_disc(size, x, y, radius, ground, intensity):
    """A disc on a ground, (1 or m, size, size); lengths in parts of the side, each a number or (m, 1, 1)."""
    at = (np.arange(size) + 0.5) / size
    r = np.hypot(at[None, None, :] - x, at[None, :, None] - y)
    inside = 1 / (1 + np.exp(-2 * size * (radius - r)))    # an edge two pixels wide: a smooth manifold
    return ground + (intensity - ground) * inside


def calpha_pictures(m, size, rng, alpha):
    """Paper B, Fig. 4: two C^α regions with a C^α contour between them, slightly blurred."""
    def field(dims):  # Gaussian, spectrum |k|^-(α + dims/2): barely C^α. Twice the size, cropped: no period.
        white = np.fft.rfftn(rng.standard_normal((m, *[2 * size] * dims)), axes=range(1, dims + 1))
        axes = [np.fft.fftfreq(2 * size) * 2 * size] * (dims - 1) + [np.arange(size + 1)]
        k = np.sqrt(sum(np.square(a) for a in np.meshgrid(*axes, indexing="ij")))
        smooth = white / np.maximum(k, 1) ** (alpha + dims / 2) * (k > 0)
        f = np.fft.irfftn(smooth, axes=range(1, dims + 1))[(slice(None), *[slice(size)] * dims)]
        return (f - f.mean(tuple(range(1, dims + 1)), keepdims=True)) / f.std()

    u = lambda low, high: rng.uniform(low, high, (m, 1, 1))
    grid = (np.arange(size) + 0.5) / size
    contour = u(0.3, 0.7) + 0.1 * field(1)[:, None, :]
    mask = np.clip(0.5 + size * (contour - grid[None, :, None]), 0, 1)
    one, two = u(0.2, 0.8) + 0.08 * field(2), u(0.2, 0.8) + 0.08 * field(2)
    x = np.pad(two + (one - two) * mask, ((0, 0), (1, 1), (1, 1)), mode="edge")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4        # blurred with (1 2 1)/4, down and across
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    turn = rng.random((m, 1, 1)) < 0.5                     # contours of every orientation
    return to_uint8(np.where(turn, x.transpose(0, 2, 1), x))[..., None]


# Sheets of pictures and plots, by Pillow alone; a full page is 1600 pixels wide

BLUE, RED, GREEN, ORANGE, GRAY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#8a8a8a"     # Okabe and Ito
COLORS = BLUE, RED, GREEN, "#cc79a7", ORANGE, "#56b4e9", "#000000", "#8c6d31"
WORDS = {"σ": "sigma", "φ": "phi", "α": "alpha", "β": "beta", "λ": "lambda", "√": "sqrt ", "‖": "|", "₁": "1",
         "₂": "2", "−": "-", "–": "-", "→": "->", "≥": ">=", "≤": "<=", "…": "...", "≈": "~", "\u0302": ""}


@functools.lru_cache
def font(size=26):
    """DejaVu Sans, which has Greek letters, where the system has it; else Pillow's own, which has none."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def greek(text):
    """`text` as `font` can show it, in one line: where the system has no DejaVu, σ is written sigma."""
    text = printable(str(text))
    if "DejaVu" not in font().getname()[0]:
        text = "".join(WORDS.get(c, c) for c in text).encode("latin-1", "replace").decode("latin-1")
    return text


def to_image(x, side=None):
    """(C, H, W) in [0, 1] -> a PIL RGB image, enlarged without smoothing to about `side` pixels."""
    image = Image.fromarray(to_uint8(x.float().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()))
    scale = max(1, round((side or image.width) / image.width))
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


def grid(images, columns, gap=8):
    """PIL images of any size on one white sheet, so many in a row, top-aligned."""
    rows = [images[i:i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + gap for row in rows]
    width = max(sum(image.width + gap for image in row) for row in rows) - gap
    sheet, y = Image.new("RGB", (width, sum(heights) - gap), "white"), 0
    for row, height in zip(rows, heights):
        x = 0
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + gap
        y += height
    return sheet


def caption(text, size=26, width=1600):
    """Text on white, `width` pixels wide, in as many lines as it needs."""
    words, pen = greek(text).split(" "), font(size)
    lines = words[:1]
    for word in words[1:]:
        fits = pen.getlength(f"{lines[-1]} {word}") <= width - 12
        lines[-1:] = [f"{lines[-1]} {word}"] if fits else [lines[-1], word]
    image = Image.new("RGB", (width, int((1.3 * len(lines) + 0.3) * size)), "white")
    for k, line in enumerate(lines):
        ImageDraw.Draw(image).text((6, int((1.3 * k + 0.2) * size)), line, "black", pen)
    return image


def picture_rows(rows, side=96):
    """Rows of pictures with a name in front of each: rows is [(name, x (N, C, H, W))]. A PIL image."""
    left = 20 + int(max(font().getlength(greek(name)) for name, _ in rows))
    return grid([grid([caption(name, width=left), *(to_image(picture, side) for picture in x)],
                      len(x) + 1, 4) for name, x in rows], 1, 4)


# what `plot` draws: x and y set its ranges; draw(pen, at, color) asks at(x, y) for the points in pixels
Mark = namedtuple("Mark", "label color x y draw histogram", defaults=[False])


def line(x, y, label=None, color=None, points=False, band=None, width=5):
    """A polyline, with discs at its points if `points`; band: (low, high), shaded. NaN leaves a point out."""
    def draw(pen, at, color):
        if band is not None:
            pen.polygon(at(x, band[0]) + at(x, band[1])[::-1], color + "38")
        pen.line(at(x, y), color, width, joint="curve")
        for a, b in at(x, y) if points else ():
            pen.ellipse([a - 8, b - 8, a + 8, b + 8], color, "#ffffff")
    return Mark(label, color, x, y if band is None else np.concatenate([y, *band]), draw)


def dots(x, y, label=None, color=None, radius=5):
    """Discs at the points."""
    def draw(pen, at, color):
        for a, b in at(x, y):
            pen.ellipse([a - radius, b - radius, a + radius, b + radius], color + "b0", "#ffffff")
    return Mark(label, color, x, y, draw)


def bars(values, bins, span=None, label=None, color=None):
    """A histogram of the finite values in equal bins over `span`; several show through one another."""
    values = np.asarray(values, float)
    counts, edges = np.histogram(values[np.isfinite(values)], bins, span or limits(values))

    def draw(pen, at, color):
        for corner, opposite, n in zip(at(edges[:-1], counts), at(edges[1:], 0 * counts), counts):
            if n:
                pen.rectangle([corner, opposite], color + "90", color)
    return Mark(label, color, edges, [0, max(1, 1.08 * counts.max())], draw, True)


def rule(x=None, y=None, label=None, color=GRAY):
    """A line across the whole plot, vertical at x or horizontal at y."""
    def draw(pen, at, color):
        (a, b), = at([1 if x is None else x], [1 if y is None else y])
        pen.line([a, 0, a, pen.im.size[1]] if y is None else [0, b, pen.im.size[0], b], color, 3)
    return Mark(label, color, [] if x is None else [x], [] if y is None else [y], draw)


def limits(v, log=False):
    """A range a little wider than the finite values (the positive ones if `log`)."""
    v = np.asarray(v, float)
    v = v[np.isfinite(v) & ((v > 0) | (not log))]
    low, high = (float(v.min()), float(v.max())) if len(v) else (1.0, 2.0)
    if log:
        return low / 1.15, high * 1.15
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def ticks(low, high, log, most):
    """Round numbers in [low, high]: 1, 2 or 5 times a power of ten, at most `most` or so."""
    if log and high > 4 * low:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [s * 10.0 ** k for k in decades for s in ((1, 2, 5) if len(decades) < 4 else (1,))]
        found = [v for v in found if low <= v <= high]
        return found[::1 + len(found) // (most + 3)]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(s for s in (1, 2, 5, 10) if (high - low) / (s * step) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def scaled(v, lim, log, low, high):
    """Values whose range `lim` becomes the pixels low … high, as a list."""
    with np.errstate(divide="ignore", invalid="ignore"):
        v, a, b = (np.log(u) if log else np.asarray(u, float) for u in (v, *lim))
        return (low + (v - a) / (b - a) * (high - low)).tolist()


def plot(size, marks, xlabel="", ylabel="", title="", xlim=None, ylim=None, log=""):
    """Marks in axes, an image of `size` (width, height). xlim, ylim: default the data's. log: "x", "xy"."""
    (w, h), text = size, font(26 if size[0] > 800 else 22)
    em, histogram = text.size, any(m.histogram for m in marks)
    x, y = (np.concatenate([getattr(m, k) for m in marks]) for k in "xy")
    xlim = xlim or ((x.min(), x.max()) if histogram else limits(x, "x" in log))
    ylim = ylim or ((0, y.max()) if histogram else limits(y, "y" in log))
    xs = ticks(*xlim, "x" in log, 6 if w > 600 else 4) if xlabel else []       # t-SNE has no units
    ys = ticks(*ylim, "y" in log, 6 if h > 350 else 4) if ylabel else []
    named = lambda v: f"{v / 1e6:g} M" if abs(v) >= 1e6 else f"{v:.6g}"
    left = 14 + int(max([text.getlength(named(v)) for v in ys], default=0) + 1.7 * em * bool(ylabel))
    right, bottom = w - em, h - 8 - int(2.9 * em) * bool(xlabel)
    marks = [m._replace(color=m.color or COLORS[k % len(COLORS)]) for k, m in enumerate(marks)]
    legend = [m for m in marks if m.label]                 # above the frame, in columns
    need = max([60 + text.getlength(greek(m.label)) for m in legend], default=1)
    columns = max(1, int((right + 28 - left) / need))
    top = 8 + int(1.4 * em) * (bool(title) + math.ceil(len(legend) / columns))

    px = lambda v: scaled(v, xlim, "x" in log, left, right)
    py = lambda v: scaled(v, ylim, "y" in log, bottom, top)
    at = lambda x, y: [p for p in zip(px(x), py(y)) if all(map(math.isfinite, p))]
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for v, place in zip(ys, py(ys)):
        pen.line([left, place, right, place], "#e4e4e4", 2)
        pen.text((left - 8, place), named(v), "black", text, anchor="rm")
    for v, place in zip(xs, px(xs)):
        pen.line([place, top, place, bottom], "#e4e4e4", 2)
        place = min(place, w - 2 - text.getlength(named(v)) / 2)
        pen.text((place, bottom + 8), named(v), "black", text, anchor="ma")
    inside = sheet.copy()                                  # marks are cut off at the frame
    for mark in marks:
        mark.draw(ImageDraw.Draw(inside, "RGBA"), at, mark.color)
    sheet.paste(inside.crop((left, top, right, bottom)), (left, top))
    pen.rectangle([left, top, right, bottom], outline="#444444", width=2)
    for k, mark in enumerate(legend):
        x, y = left + k % columns * need, 8 + 1.4 * em * (bool(title) + k // columns + 0.45)
        pen.rectangle([x, y - em / 3, x + 24, y + em / 3], mark.color)
        pen.text((x + 32, y), greek(mark.label), "black", text, anchor="lm")
    pen.text(((left + right) / 2, 4), greek(title), "black", text, anchor="ma")
    pen.text(((left + right) / 2, h - 4), greek(xlabel), "black", text, anchor="md")
    if ylabel:
        side = Image.new("RGB", (int(text.getlength(greek(ylabel))) + 4, int(1.4 * em)), "white")
        ImageDraw.Draw(side).text((2, 2), greek(ylabel), "black", text)
        sheet.paste(side.rotate(90, expand=True), (2, max(0, int(top + bottom - side.width) // 2)))
    return sheet


@torch.no_grad()
def draw_evaluation(model, x, curve):
    """ckpt.png: held-out x (≤ 8, C, H, W) clean, noisy, denoised; PSNR; the use of M so far. A PIL image."""
    rows = [("clean", x)]
    for k, sigma in enumerate((0.1, 0.3, 0.7)):
        y = x + sigma * torch.randn(x.shape, generator=seeded(x.device, 4, k), device=x.device)
        rows += [(f"σ {sigma:g}", y), ("denoised", model(y))]
    pictures, psnr, last_use = picture_rows(rows, side=96), curve[-1]["psnr"], curve[-1]["use"]
    size, seen = (620, pictures.height // 2), [record["pictures_seen"] for record in curve]
    denoised = line(input_psnr([*psnr]), [*psnr.values()], "denoised", points=True)
    quality = plot(size, [denoised, line([0, 26], [0, 26], "noisy", GRAY)], "input PSNR (dB)",
                   "output PSNR (dB)")
    use = plot(size, [line(seen, [record["use"][s] for record in curve], f"σ {s:g}", points=True)
                      for s in last_use], "pictures seen", "use of M (dB)")
    return grid([pictures, grid([quality, use], 1)], 2)


# Speed

def bench(flags, micro_batch, device, compiled=False, seconds=20):
    """Print images/s of a training step, of a forward pass and of φ: medians of timings that take turns."""
    model, optimizer = new_network(flags, device)
    if compiled:
        model.compile()
    micro = min(flags["batch"], micro_batch or fitting_micro_batch(flags, device))
    batch, size, precision = min(flags["batch"], 4 * micro), flags["size"], flags["precision"]
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, flags["channels"]), np.uint8)
    x = to_batch(pixels[:micro], device)

    def step():
        x, y, _ = noisy_batch(pixels, np.arange(batch), 0, 0, 1.0, device)
        training_step(model, optimizer, x, y, batch, micro, precision=precision)

    @torch.no_grad()
    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(x)

    def rate(images, work):
        start = time.perf_counter()
        work()
        torch.zeros(1, device=device).item()   # waits for a GPU
        return images / (time.perf_counter() - start)

    works = {"training step": (batch, step), "forward pass": (micro, forward),
             "phi": (micro, lambda: phi(model, x, 0.3))}
    rates, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(rates) < 3:
        rates.append([rate(*work) for work in works.values()])
    say(f"width {flags['width']}, {size}×{size}, {flags['levels']} levels, batch {batch}, micro-batch "
        f"{micro}, {precision}{', compiled' * compiled}, {device}")
    rates = np.median(rates, 0)
    for name, r in zip(works, rates):
        say(f"{name:13} {r:10.1f} images/s, {r / rates[1]:.2f} of the forward pass")


# Command line

PAPER = dict(size=64, width=64, batch=1024, epochs=1000.0)                 # A.1 – A.3
SMALL = dict(size=32, width=16, batch=32, pictures=150_000)                # for the built-in pictures
COMMON = dict(data=None, channels=3, levels=None, patches=False, val=0.05, seed=0, subset=None, limit=None,
              sigma_max=1.0, precision="fp32", epochs=None, minutes=None, pictures=None)
BUDGETS = "epochs", "minutes", "pictures"


def arguments():
    """The command line. Flags that define the run default to None: --resume must see which were given."""
    parser, whole = Parser(description=__doc__), number(int, 1)
    add = parser.add_argument_group("pictures").add_argument
    add("--data", metavar="PATH", help="a folder (any depth), a .npy or .npz of uint8 pictures, a folder of "
        "ImageNet64 .npz batches, disc, or calpha:A (default: built-in pictures)")
    add("--size", type=number(int, 1, 4096), help="side in pixels, a multiple of 2^levels (64; built-in 32)")
    add("--channels", type=int, choices=(1, 3), help="gray or colour (default: 3; disc and calpha 1)")
    add("--patches", action="store_true", default=None, help="cut pictures into size×size tiles, unscaled")
    add("--val", type=number(float, 0, 0.9), help="fraction held out, at most 2000 (default: 0.05)")
    add("--subset", choices=("first", "second"), help="one half of the training pictures (paper B)")
    add("--limit", type=whole, help="at most this many training pictures (paper B)")
    add = parser.add_argument_group("network and training").add_argument
    add("--width", type=number(int, 1, 4096), help="channels of E1 (default: 64; built-in 16)")
    add("--levels", type=number(int, 1, 8), help="encoder blocks (default: so many that M sees the picture)")
    add("--sigma-max", type=number(float, 0, 100), help="largest σ, pictures in [0, 1] (default: 1)")
    add("--batch", type=number(int, 1, 2 ** 16), help="pictures a step, in all (default: 1024; built-in 32)")
    add("--pictures", type=whole, metavar="N", help="train on so many, repeats counted (built-in: 150000)")
    add("--epochs", type=number(float, 0, 1e12), help="times through them (default: 1000)")
    add("--minutes", type=number(float, 0, 1e12), help="the schedule stretched to fit")
    add("--precision", choices=("fp32", "bf16"), help="bf16: automatic mixed precision (default: fp32)")
    add("--seed", type=number(int, 0, 2 ** 31), help="of split, order, noise and weights (default: 0)")
    add = parser.add_argument
    add("--out", default="ckpt.pt", metavar="FILE.pt", help="checkpoint to write (default: ckpt.pt)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on with --out exactly where it was saved")
    either("--force", action="store_true", help="overwrite --out")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--micro-batch", type=whole, help="pictures at a time: memory and speed alone (default: what fits)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-every", type=number(float, 0, 1e9), metavar="SECONDS",
        help="evaluate and save so often (default: a twelfth of the run, 30 to 300)")
    add("--bench", action="store_true", help="only measure speed at this size")
    return vars(parser.parse_args())


def complete_flags(given, resume=None, path=""):
    """Complete the flags that define a run: those given, then (resuming) the checkpoint's, then the defaults.

    Raises UserError, naming the flag, for one that contradicts the checkpoint or another flag. The budget of
    a resumed run may be raised. A given budget replaces the default or the old one.
    """
    given = {k: given[k] for k in COMMON | PAPER if given[k] is not None}
    no_budget = dict.fromkeys(BUDGETS) if given.keys() & BUDGETS else {}
    if resume:
        saved = resume["flags"]
        for key, value in given.items():
            longer = key in BUDGETS and (saved[key] or 0) <= value
            moved = key == "data" and saved[key] is not None  # Run compares the pictures themselves
            if value != saved[key] and not longer and not moved:
                raise UserError(f"--{key.replace('_', '-')} {value} contradicts {path}, trained with "
                                f"{saved[key]}; leave it out to go on, or give another --out")
        return saved | no_budget | given
    synthetic = is_synthetic(given.get("data"))
    gray = dict(channels=1) if synthetic and "data" in given else {}
    flags = COMMON | (SMALL if synthetic else PAPER) | gray | no_budget | given
    if flags["levels"] is None:
        flags["levels"] = next(n for n in range(1, 9) if receptive_field(n) >= min(flags["size"], 700))
    if flags["size"] % 2 ** flags["levels"]:
        raise UserError(f"--size {flags['size']}: must be a multiple of {2 ** flags['levels']} "
                        f"(2^levels, levels = {flags['levels']})")
    return flags


def choose_device(name):
    """A torch.device that works: the one named, or CUDA, MPS, CPU in this order. Raises UserError."""
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                       # torchrun: one GPU a process
    name = name or ("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here") from None
    return torch.device(name)


def join_processes(device, **options):
    """Under torchrun: join the other processes. Raises UserError if only a part of its variables is set."""
    if missing := [v for v in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(v)]:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: start with torchrun, or unset RANK")
    if device.type == "mps":
        raise UserError("torchrun: processes cannot meet on mps; --device cpu, or start without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


def stop_on_signal(stop):
    """Ctrl-C, SIGTERM and a closed terminal append to the list `stop`, so that the run can save and end."""
    def on_signal(number, _):
        stop.append(number)
        if "RANK" not in os.environ:           # the second one kills; torchrun itself sends several
            signal.signal(number, signal.SIG_DFL)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)   # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:              # nohup
            signal.signal(number, on_signal)


def main():
    """The command line's work; returns the exit code."""
    given, stop = arguments(), []
    out, device = given["out"], choose_device(given["device"])
    if given["bench"]:
        return bench(complete_flags(given), given["micro_batch"], device, given["compile"])
    if not out.endswith(".pt"):
        raise UserError(f"--out {out or repr(out)}: the name must end in .pt")
    resume = load_checkpoint(out)[1] if given["resume"] else None
    if resume and "optimizer" not in resume:
        raise UserError(f"{out}: weights only, without what --resume needs to go on exactly (Adam's state)")
    if os.path.exists(out) and not (resume or given["force"]):
        raise UserError(f"{out} exists: --resume goes on with it, --force overwrites it, --out names another")
    check_outputs([out[:-3] + end for end in (".pt", ".jsonl", ".png")], bool(resume) or given["force"])
    flags = complete_flags(given, resume, out)
    if not resume and flags["data"] and Path(out).resolve().is_relative_to(Path(flags["data"]).resolve()):
        raise UserError(f"--out {out}: lies in --data {flags['data']}, whose pictures its .png would join; "
                        "name another folder")
    if "RANK" in os.environ:
        join_processes(device)
    if given["data"] is None and not resume:
        say("no --data: built-in pictures, small preset (32×32, width 16, batch 32)")
    train(flags, out, device, resume, given["micro_batch"], given["compile"], given["save_every"],
          stop=lambda: bool(stop), ready=lambda: stop_on_signal(stop))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    run(main)
