"""Draw pictures that share a target's φ: Algorithms 1, 2 (paper A: §3, App. C).

  python sample.py ckpt.pt cat.jpg                         # eight like it
  python sample.py ckpt.pt                            # four held-out targets
  python sample.py ckpt.pt --mix a.png b.png --weights 7 3 # .7 φ(a) + .3 φ(b)
  python sample.py ckpt.pt --cluster clusters.npz:7        # φ of a cluster
  python sample.py ckpt.pt --unconditional 16              # no target
  python sample.py ckpt.pt --denoise cat.jpg --noise 0.2   # of any size

It writes samples.png and samples.json. A sample depends on its seed; in its
last digits, and at times visibly, on batch size, threads and device.
"""
import json
import math
import os
import time
from types import SimpleNamespace
from typing import NamedTuple

from unet import (Parser, Progress, UserError, average_M, check_outputs, choose_device, duration, explain,
                  fixed_phi, grid, load_checkpoint, no_progress, number, phi, run, say, seeded, titled,
                  to_batch, to_image, write)
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from train import builtin_pictures, load_picture, psnr, training_data, untrained_network

# With 40 levels and 200 gradients samples come hardly closer to their target (assets/results.md, section 6)
STEPS = 25                                # noise levels of Algorithm 1
MAX_GRADIENTS = 10                        # of Algorithm 2, at each of them but the last
LONE_GRADIENTS = 20                       # of Algorithm 2 alone: with 10, d² of Eq. 4 is a third too small
SAMPLE_NOISE, TARGET_NOISE = 1, 2         # random streams of a seed


# §3, Algorithm 2

class Matching(NamedTuple):
    """What Algorithm 2 did to each picture, (N,) each."""
    first: torch.Tensor        # L before
    least: torch.Tensor        # L of the picture that is returned
    gradients: torch.Tensor    # how many steps it made
    converged: torch.Tensor    # did L fall to `tol` times its first value?


@torch.enable_grad()
def guidance_step(model, x, phi_c, tol=0.01, max_gradients=LONE_GRADIENTS, memory=None):
    """Algorithm 2: move each picture of x until L = ‖φ(x) − φ_c‖² is at most `tol` times its first value.

    x: (N, C, H, W). phi_c: (N, d) or (1, d). memory: a `Memory`, or None for plain gradient steps. Returns
    each picture where its L was least, and a `Matching`. Unlike the printed loop it limits the length of a
    step, and stops, each picture for itself, after `max_gradients` at the latest.

    As printed, ∇L = (φ_c − φ(x))ᵀ∇φ is subtracted, which climbs; the gradient is 2 (φ(x) − φ_c)ᵀ∇φ. The paper
    leaves the learning rate open. Here η = L/‖∇L‖², Polyak's for a loss whose least value is 0: it needs no
    tuning, although the gradient's size differs a hundredfold between noise levels.
    """
    gradients = torch.zeros(len(x), dtype=torch.long, device=x.device)
    last = None                                           # the step before, its x and residual
    for iteration in range(max_gradients + 1):
        x = x.detach().requires_grad_()                   # (N, C, H, W)
        phi_t = average_M(model, x)                       # φ(x_t), (N, d)
        residual = (phi_t - phi_c).detach()
        loss = residual.square().sum(1)                   # L(x_t) = ‖φ(x_t) − φ_c‖², (N,)
        if iteration == 0:
            first, least, best = loss, loss, x.detach()
        best = torch.where(per_picture(loss < least), x.detach(), best)
        least = torch.fmin(loss, least)
        unmet = ~(least <= tol * first)                   # (N,); a loss that is not a number is not met
        if iteration == max_gradients or not unmet.any():
            return best, Matching(first, least, gradients, ~unmet)

        if memory is None:
            step = gradient_step(x, phi_t, residual)      # −η ∇L(x_t)
        else:
            step = memory.step(x, phi_t, residual, last)
        last = x.detach(), residual
        x = x + per_picture(unmet) * limit(step)          # x_t ← x_t − η ∇L(x_t)
        gradients += unmet


