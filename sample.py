"""Draw pictures that share a target's φ: Algorithms 1 and 2, and what follows (paper A: §3, App. C).

    python sample.py ckpt.pt target.png                       # eight samples around the target -> samples.png
    python sample.py ckpt.pt --average a.png b.png            # the mean φ of several pictures
    python sample.py ckpt.pt --mix a.png b.png --weight 0.3   # 0.7 φ(a) + 0.3 φ(b)
    python sample.py ckpt.pt --cluster clusters.npz:7         # the mean φ of a cluster that kmeans.py found
    python sample.py ckpt.pt --unconditional 16               # no target
    python sample.py ckpt.pt --denoise photo.jpg --noise 0.2  # plain denoising, any size

A target of any size and mode is cropped and resized exactly as pictures are in training.
"""
import hashlib
import json
import math
import os
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from train import (EXTENSIONS, Parser, builtin_pictures, checkpoint_pictures, choose_device, list_files,
                   load_picture, load_pictures, number, seeded, to_batch, to_uint8)
from unet import UserError, load_checkpoint, phi


# App. C, Algorithm 2

def guidance_step(model, x, phi_c, tol=0.01, max_iters=200, memory=20):
    """Algorithm 2: move the pictures x (N, C, H, W) until L = ‖φ(x) − φ_c‖² is below tol × its first value.

    phi_c: (N, d) or (1, d). Returns x and a dict of (N,) tensors: first and last L, the number of gradients,
    converged. Each picture stops on its own and is then left alone. Only the encoder and M run. Raises
    FloatingPointError if L is not finite.

    Printed, ∇L = (φ_c − φ(x))ᵀ∇φ is subtracted, which climbs; the gradient is 2 (φ(x) − φ_c)ᵀ∇φ. The step is
    Polyak's for a loss whose minimum is 0, η = L/‖∇L‖² for each picture: it has no parameter and follows the
    gradient's size, which differs a hundredfold between noise levels. With `memory`, the last steps ΔX and
    the changes of φ they caused, ΔΦ, first take out the part of φ(x) − φ_c that they can explain (least
    squares, as Anderson and GMRES do); the gradient step, then 0.3 η, is for the rest. It costs no further
    gradients and needs a quarter as many (README). memory=0: gradient descent alone.

    η is right only if φ_c can be reached. Where it cannot, as for the noisy picture of something else at a
    small σ, ∇L vanishes and η explodes: after 30 steps without a new least L, a picture goes back to where
    L was least and takes steps half as long. It is returned where L was least.
    """
    x, phi_c = x.detach().clone(), phi_c.expand(len(x), -1)
    start, best, since, damping = x.clone(), x.clone(), x.new_zeros(len(x)), x.new_ones(len(x))
    first, last = x.new_zeros(len(x)), x.new_full((len(x),), math.inf)         # last: the least L so far
    gradients = torch.zeros(len(x), dtype=torch.long, device=x.device)
    active, steps, changes = torch.arange(len(x), device=x.device), [], []     # ΔX (n, C, H, W), ΔΦ (n, d)
    L_before = math.inf
    for iteration in range(max_iters + 1):
        with torch.enable_grad():
            x_t = x[active].requires_grad_()
            phi_t = model.encode(x_t)[0].mean((2, 3))                          # (n, d)
        r = phi_t.detach() - phi_c[active]
        L = r.square().sum(1)
        if iteration == 0:
            first = L
            if not L.isfinite().all():
                raise FloatingPointError("the matching loss is not finite")
        else:
            changes.append(r - r_before)
        near = (x - start)[active].square().mean((1, 2, 3)) <= 1               # false for NaN
        least = (L <= last[active]) & near
        best[active[least]], last[active[least]] = x[active[least]], L[least]
        since[active] = torch.where(least, 0, since[active] + 1)
        lost = (since[active] >= 30) | ~near
        since[active[lost]], damping[active[lost]] = 0, damping[active[lost]] / 2
        rose = (L > 1.5 * L_before) | lost
        going = (last[active] > tol * first[active]).nonzero()[:, 0]
        if not len(going) or iteration == max_iters:
            break
        steps, changes = steps[-memory:] if memory else [], changes[-memory:] if memory else []
        moved = 0
        if steps:
            A = torch.stack(changes, 2)                                        # (n, d, memory)
            size = A.norm(dim=1, keepdim=True).clamp(min=1e-12)
            A, At = A / size, (A / size).mT
            ridge = 0.01 * torch.eye(A.shape[2], dtype=A.dtype, device=A.device)
            c = torch.linalg.solve(At @ A + ridge, At @ r[:, :, None])         # (n, memory, 1)
            c[rose] = 0                                                        # the last steps misled
            r = r - (A @ c)[:, :, 0]
            moved = -sum(w.view(-1, 1, 1, 1) * dx for w, dx in zip((c / size.mT).unbind(1), steps))
        grad, = torch.autograd.grad(phi_t, x_t, 2 * r)                         # ∇L; none of the weights
        eta = (0.3 if memory else 1) * r.square().sum(1) / grad.square().sum((1, 2, 3)).clamp(min=1e-30)
        step = damping[active].view(-1, 1, 1, 1) * (moved - eta.view(-1, 1, 1, 1) * grad)
        step[lost] = (best - x)[active[lost]]
        step = step[going]
        steps, changes = [dx[going] for dx in steps] + [step], [dp[going] for dp in changes]
        L_before, r_before = L[going], (phi_t.detach() - phi_c[active])[going]
        active = active[going]
        x[active] += step
        gradients[active] += 1
    return best, dict(first=first, last=last, gradients=gradients, converged=last <= tol * first)