def gradient_step(x, phi_t, residual):
    """−η ∇L at x (N, C, H, W), whose φ is phi_t (N, d); L = ‖residual‖², (N, d)."""
    gradient, = torch.autograd.grad(phi_t, x, 2 * residual)                    # ∇L
    eta = residual.square().sum(1) / square_norm(gradient)
    return -per_picture(eta) * gradient


def limit(step, rms=0.1):
    """The step, shortened to a root mean square of 0.1: φ is not nearly linear over longer ones."""
    length = (square_norm(step) / step[0].numel()).sqrt()
    factor = (rms / length).clamp(max=1)
    return step * per_picture(factor)


def per_picture(values):
    """(N,) -> (N, 1, 1, 1), which multiplies pictures."""
    return values.reshape(-1, 1, 1, 1)


def square_norm(x):
    """‖x‖² of each picture, (N,), at least 1e-30: one divides by it."""
    return x.square().sum((1, 2, 3)).clamp(min=1e-30)


# §3, Algorithm 1

class Level(NamedTuple):
    """What happened at one noise level of Algorithm 1, σ_T … σ_1; all but `sigma` are (N,)."""
    sigma: float
    sigma_before: torch.Tensor     # σ̂ before matching; None unless asked for
    sigma_after: torch.Tensor      # and after it (Fig. 20)
    first: torch.Tensor            # as in Matching
    least: torch.Tensor
    gradients: torch.Tensor
    converged: torch.Tensor


@torch.no_grad()
def reconstruct(model, condition, mean, sigmas, shape, generators, tol=0.01, max_gradients=MAX_GRADIENTS,
                accelerate=True, measure_before=False, progress=no_progress):
    """Algorithm 1: sample pictures whose φ is the target's, (N, C, H, W), N = len(generators).

    condition: condition(σ) gives φ_c at noise level σ, (N, d) or (1, d). mean: the mean colour m, (C,).
    sigmas: σ_T > … > σ_0. shape: (C, H, W). generators: one a sample. tol, max_gradients: of Algorithm 2,
    made fast by `Memory` if `accelerate`. measure_before: σ̂ before matching, too, in a tenth more time.
    Returns the samples and a list of `Level`. Lines are counted from "Draw".

    As printed, the last step, from σ_0, is made without matching. A full step x + s(x) is the posterior mean,
    which contracts: for Gaussian data of variance v₀ (and no matching) the variance obeys
    v ← (v₀/(v₀ + σ_t²))² v + σ²_{t−1} and ends below v₀.
    """
    levels = []
    memory = Memory() if accelerate else None             # one for all noise levels
    z = draw_z(shape, generators, mean.device)
    x = mean.view(-1, 1, 1) + sigmas[0] * z               # Alg. 1 line 1: x_T ~ N(m, σ_T² I)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):     # Alg. 1 line 2: t = T … 1
        phi_c = condition(sigma)                          # Alg. 1 lines 3, 4: φ of x_c + σ_t z
        before = estimate_sigma(model.score(x)) if measure_before else None
        x, matching = guidance_step(model, x, phi_c, tol, max_gradients, memory)         # Alg. 1 line 5
        z = draw_z(shape, generators, mean.device)       # Alg. 1 line 6
        s = model.score(x)
        x = x + s + sigma_next * z                        # Alg. 1 line 7
        levels.append(Level(sigma, before, estimate_sigma(s), *matching))
        progress(len(levels) / len(sigmas), f"σ {sigma:.2f}")
    return x + model.score(x), levels                     # Alg. 1 lines 9, 10


def sigma_schedule(sigma_max, sigma_min=None, steps=STEPS):
    """Algorithm 1's schedule: `steps` values of σ from sigma_max down to sigma_min, equally far apart.

    sigma_min: None for 0.03, or a tenth of a sigma_max below 0.3.
    """
    if sigma_min is None:
        sigma_min = min(0.03, sigma_max / 10)
    return np.linspace(sigma_max, sigma_min, steps).tolist()


def draw_z(shape, generators, device):
    """z ~ N(0, I), (N, *shape): picture i from generator i, drawn on the CPU so that devices agree."""
    z = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(z).to(device)


def estimate_sigma(s):
    """σ̂ = ‖s‖/√n of each picture, (N,): how noisy the network takes it to be."""
    return s.square().mean((1, 2, 3)).sqrt()