# §3, Algorithm 1

@torch.no_grad()
def reconstruct(model, target, mean, sigmas, shape, generators, tol=0.01, max_iters=200, report=None):
    """Algorithm 1: sample pictures whose φ is the target's, (N, C, H, W), N = len(generators).

    target: target(σ) gives φ_c at noise level σ, (N, d) or (1, d). mean: the mean colour m, (C,).
    sigmas: σ_T > … > σ_1. shape: (C, H, W). generators: one a sample, so that a sample does not depend on
    what is drawn beside it. report: called as report(t, σ, x, Algorithm 2's dict) after every score step; the
    dict then also has σ̂ = ‖s‖/√n before and after matching. Raises FloatingPointError naming
    the noise level.

    A full step x + s(x) is the posterior mean, which contracts: for Gaussian data of variance λ (and no
    matching) the variance obeys v ← (λ/(λ + σ_t²))² v + σ²_{t−1} and ends below λ.
    """
    sigma_T, *later = sigmas
    x = mean.view(-1, 1, 1) + sigma_T * noise(shape, generators, mean.device)  # x_T ~ N(m, σ_T² I)
    for t, (sigma, sigma_next) in enumerate(zip(sigmas, [*later, 0])):
        phi_c = target(sigma)                                                  # φ of x_c + σ_t z
        before = noise_level(model.score(x)) if report else None
        try:
            x, state = guidance_step(model, x, phi_c, tol, max_iters)          # Algorithm 2
        except FloatingPointError as error:
            raise FloatingPointError(f"σ = {sigma:.4g}: {error}") from None
        s = model.score(x)
        x = x + s
        if sigma_next:                                                         # none in the last step
            x = x + sigma_next * noise(shape, generators, mean.device)
        if report:
            report(t, sigma, x, {**state, "sigma_before": before, "sigma_after": noise_level(s)})
    return x