class Target(NamedTuple):
    """What samples are to share φ with: a picture, or the weighted mean φ of several (the paper's §4)."""
    name: str
    pictures: torch.Tensor         # (P, C, H, W)
    weights: torch.Tensor = None   # (P,), of sum 1; None: equal ones


def average(code, weights=None):
    """Σ w_p code_p, (d,), of code (P, d) and weights (P,); the mean without weights."""
    if weights is None:
        return code.mean(0)
    return weights.to(code) @ code


def target_phi(model, target, draws=1, generator=None):
    """The function σ -> φ_c (1, d): φ of the target's noisy pictures, with fresh noise at every call.

    As printed, φ_c is that of one noise realisation; here the mean of `draws`.
    """
    def condition(sigma):
        code = phi(model, target.pictures, sigma, draws, generator)
        return average(code, target.weights)[None]
    return condition


def told_by(encoder, model):
    """What `around` takes for a model: φ and its gradient are those of one network, the score another's."""
    return SimpleNamespace(encode=encoder.encode, score=model.score)


def around(model, checkpoint, targets, samples, sigmas, seed=0, draws=1, **options):
    """Algorithm 1 around several targets at once: [samples (S, C, H, W)] in their order, and the levels.

    targets: a list of `Target`. options, levels: as for `reconstruct`; the rows of the first target come
    first.
    """
    device = targets[0].pictures.device
    conditions, generators = [], []
    for j, target in enumerate(targets):
        generator = seeded(device, seed, TARGET_NOISE, j)
        conditions.append(target_phi(model, target, draws, generator))
        generators += [seeded("cpu", seed, SAMPLE_NOISE, j, i) for i in range(samples)]

    def all_conditions(sigma):
        each = torch.cat([condition(sigma) for condition in conditions])       # (len(targets), d)
        return each.repeat_interleave(samples, 0)

    mean = torch.tensor(checkpoint["mean"], device=device)
    shape = targets[0].pictures.shape[1:]
    x, levels = reconstruct(model, all_conditions, mean, sigmas, shape, generators, **options)
    return list(x.split(samples)), levels


# App. C, unconditional sampling (Kadkhodaie & Simoncelli 2021, Algorithm 1)

@torch.no_grad()
def sample_unconditional(model, mean, shape, generators, sigma_0=1.0, sigma_end=0.04, h_0=0.01, beta=0.05,
                         max_steps=2000, progress=no_progress):
    """Coarse-to-fine ascent of log p by partial score steps, (N, C, H, W).

    y ← y + h s(y) + γ z with h = h₀ t/(1 + h₀(t − 1)), γ² = ((1 − βh)² − (1 − h)²) σ̂², σ̂ = ‖s(y)‖/√n until
    σ̂ ≤ sigma_end, for each picture on its own. Returns y and the number of steps of each picture, (N,);
    max_steps where it did not end.
    """
    z = draw_z(shape, generators, mean.device)
    y = mean.view(-1, 1, 1) + sigma_0 * z
    steps = torch.zeros(len(y), dtype=torch.long, device=y.device)
    moving = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for t in range(1, max_steps + 1):
        s = model.score(y)
        sigma = estimate_sigma(s)                         # σ̂, (N,)
        h = h_0 * t / (1 + h_0 * (t - 1))
        gamma = math.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2) * sigma
        z = draw_z(shape, generators, mean.device)
        step = h * s + per_picture(gamma) * z
        ended = sigma <= sigma_end
        step = torch.where(per_picture(ended), s, step)   # at the end all of s
        y = torch.where(per_picture(moving), y + step, y)
        steps += moving
        moving &= ~ended
        if not moving.any():
            break
        fraction = math.log(sigma_0 / sigma.max()) / math.log(sigma_0 / sigma_end)
        progress(fraction, f"step {t}")
    return y, steps


# §3, Eq. 4