def noise(shape, generators, device):
    """z ~ N(0, I), (N, *shape): picture i from generator i, drawn on the CPU so that devices agree."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def noise_level(s):
    """σ̂ = ‖s‖/√n of each picture, (N,): how noisy the network takes it to be."""
    return s.square().mean((1, 2, 3)).sqrt()


def target_phi(model, pictures, weights=None, draws=1, generator=None):
    """The function σ -> φ_c (1, d): φ of the noisy conditioners (P, C, H, W), averaged with weights (P,).

    Fresh noise at each call, as Algorithm 1 prints; `draws` > 1 averages as many realisations, and the
    samples then came out a little farther from the target (README). weights: default equal. One picture is
    the paper's case; several, or a cluster, are its "future directions" (§4).
    """
    if weights is None:
        weights = torch.full((len(pictures),), 1 / len(pictures))

    return lambda sigma: (weights.to(pictures) @ phi(model, pictures, sigma, draws, generator))[None]


# App. C, unconditional sampling (Kadkhodaie & Simoncelli 2021, Algorithm 1)

@torch.no_grad()
def sample_unconditional(model, mean, shape, generators, sigma_0=1.0, sigma_end=0.04, h_0=0.01, beta=0.05,
                         max_steps=2000, target=None, tol=0.01, max_iters=200, report=None):
    """Coarse-to-fine ascent of log p by partial score steps, (N, C, H, W); with `target`, Algorithm 2 first.

    y ← y + h s(y) + γ z with h = h₀ t/(1 + h₀(t − 1)), γ² = ((1 − βh)² − (1 − h)²) σ̂², σ̂ = ‖s(y)‖/√n: σ̂ is
    estimated for each picture and falls by 1 − βh a step. A picture stops when σ̂ ≤ sigma_end. report: called
    as report(t, σ̂ of the pictures still moving, y, Algorithm 2's dict or None). Returns y and the number of
    steps of each picture, (N,); max_steps where it did not end. Raises FloatingPointError.
    """
    y = mean.view(-1, 1, 1) + sigma_0 * noise(shape, generators, mean.device)
    steps = torch.full((len(y),), max_steps)
    active = list(range(len(y)))
    for t in range(1, max_steps + 1):
        s, state = model.score(y[active]), None
        if target is not None:
            phi_c = torch.cat([target(float(sigma)) for sigma in noise_level(s)])
            y[active], state = guidance_step(model, y[active], phi_c, tol, max_iters)
            s = model.score(y[active])
        sigma = noise_level(s)
        if not sigma.isfinite().all():
            raise FloatingPointError(f"step {t}: the score is not finite")
        if report:
            report(t, sigma, y, state)
        ended = (sigma <= sigma_end).tolist()
        for i in (i for i, e in zip(active, ended) if e):
            steps[i] = t
        keep = [k for k, e in enumerate(ended) if not e]
        y[[i for i, e in zip(active, ended) if e]] += s[[k for k, e in enumerate(ended) if e]]     # all of it
        active = [active[k] for k in keep]
        if not active:
            break
        h = h_0 * t / (1 + h_0 * (t - 1))
        gamma = math.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2) * sigma[keep]
        z = noise(shape, [generators[i] for i in active], mean.device)
        y[active] += h * s[keep] + gamma.view(-1, 1, 1, 1) * z
    return y, steps


# §3, Eq. 4

@torch.no_grad()
def conditional_distance(model, x1, x2, sigmas, draws=8, phi_draws=20, generator=None, tol=0.01,
                         max_iters=200):
    """Eq. 4: d²(p₁, p₂), the symmetrised KL divergence of p(x given φ₁) and p(x given φ₂).

    ∫ (E_p₁‖s₁ − s₂‖² + E_p₂‖s₁ − s₂‖²) σ dσ, where s_i = (x̂(y matched to φ_i) − y)/σ² is the score of y
    given φ_i; by the trapezoid rule over `sigmas` (increasing). x1, x2: (C, H, W) in [0, 1]; y = x_i + σz
    stands for a sample of p_i, `draws` of each, with the same z at every σ. φ_i at each σ averages phi_draws
    realisations. Returns (value, its standard error over draws, the integrand (len(sigmas),), the share of
    the y that Algorithm 2 could match (len(sigmas),)), the first three in nats. The integrand grows towards
    small σ, where few y can be matched to the φ of another picture: the least σ decides.
    """
    sigmas, d2, reached = torch.as_tensor(sigmas, dtype=torch.float64), [], []
    z = torch.randn(draws, *x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    targets = [target_phi(model, x[None], draws=phi_draws, generator=generator) for x in (x1, x2)]
    for sigma in sigmas.tolist():
        y = torch.cat([x1 + sigma * z, x2 + sigma * z])                        # (2·draws, C, H, W)
        matched = [guidance_step(model, y, target(sigma), tol, max_iters) for target in targets]
        reached.append(torch.cat([state["converged"] for _, state in matched]).double().mean().cpu())
        x_hat = [model.denoise(x) for x, _ in matched]
        distance = (x_hat[0] - x_hat[1]).double().square().sum((1, 2, 3)).cpu() / sigma ** 4
        d2.append((distance[:draws] + distance[draws:]) * sigma)
    d2 = torch.stack(d2)                                                       # (len(sigmas), draws)
    values = torch.trapezoid(d2, sigmas, dim=0)
    return float(values.mean()), float(values.std() / math.sqrt(draws)), d2.mean(1), torch.stack(reached)


# Sheets

def to_image(x, side=None):
    """(C, H, W) in [0, 1] -> a PIL RGB image, enlarged without smoothing to about `side` pixels."""
    pixels = to_uint8(x.float().cpu().permute(1, 2, 0).numpy())
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    scale = max(1, round((side or image.width) / image.width))
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


def panel(samples, target=None, side=96, gap=4):
    """Samples (S, C, H, W) in a square; with a target (P, C, H, W), it stands framed in the middle (Fig. 7).

    Several conditioners share the middle, at most four. Returns a PIL image.
    """
    cells = len(samples) + (target is not None)
    k = math.ceil(math.sqrt(cells))
    k += target is not None and k % 2 == 0                 # an odd side has a middle
    tiles = [to_image(x, side) for x in samples]
    tile = tiles[0].width
    rows = k if target is not None else math.ceil(cells / k)
    sheet = Image.new("RGB", (k * (tile + gap) + gap, rows * (tile + gap) + gap), "white")
    corner = lambda i: (gap + i % k * (tile + gap), gap + i // k * (tile + gap))
    free = [i for i in range(k * rows) if target is None or i != k * k // 2]
    if target is not None:                                 # fewer samples than cells: the nearest cells
        free = sorted(sorted(free, key=lambda i: (i % k - k // 2) ** 2 + (i // k - k // 2) ** 2)[:len(tiles)])
    for i, image in zip(free, tiles):
        sheet.paste(image, corner(i))
    if target is not None:
        x, y = corner(k * k // 2)
        part = tile if len(target) == 1 else tile // 2
        for j, picture in enumerate(target[:4]):
            image = to_image(picture).resize((part, part), Image.NEAREST if part == tile else Image.LANCZOS)
            sheet.paste(image, (x + j % 2 * part, y + j // 2 * part))
        ImageDraw.Draw(sheet).rectangle([x - gap, y - gap, x + tile + gap - 1, y + tile + gap - 1],
                                        outline="#d55e00", width=gap)
    return sheet


def beside(images, columns=4, gap=12):
    """Images of any size on one white sheet, so many in a row."""
    rows = [images[i:i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    size = max(sum(image.width + gap for image in row) for row in rows), sum(h + gap for h in heights)
    sheet, y = Image.new("RGB", (size[0] - gap, size[1] - gap), "white"), 0
    for row, height in zip(rows, heights):
        x = 0
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + gap
        y += height + gap
    return sheet


# Command line

def load_targets(flags, checkpoint, device):
    """A panel each: [(name, pictures (P, C, H, W) to condition on, weights or None)]. Raises UserError."""
    size, channels = checkpoint["size"], checkpoint["model"]["channels"]

    def read(paths):
        return to_batch(np.stack([load_picture(path, size, channels) for path in paths]), device)
    if flags.average:
        return [("average", read(flags.average), None)]
    if flags.mix:
        return [("mixture", read(flags.mix), torch.tensor([1 - flags.weight, flags.weight]))]
    if flags.cluster:
        return [(flags.cluster, cluster_members(flags, checkpoint, device), None)]
    return [(path, read([path]), None) for path in flags.targets]


def cluster_members(flags, checkpoint, device, most=64):
    """The pictures of cluster K of "clusters.npz:K", at most 64, by seed. Raises UserError."""
    path, _, k = flags.cluster.rpartition(":")
    try:
        with np.load(path) as saved:
            members = saved["paths"][saved["labels"] == int(k)]
            clusters = int(saved["labels"].max()) + 1
    except Exception as error:                 # whatever numpy finds wrong with the file
        raise UserError(f"--cluster {flags.cluster}: must be FILE:NUMBER, by kmeans.py ({error})") from None
    if not len(members):
        raise UserError(f"--cluster {flags.cluster}: no such cluster; {path} has 0 to {clusters - 1}")
    rng = np.random.default_rng(flags.seed)
    members = rng.permutation(members)[:most]
    if all(os.path.isfile(m) for m in members) and not checkpoint["flags"]["patches"]:
        size, channels = checkpoint["size"], checkpoint["model"]["channels"]
        return to_batch(np.stack([load_picture(m, size, channels) for m in members]), device)
    pictures = checkpoint_pictures(checkpoint, flags.data)[0]
    row = {name: i for i, name in enumerate(pictures.paths)}
    if any(m not in row for m in members):
        raise UserError(f"--cluster {flags.cluster}: {next(m for m in members if m not in row)} is not among "
                        f"the checkpoint's pictures; --data says where they are")
    return to_batch(pictures.x[[row[m] for m in members]], device)


def random_pictures(flags, checkpoint, device, n=64):
    """n pictures of the training data, to say how far apart unrelated φ are; None if the data are gone."""
    run, rng = checkpoint["flags"], np.random.default_rng(flags.seed)
    data, size, channels = flags.data or run["data"], checkpoint["size"], checkpoint["model"]["channels"]
    try:
        if data is None or data == "disc" or data.startswith("calpha:"):
            x = builtin_pictures(n, size, channels, data)[0]
        elif os.path.isdir(data) and not run["patches"] and (files := list_files(data, EXTENSIONS)):
            x = np.stack([load_picture(f, size, channels) for f in rng.permutation(files)[:n]])
        else:
            x = load_pictures(data, size, channels, run["patches"]).x
            x = x[np.sort(rng.permutation(len(x))[:n])]
    except UserError:
        return None
    return to_batch(x, device)


def code(model, x):
    """φ at σ = 0.3 over 20 draws, (N, d), always with the same noise: what distances are measured in."""
    return phi(model, x, 0.3, 20, seeded(x.device, 77))


def similarities(model, samples, target, scale):
    """Per sample of one target (S, C, H, W): distance in φ, and correlations of pixels. A dict of lists.

    scale: the mean φ-distance between random pictures, or None.
    """
    flat = torch.nn.functional.normalize((samples - samples.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)
    out = {}
    if len(samples) > 1:
        pairs = (flat @ flat.T)[*torch.triu_indices(len(flat), len(flat), 1)]
        out["correlation_between_samples"] = pairs.tolist()
    if target is not None:
        pictures, weights = target
        weights = torch.full((len(pictures),), 1 / len(pictures)) if weights is None else weights
        distance = (code(model, samples) - weights.to(pictures) @ code(model, pictures)).norm(dim=1)
        out["phi_distance"] = distance.tolist()
        if scale is not None:
            out["phi_distance_relative"] = (distance / scale).tolist()
        if len(pictures) == 1:
            t = torch.nn.functional.normalize((pictures - pictures.mean()).flatten(1), dim=1)
            out["correlation_with_target"] = (flat @ t.T)[:, 0].tolist()
    return out


def status(text):
    """The progress line: rewritten on a terminal, a plain line elsewhere."""
    if sys.stdout.isatty():
        print("\r" + text.ljust(100)[:os.get_terminal_size().columns - 1], end="", flush=True)
    else:
        print(text, flush=True)


def denoise_picture(flags, model, checkpoint, device):
    """--denoise: one picture of any size, at full resolution, its output beside it. Returns the record."""
    x = to_batch(load_picture(flags.denoise, None, checkpoint["model"]["channels"])[None], device)
    y = x + (flags.noise or 0) * torch.randn(x.shape, generator=seeded("cpu", flags.seed)).to(device)
    with torch.no_grad():
        x_hat = model.denoise(y)
    record = dict(picture=flags.denoise, noise_added=flags.noise or 0.0,
                  noise_estimated=float(noise_level(x_hat - y)))
    print(f"noise level σ: estimated {record['noise_estimated']:.4f}"
          + (f", added {flags.noise:g}" if flags.noise else ""))
    if flags.noise:
        record |= {name: float(-10 * (v - x).square().mean().log10()) for name, v in
                   (("psnr_noisy", y), ("psnr_denoised", x_hat))}
        print(f"PSNR {record['psnr_noisy']:.2f} dB noisy, {record['psnr_denoised']:.2f} dB denoised")
    save_image(beside([to_image(v[0]) for v in ((x, y, x_hat) if flags.noise else (y, x_hat))]), flags.out)
    return record


def save_image(image, path):
    """Write a PNG whole or not at all."""
    image.save(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)


def draw_samples(flags, model, checkpoint, device):
    """Everything but --denoise: sample, measure, draw. Returns the record."""
    start, size = time.time(), checkpoint["size"]
    mean = torch.as_tensor(checkpoint["mean"], dtype=torch.float32, device=device)
    shape = (checkpoint["model"]["channels"], size, size)
    targets = load_targets(flags, checkpoint, device) if not flags.unconditional else []
    per_target = flags.unconditional or flags.samples
    panels_wanted = range(len(targets) or 1)
    generators = [seeded("cpu", flags.seed, 1, j, i) for j in panels_wanted for i in range(per_target)]
    trajectory, levels, shown = [], [], [0.0]

    def report(t, sigma, x, state):
        of = len(sigmas) if not stepwise else None
        fraction = (t + 1) / of if of else min(1, math.log(start_sigma / float(sigma.max()))
                                               / math.log(start_sigma / flags.sigma_min) + 1e-3)
        level = dict(step=t, sigma=sigma if of else sigma.tolist())
        if state:
            level |= {k: v.tolist() for k, v in state.items() if k != "converged"}
            level["not_converged"] = (~state["converged"]).nonzero()[:, 0].tolist()
        levels.append(level)
        trajectory.append(x.clone() if flags.save_trajectory else None)
        if time.time() - shown[0] > (0.3 if sys.stdout.isatty() else 10):
            shown[0], taken = time.time(), time.time() - start
            text = f"σ {sigma if of else float(sigma.max()):.3f}"
            if state:
                text += (f"  matching {float(state['first'].mean()):.2g} → "
                         f"{float(state['last'].mean()):.2g}, {int(state['gradients'].max())} gradients")
            status(f"{text}  {taken:.0f} s, {taken / max(fraction, 1e-3) * (1 - fraction):.0f} s left")

    stepwise = bool(flags.unconditional or flags.adaptive)
    start_sigma = flags.sigma_max
    space = np.linspace if flags.schedule == "linear" else np.geomspace
    sigmas = space(flags.sigma_max, flags.sigma_min, flags.steps).tolist()
    conditions = [target_phi(model, x, w, flags.draws, seeded(device, flags.seed, 2, j))
                  for j, (_, x, w) in enumerate(targets)]
    matching = dict(tol=flags.match_tol, max_iters=flags.match_iters, report=report)
    if stepwise:
        samples = []
        for j in panels_wanted:
            part, steps = sample_unconditional(
                model, mean, shape, generators[j * per_target:(j + 1) * per_target], flags.sigma_max,
                flags.sigma_min, target=conditions[j] if conditions else None, **matching)
            samples.append(part)
            unfinished = int((steps >= 2000).sum())
            if unfinished:
                print(f"warning: {unfinished} samples had not reached σ {flags.sigma_min:g} after 2000 steps")
        samples = torch.cat(samples)
    else:
        samples = reconstruct(model, lambda sigma: torch.cat([c(sigma) for c in conditions])
                              .repeat_interleave(per_target, 0), mean, sigmas, shape, generators, **matching)
    if sys.stdout.isatty():
        print()
    if not samples.isfinite().all():
        raise UserError("the samples are not finite; is the checkpoint damaged?")
    late = [len(level["not_converged"]) for level in levels if level.get("not_converged")]
    if late:
        print(f"matching stopped at --match-iters {flags.match_iters} before {flags.match_tol:.0%} at "
              f"{len(late)} of {len(levels)} noise levels (at most {max(late)} of {len(samples)} samples); "
              f"{flags.out_json} has them")
    unrelated = random_pictures(flags, checkpoint, device) if targets else None
    if targets and unrelated is None:
        print("the training pictures are gone: φ-distances are not relative to those of random pictures "
              "(--data says where they are)")
    scale = None
    if unrelated is not None and len(unrelated) > 1:
        scale = torch.pdist(code(model, unrelated)).mean()
    record = dict(levels=levels, panels=[], seconds=time.time() - start)
    panels = []
    for j in panels_wanted:
        mine = samples[j * per_target:(j + 1) * per_target]
        target = targets[j][1:] if targets else None
        record["panels"].append(dict(target=targets[j][0] if targets else None,
                                     **similarities(model, mine, target, scale)))
        panels.append(panel(mine, target[0] if target else None))
        relative = record["panels"][-1].get("phi_distance_relative")
        if relative:
            print(f"{targets[j][0]}: φ-distance to the target {np.mean(relative):.1%} of that between random "
                  f"pictures; pixel correlation with the target "
                  + (f"{np.mean(record['panels'][-1]['correlation_with_target']):.2f}"
                     if "correlation_with_target" in record["panels"][-1] else "not defined"))
    save_image(beside(panels), flags.out)
    if flags.save_each:
        os.makedirs(flags.save_each, exist_ok=True)
        for i, x in enumerate(samples):
            name = f"{i // per_target:02d}_{i % per_target:03d}.png"
            save_image(to_image(x), os.path.join(flags.save_each, name))
        print(f"wrote {len(samples)} pictures to {flags.save_each}")
    if flags.save_trajectory:
        chosen = np.unique(np.linspace(0, len(trajectory) - 1, 10).round().astype(int))
        strip = beside([to_image(trajectory[t][0], 96) for t in chosen], columns=10, gap=4)
        name = os.path.splitext(flags.out)[0] + "-trajectory.png"
        save_image(strip, name)
        print(f"wrote {name} (the first sample at {len(chosen)} levels)")
    return record


def arguments():
    """The command line; exits with one line on flags that contradict one another."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="written by train.py")
    add("targets", nargs="*", metavar="target", help="pictures; one panel each")
    add("--average", nargs="+", metavar="PICTURE", help="the mean φ of these")
    add("--mix", nargs=2, metavar="PICTURE", help="a mixture of two, see --weight")
    add("--weight", type=float, default=0.5, help="of the second of --mix (default: %(default)s)")
    add("--cluster", metavar="FILE:K", help="cluster K of a file that kmeans.py wrote")
    add("--unconditional", type=number(int, 1), metavar="N", help="N samples without a target")
    add("--denoise", metavar="PICTURE", help="denoise one picture of any size")
    add("--noise", type=number(float, 0, 100), help="with --denoise: noise to add first, pictures in [0, 1]")
    add("--adaptive", action="store_true", help="σ estimated for each sample, not by schedule")
    add("--samples", type=number(int, 1), default=8, help="for each target (default: %(default)s)")
    add("--sigma-max", type=number(float, 0, 100), help="first noise level (default: the checkpoint's)")
    add("--sigma-min", type=number(float, 0, 100), help="last (default: 0.03; 0.04 without a schedule)")
    add("--steps", type=number(int, 2), default=40, help="noise levels (default: %(default)s)")
    add("--schedule", choices=("linear", "geometric"), default="linear", help="default: %(default)s")
    add("--draws", type=number(int, 1), default=1, help="noise draws for φ_c (default: %(default)s)")
    add("--match-tol", type=number(float, 0, 1), default=0.01, help="share of the first L (default: 0.01)")
    add("--match-iters", type=number(int, 1), default=200, help="gradients at most (default: %(default)s)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="default: %(default)s")
    add("--data", metavar="PATH", help="where the training pictures are, if they have moved")
    add("--out", default="samples.png", help="the sheet, and a .json beside it (default: %(default)s)")
    add("--save-each", metavar="DIR", help="also every sample singly")
    add("--save-trajectory", action="store_true", help="also the first sample at ten noise levels")
    add("--force", action="store_true", help="overwrite what is there")
    add("--device", help="cpu, cuda, mps (default: the fastest there is)")
    flags = parser.parse_args()
    modes = [bool(v) for v in (flags.targets, flags.average, flags.mix, flags.cluster, flags.unconditional,
                               flags.denoise)]
    if sum(modes) != 1:
        parser.error("give a target, or one of --average, --mix, --cluster, --unconditional, --denoise")
    if flags.noise and not flags.denoise:
        parser.error("--noise goes with --denoise")
    if flags.adaptive and (flags.unconditional or flags.denoise):
        parser.error("--adaptive needs a target")
    return flags


def main():
    """The command line's work; returns the exit code."""
    flags = arguments()
    device = choose_device(flags.device)
    model, checkpoint = load_checkpoint(flags.checkpoint, device)
    stem, extension = os.path.splitext(flags.out)
    if extension.lower() != ".png":
        raise UserError(f"--out {flags.out}: the name must end in .png")
    flags.out_json = stem + ".json"
    for path in (flags.out, flags.out_json):
        if os.path.exists(path) and not flags.force:
            raise UserError(f"{path} exists: --force overwrites it, --out names another")
    if flags.save_each and os.path.isdir(flags.save_each) and os.listdir(flags.save_each) and not flags.force:
        raise UserError(f"--save-each {flags.save_each}: not empty; --force writes into it all the same")
    if not os.path.isdir(os.path.dirname(flags.out) or "."):
        raise UserError(f"--out {flags.out}: no such folder")
    flags.sigma_max = flags.sigma_max or checkpoint["sigma_max"]
    flags.sigma_min = flags.sigma_min or (0.04 if flags.unconditional or flags.adaptive else 0.03)
    if flags.sigma_min >= flags.sigma_max:
        raise UserError(f"--sigma-min {flags.sigma_min:g} must be below --sigma-max {flags.sigma_max:g}")
    if flags.sigma_max > checkpoint["sigma_max"]:
        print(f"warning: --sigma-max {flags.sigma_max:g}: the network has seen {checkpoint['sigma_max']:g}")
    with open(flags.checkpoint, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    settings = {k: v for k, v in vars(flags).items() if v is not None}
    try:
        work = denoise_picture if flags.denoise else draw_samples
        record = dict(settings=settings, checkpoint_sha256=digest, device=str(device),
                      **work(flags, model, checkpoint, device))
    except FloatingPointError as error:
        raise UserError(f"stopped at {error}") from None
    with open(flags.out_json + ".tmp", "w") as file:
        json.dump(record, file, indent=1)
    os.replace(flags.out_json + ".tmp", flags.out_json)
    taken = f" ({record['seconds']:.0f} s)" if "seconds" in record else ""
    print(f"wrote {flags.out}, {flags.out_json}{taken}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