@torch.no_grad()
def conditional_distance(model, x1, x2, sigmas, draws=8, phi_draws=20, generator=None, tol=0.01,
                         max_gradients=LONE_GRADIENTS):
    """Eq. 4: d²(p₁, p₂), the symmetrised KL divergence of p(x given φ₁) and p(x given φ₂), in nats.

    ∫ (E_p₁‖s₁ − s₂‖² + E_p₂‖s₁ − s₂‖²) σ dσ over the range of `sigmas` (increasing). x1, x2: (C, H, W) in
    [0, 1]. Returns (the mean over draws, its standard error, the integrand (len(sigmas),), the share of the y
    that Algorithm 2 could match (len(sigmas),)).

    The paper does not print how. Here x_i + σz, `draws` times and with the same z at every σ, stands for a
    sample of p_i; the score of y given φ_i (of phi_draws realisations) is (x̂(y matched to φ_i) − y)/σ².
    Pictures of different φ never coincide, so that the exact integral diverges at σ → 0: the least σ is part
    of the definition.
    """
    z = torch.randn(draws, *x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    phi_1 = target_phi(model, Target("x1", x1[None]), phi_draws, generator)
    phi_2 = target_phi(model, Target("x2", x2[None]), phi_draws, generator)
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    integrand, matched = [], []
    for sigma in sigmas.tolist():
        y = torch.cat([x1 + sigma * z, x2 + sigma * z])   # (2·draws, C, H, W): first of p₁, then of p₂
        phi_c = torch.cat([phi_1(sigma), phi_2(sigma)]).repeat_interleave(len(y), 0)
        y = y.repeat(2, 1, 1, 1)                                               # to be told φ₁, φ₂
        x, matching = guidance_step(model, y, phi_c, tol, max_gradients, Memory())
        x_hat = model.denoise(x).cpu().double()           # MPS has no float64
        s1, s2 = ((x_hat - y.cpu()) / sigma ** 2).chunk(2)
        difference = (s1 - s2).square().sum((1, 2, 3))    # (2·draws,)
        of_p1, of_p2 = difference.chunk(2)
        integrand.append(sigma * (of_p1 + of_p2))         # (draws,)
        matched.append(matching.converged.cpu().double().mean())
    integrand = torch.stack(integrand)                    # (len(sigmas), draws)
    distances = integrate(integrand, sigmas)              # (draws,)
    error = distances.std() / math.sqrt(draws)
    return float(distances.mean()), float(error), integrand.mean(1), torch.stack(matched)


def integrate(v, sigmas):
    """∫ v dσ, v (len(sigmas), draws) ≥ 0 taken as a power of σ between neighbours: exact for v = σ⁻³."""
    h = (v * sigmas[:, None]).clamp(min=1e-300)           # ∫ v dσ = ∫ h d log σ
    a, b = h[:-1], h[1:]
    ratio = torch.log(b / a)
    mean = (b - a) / ratio                                # the logarithmic mean
    mean = torch.where(ratio.abs() < 1e-6, (a + b) / 2, mean)
    width = sigmas.log().diff()
    return width @ mean


# Algorithm 2 made fast

class Memory:
    """Each picture's last steps, as unit vectors ΔX, and by how much φ changed along each, ΔΦ.

    φ is nearly linear over a few short steps, and changes at one noise level much as at the next. So the
    combination ΔX c that removes most of r = φ(x) − φ_c is taken back without a gradient (a kind of Anderson
    acceleration), and the gradient step works on what is left. c minimises ‖r − ΔΦ c‖² + λ ‖ΔX c‖². The
    second term shortens the walk: told another picture's φ, photos go 1.4 times as far as by plain steps,
    without it up to twice as far. Plain steps need two to three times as many gradients.
    """

    SIZE = 16           # steps farther back are no longer linear
    WALK = 0.02         # λ, in the unit of the steepest of the steps, ‖Δφ‖²/‖Δx‖²
    CAUTION = 0.5       # the part of a gradient step: after a jump a whole one goes too far

    def __init__(self):
        self.dX = self.dPhi = None

    def step(self, x, phi_t, residual, last):
        """The jump −ΔX c and a gradient step on what it leaves of r; arguments as for `gradient_step`.

        last: (x, residual) of the step before, or None: nothing tells yet whether a jump would lead closer.
        """
        if last is None:
            return gradient_step(x, phi_t, residual)
        self.remember(last, x.detach(), residual)
        came_closer = residual.norm(dim=1, keepdim=True) <= last[1].norm(dim=1, keepdim=True)
        c = came_closer * self.combination(residual)      # after a step that led away there is no jump
        jump = -(c[:, None] @ self.dX).view_as(x)
        left = residual - (c[:, None] @ self.dPhi)[:, 0]
        return jump + gradient_step(x, phi_t, self.CAUTION * left)             # η ∇L scales with what is left

    def remember(self, last, x, residual):
        """Put the step from the last (x, r) to x (N, C, H, W), r (N, d) in the place of the oldest one."""
        x_before, residual_before = last
        length = square_norm(x - x_before).sqrt()[:, None]
        dx = (x - x_before).flatten(1) / length
        dphi = (residual - residual_before) / length
        if self.dX is None:
            self.dX = dx.new_zeros(len(x), self.SIZE, dx.shape[1])             # (N, k, C·H·W)
            self.dPhi = dphi.new_zeros(len(x), self.SIZE, dphi.shape[1])       # (N, k, d)
        moved = (length > 1e-6)[:, :, None]               # a picture that has arrived stands still
        self.dX = torch.where(moved, torch.cat([self.dX[:, 1:], dx[:, None]], 1), self.dX)
        self.dPhi = torch.where(moved, torch.cat([self.dPhi[:, 1:], dphi[:, None]], 1), self.dPhi)

    def combination(self, residual):
        """The c (N, k) for r (N, d)."""
        dX, dPhi = self.dX, self.dPhi
        steepest = dPhi.square().sum(2).amax(1).clamp(min=1e-12)               # (N,)
        walk = self.WALK * steepest[:, None, None]
        ridge = 1e-3 * torch.eye(self.SIZE, dtype=dX.dtype, device=dX.device)  # for parallel and empty places
        normal = dPhi @ dPhi.mT + walk * (dX @ dX.mT + ridge)                  # (N, k, k)
        return torch.linalg.solve(normal, dPhi @ residual[:, :, None])[:, :, 0]


# What a sample shares with its target

def similarities(model, samples, target=None, scale=None):
    """What the samples (S, C, H, W) of one Target have in common: a dict of lists, for the .json.

    phi_distance: ‖Δφ‖ to the target; phi_distance_relative: over `scale`, the mean distance of two pictures;
    correlations: of pixels, with the target and of each pair of samples.
    """
    centred, shared = normalised(samples), {}
    if len(samples) > 1:
        i, j = torch.triu_indices(len(samples), len(samples), 1)
        correlation = centred @ centred.T
        shared["correlation_between_samples"] = correlation[i, j].tolist()
    if target is None:
        return shared
    phi_c = average(fixed_phi(model, target.pictures), target.weights)
    distance = (fixed_phi(model, samples) - phi_c).norm(dim=1)                 # (S,)
    shared["phi_distance"] = distance.tolist()
    if scale:
        shared["phi_distance_relative"] = (distance / scale).tolist()
    if len(target.pictures) == 1:
        correlation = centred @ normalised(target.pictures)[0]
        shared["correlation_with_target"] = correlation.tolist()
    return shared


def normalised(x):
    """Pictures (N, C, H, W) as rows (N, C·H·W) of mean 0 and length 1: their products are correlations."""
    rows = x.flatten(1)
    return normalize(rows - rows.mean(1, keepdim=True), dim=1)


# Panels (Fig. 7)

def panel(samples, target=None, side=128):
    """Samples (S, C, H, W) in a square; with a target (P, C, H, W), it stands framed in the middle.

    At most four pictures of a target share the middle. Returns a PIL image.
    """
    cells = [ImageOps.expand(to_image(x, side), 4, "white") for x in samples]
    if target is None:
        return grid(cells, math.ceil(math.sqrt(len(cells))), 0)
    middle = to_image(target[0], side)
    if len(target) > 1:
        parts = grid([to_image(x) for x in target[:4]], 2, 0)
        middle = ImageOps.pad(parts, middle.size, Image.NEAREST, "white")
    k = math.ceil(math.sqrt(len(cells) + 1))
    if k % 2 == 0:                                        # an odd side has a middle
        k += 1

    def from_the_middle(place):
        return (place % k - k // 2) ** 2 + (place // k - k // 2) ** 2

    places = sorted(range(k * k), key=from_the_middle)    # the middle comes first
    sheet = [Image.new("RGB", cells[0].size, "white") for _ in places]
    sheet[places[0]] = ImageOps.expand(middle, 4, "#e69f00")
    for place, image in zip(sorted(places[1:len(cells) + 1]), cells):
        sheet[place] = image
    return grid(sheet, k, 0)


# Targets

def read_targets(flags, checkpoint, device):
    """The list of `Target` that the command line names, a panel each. Raises UserError."""
    if flags.cluster:
        return [Target(flags.cluster, cluster_members(flags, checkpoint, device))]
    if flags.mix:
        weights = torch.ones(len(flags.mix))
        if flags.weights:
            weights = torch.tensor(flags.weights)
        weights /= weights.sum()
        terms = [f"{w:.2f} φ({os.path.basename(path)})" for w, path in zip(weights, flags.mix)]
        pictures = [read_target(path, checkpoint, device) for path in flags.mix]
        return [Target(" + ".join(terms), torch.cat(pictures), weights)]
    if flags.targets:
        return [Target(path, read_target(path, checkpoint, device)) for path in flags.targets]
    return held_out_targets(checkpoint, device)


def read_target(path, checkpoint, device):
    """A picture file, cropped as in training, (1, C, H, W). Raises UserError if it cannot be read."""
    size, patches = checkpoint["size"], checkpoint["flags"]["patches"]
    x = load_picture(path, size, checkpoint["model"]["channels"], patches)
    if patches:
        say(f"{os.path.basename(path)}: the target is its central tile, {size}×{size} pixels")
    return to_batch(x[None], device)


def held_out_targets(checkpoint, device):
    """Four held-out pictures of the network's own data; new ones, if these are the built-in ones.

    Raises UserError if the data are not here or have changed: a network says little of other pictures.
    """
    settings = checkpoint["flags"]
    if settings["data"] is None:
        x, labels, classes = builtin_pictures(16, checkpoint["size"], settings["channels"], seed=1)
        rows, names = np.arange(16), [f"built-in {classes[label]}" for label in labels]
    else:
        try:
            pictures, _, rows = training_data(settings)
        except UserError as error:
            raise UserError(f"name a target: the network's own pictures are not here ({error})") from None
        if pictures.fingerprint != checkpoint["fingerprint"]:
            raise UserError(f"name a target: {settings['data']} has changed since the training")
        x, names = pictures.x, pictures.paths
    rows = np.random.default_rng(0).permutation(rows)[:4]
    return [Target(names[i], to_batch(x[i][None], device)) for i in rows]


def cluster_members(flags, checkpoint, device):
    """The pictures of cluster N of "clusters.npz:N", at most 64, by seed, (P, C, H, W). Raises UserError."""
    settings = checkpoint["flags"]
    path, _, cluster = flags.cluster.rpartition(":")
    with explain(flags.cluster, "--cluster needs FILE:NUMBER, a file of kmeans.py and a cluster"):
        with np.load(path) as saved:
            members = saved["paths"][saved["labels"] == int(cluster)].astype(str)
        if not len(members):
            raise ValueError("no such cluster")
    members = np.random.default_rng(flags.seed).permutation(members)[:64].tolist()
    if not settings["patches"] and all(os.path.isfile(name) for name in members):
        x = [load_picture(name, checkpoint["size"], settings["channels"]) for name in members]
        return to_batch(x, device)
    pictures = training_data(settings)[0]                 # tiles, rows of an array, built-in pictures
    row = {name: i for i, name in enumerate(pictures.paths)}
    for name in members:
        if name not in row:
            raise UserError(f"--cluster {flags.cluster}: {name} is not among the network's own pictures")
    return to_batch(pictures.x[[row[name] for name in members]], device)


# Command line

class Result(NamedTuple):
    """What a run leaves."""
    sheet: Image.Image
    record: dict                   # for the .json
    pictures: dict                 # {file name: (C, H, W)}, for --save-each


def sample_targets(flags, model, checkpoint, device):
    """Algorithm 1 around every target, a panel each: a Result."""
    targets = read_targets(flags, checkpoint, device)
    names = ", ".join(os.path.basename(target.name) for target in targets)
    say(f"drawing {flags.samples} pictures that share φ with {names}")
    sigmas = sigma_schedule(checkpoint["sigma_max"], steps=flags.steps)

    def draw(encoder):
        told = told_by(encoder, model)
        return around(told, checkpoint, targets, flags.samples, sigmas, flags.seed, tol=flags.tolerance,
                      max_gradients=flags.max_gradients, progress=Progress())

    samples, levels = draw(model)
    record = {"sigmas": sigmas, "levels": [level._asdict() for level in levels], "panels": []}
    panels, scale = [], checkpoint["training"].get("phi_distance")
    for x, target in zip(samples, targets):
        shared = similarities(model, x, target, scale)
        record["panels"].append({"target": target.name, "weights": target.weights, **shared})
        mean = np.mean(shared["phi_distance"])
        title = f"{os.path.basename(target.name)}: φ-distance of the samples to it: {mean:.2g}"
        if scale:
            title += f", {mean / scale:.0%} of that between two held-out pictures"
        say(title)
        panels.append(titled(title, panel(x, target.pictures), size=17))
    if flags.control:
        say("the same, told the φ of an untrained network")
        x = builtin_pictures(64, checkpoint["size"], model.channels)[0]
        controls, _ = draw(untrained_network(checkpoint, to_batch(x, device), flags.seed))
        for x, target in zip(controls, targets):
            panels.append(titled("control: told an untrained φ", panel(x, target.pictures), size=17))
    return Result(grid(panels, min(2, len(targets)), 24), record, numbered(samples))


def numbered(samples):
    """[samples (S, C, H, W) of each target] -> {"00_000.png": the first sample of the first, …}."""
    pictures = {}
    for j, x in enumerate(samples):
        for i, picture in enumerate(x):
            pictures[f"{j:02d}_{i:03d}.png"] = picture
    return pictures


def sample_freely(flags, model, checkpoint, device):
    """--unconditional: samples without a target, a Result."""
    n, size, sigma_max = flags.unconditional, checkpoint["size"], checkpoint["sigma_max"]
    say(f"drawing {n} pictures without a target")
    mean = torch.tensor(checkpoint["mean"], device=device)
    generators = [seeded("cpu", flags.seed, SAMPLE_NOISE, 0, i) for i in range(n)]
    x, steps = sample_unconditional(model, mean, (model.channels, size, size), generators, sigma_max,
                                    min(0.04, sigma_max / 10), progress=Progress())
    record = {"steps": steps, "panels": [similarities(model, x)]}
    return Result(panel(x), record, numbered([x]))


def denoise_picture(flags, model, checkpoint, device):
    """--denoise: one picture of any size, with noise and without, a Result."""
    x = to_batch(load_picture(flags.denoise, None, model.channels)[None], device)
    y = x + flags.noise * torch.randn(x.shape, generator=seeded("cpu", flags.seed)).to(device)
    with torch.no_grad():
        x_hat = model.denoise(y)
    estimated = float(estimate_sigma(x_hat - y))
    record = {"picture": flags.denoise, "noise_added": flags.noise, "noise_estimated": estimated}
    say(f"noise σ: {flags.noise:g} added, {estimated:.3f} estimated")
    pictures = {"given": x[0], "denoised": x_hat[0]}
    if flags.noise:
        pictures = {"given": x[0], "noisy": y[0], "denoised": x_hat[0]}
        record["psnr_noisy"], record["psnr_denoised"] = float(psnr(y, x)), float(psnr(x_hat, x))
        say(f"PSNR: {record['psnr_noisy']:.1f} dB noisy, {record['psnr_denoised']:.1f} dB denoised")
    if estimated < 0.03:
        say("warning: there is hardly any noise in this picture; the network then only takes detail away "
            "(--noise 0.2 adds some first)")
    side = max(384, x.shape[3])
    cells = [titled(name, to_image(picture, side)) for name, picture in pictures.items()]
    return Result(grid(cells, 3, 12), record, {f"{name}.png": picture for name, picture in pictures.items()})


def arguments():
    """The command line. Raises UserError for flags that contradict one another."""
    parser = Parser(description=__doc__, usage="sample.py checkpoint [target …] [flags]")
    add, count = parser.add_argument, number(int, 1)
    add("checkpoint", help="written by train.py")
    add("targets", nargs="*", metavar="target", help="pictures")
    add("--samples", type=count, default=8, metavar="N", help="around each target (8)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of all noise (0)")
    add("--out", default="samples.png", metavar="PNG", help="the sheet; a .json goes beside it")
    add("--force", action="store_true", help="overwrite what is there")
    add("--control", action="store_true", help="also told the φ of an untrained network")
    add("--save-each", metavar="DIR", help="also every picture singly")
    add("--mix", nargs="+", metavar="PNG", help="the mean φ of these pictures")
    add("--weights", nargs="+", type=float, metavar="W", help="of --mix, divided by their sum")
    add("--cluster", metavar="FILE:N", help="the mean φ of cluster N in kmeans.py's file")
    add("--unconditional", type=count, metavar="N", help="N samples without a target")
    add("--denoise", metavar="PICTURE", help="needs half a gigabyte a megapixel")
    add("--noise", type=number(float, 0), default=0.0, metavar="σ", help="added before --denoise")
    add("--steps", type=number(int, 2), default=STEPS, metavar="N", help=f"noise levels ({STEPS})")
    add("--max-gradients", type=count, default=MAX_GRADIENTS, metavar="N",
        help=f"to match φ at each level ({MAX_GRADIENTS})")
    add("--tolerance", type=number(float, 0), default=0.01, metavar="T",
        help="φ matches at this share of its first loss (0.01)")
    add("--device", help="cpu, cuda, mps (the fastest there is)")
    flags = parser.parse_intermixed_args()                # targets may stand after flags
    modes = [flags.targets, flags.mix, flags.cluster, flags.unconditional, flags.denoise]
    if sum(bool(mode) for mode in modes) > 1:
        parser.error("give targets, or one of --mix, --cluster, --unconditional, --denoise")
    if flags.weights and len(flags.weights) != len(flags.mix or []):
        parser.error("--weights: as many numbers as --mix has pictures")
    if flags.weights and abs(sum(flags.weights)) < 1e-6:
        parser.error("--weights: their sum must not be 0")
    if flags.noise and not flags.denoise:
        parser.error("--noise is for --denoise")
    return flags


def check(flags, data):
    """Before the work: UserError for outputs that cannot be written. data: the network's own pictures."""
    if not flags.out.lower().endswith(".png"):
        raise UserError(f"--out {flags.out}: the name must end in .png")
    flags.out_json = flags.out[:-4] + ".json"
    outputs = [flags.out, flags.out_json]
    if flags.save_each:
        os.makedirs(flags.save_each, exist_ok=True)
        for name in "00_000", "given", "noisy", "denoised":
            outputs.append(os.path.join(flags.save_each, f"{name}.png"))
    inputs = [*flags.targets, *(flags.mix or []), flags.denoise or ""]
    inputs = [os.path.realpath(path) for path in inputs]
    for path in outputs:
        if os.path.realpath(path) in inputs:
            raise UserError(f"{path}: is also to be read; --out names another")
    check_outputs(outputs, flags.force, data)


def main():
    """The command line's work."""
    flags = arguments()
    device = choose_device(flags.device)
    model, checkpoint = load_checkpoint(flags.checkpoint, device)
    check(flags, checkpoint["flags"]["data"])
    start, work = time.monotonic(), sample_targets
    if flags.unconditional:
        work = sample_freely
    elif flags.denoise:
        work = denoise_picture
    sheet, record, pictures = work(flags, model, checkpoint, device)
    if not all(x.isfinite().all() for x in pictures.values()):
        raise UserError("the pictures are not finite; another --seed may help")
    settings = {name: value for name, value in vars(flags).items() if value is not None}
    record = {
        "settings": settings,
        "checkpoint_sha256": checkpoint["sha256"],
        "device": str(device),
        "threads": torch.get_num_threads(),
        **record}
    images = {flags.out: sheet}
    if flags.save_each:
        for name, x in pictures.items():
            images[os.path.join(flags.save_each, name)] = to_image(x)
    for path, image in images.items():
        with write(path) as file:
            image.save(file, "png")
    with write(flags.out_json) as file:
        file.write(json.dumps(record, indent=1, default=torch.Tensor.tolist).encode())
    say(f"{duration(time.monotonic() - start)}; wrote {flags.out} and {flags.out_json}")


if __name__ == "__main__":
    run(main)
