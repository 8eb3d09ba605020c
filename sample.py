"""Draw pictures that share a target's φ: Algorithms 1 and 2, and what follows (paper A: §3, App. C).

    python sample.py ckpt.pt photo.jpg                           # eight samples around it -> samples.png
    python sample.py ckpt.pt                                     # four held-out pictures are the targets
    python sample.py ckpt.pt --mix a.png b.png --weights 0.7 0.3 # 0.7 φ(a) + 0.3 φ(b); else the mean φ
    python sample.py ckpt.pt --cluster clusters.npz:7            # the mean φ of a cluster of kmeans.py
    python sample.py ckpt.pt --unconditional 16                  # no target
    python sample.py ckpt.pt --denoise photo.jpg --noise 0.2     # add noise, remove it; any size

Targets are cropped as pictures are in training. samples.json, beside the sheet, holds the settings; for each
target `phi_distance` (‖Δφ‖ to it; `_relative`: over that of two held-out pictures) and correlations of
pixels; and for each noise level what Algorithm 2 did: `first` and `least` loss, `gradients`, `converged`, and
the estimated noise `sigma_before` and `sigma_after` matching.
"""
import json
import math
import os

from unet import Parser, Progress, UserError, check_outputs, load_checkpoint, number, phi, run, say, write
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from train import (ORANGE, builtin_pictures, caption, choose_device, fixed_phi, grid, load_picture, seeded,
                   to_batch, to_image, training_data)


# §3, Algorithm 2

def guidance_step(model, x, phi_c, tol=0.01, max_iters=200, memory=6):
    """Algorithm 2: move the pictures x (N, C, H, W) until L = ‖φ(x) − φ_c‖² is below tol × its first value.

    phi_c: (N, d) or (1, d). Returns each picture where its L was least, and a dict of (N,) tensors: `first`
    and `least` L, the number of `gradients`, `converged`. Each picture stops on its own.

    Printed, ∇L = (φ_c − φ(x))ᵀ∇φ is subtracted, which climbs; the gradient is 2 (φ(x) − φ_c)ᵀ∇φ. The step is
    Polyak's for a loss whose minimum is 0, η = L/‖∇L‖² for each picture: it has no parameter and follows the
    gradient's size, which differs a hundredfold between noise levels; no step is longer than 0.1 r.m.s. What
    makes it fast is in `Memory`; memory=0 leaves it out.
    """
    x, phi_c, past = x.detach().clone(), phi_c.expand(len(x), -1), Memory(memory)
    best, least, moving = x.clone(), x.new_full((len(x),), math.inf), torch.arange(len(x), device=x.device)
    gradients = torch.zeros_like(moving)
    for iteration in range(max_iters + 1):
        x_t = x[moving].requires_grad_()                                       # (n, C, H, W)
        with torch.enable_grad():
            phi_t = never_alone(lambda y: model.encode(y)[0].mean((2, 3)), x_t)            # φ(x_t), (n, d)
        r = phi_t.detach() - phi_c[moving]
        L = r.square().sum(1)                                                  # ‖φ(x_t) − φ_c‖²
        if iteration == 0:
            first = L
        better = L < least[moving]
        best[moving[better]], least[moving[better]] = x[moving[better]], L[better]
        unmet = least[moving] > tol * first[moving]                            # (n,)
        if iteration == max_iters or not unmet.any():
            return best, dict(first=first, least=least, gradients=gradients, converged=least <= tol * first)
        jump, rest, damping = past.extrapolate(r, L)                           # with no memory: 0, r, 1
        grad, = torch.autograd.grad(phi_t, x_t, 2 * rest)                      # 2 restᵀ∇φ: ∇L, if rest is r
        eta = damping * rest.square().sum(1) / grad.square().sum((1, 2, 3)).clamp(min=1e-30)
        step = past.remember(jump - eta[:, None, None, None] * grad, r, L, unmet)                # −η∇L
        moving = moving[unmet]
        x[moving] += step
        gradients[moving] += 1


class Memory:
    """What makes Algorithm 2 fast: the last steps ΔX of each picture and the changes ΔΦ of φ they caused.

    A combination of them, which costs no gradient, first removes what it can of r = φ(x) − φ_c, as in
    Anderson acceleration and GMRES; the gradient step removes the rest, with 0.3 η: after the jump the full
    one goes too far. Far from φ_c, where φ is not nearly linear in x, jumps walk off: there are none after a
    step that raised L, nor after 25 gradients. (80 pictures, each to take the φ of another one: all do, in
    12 gradients instead of 17; with twenty steps kept throughout, 63 do. In Algorithm 1: 12, not 36 to 50.)
    """

    def __init__(self, size):
        self.size, self.steps_left, self.past, self.last = size, 25, [], None  # past: pairs (ΔX, ΔΦ)

    def extrapolate(self, r, L):
        """(the jump −ΔX c, the rest r − ΔΦ c, η's factor); c = argmin ‖r − ΔΦ c‖², with a small ridge."""
        if not self.size or not self.steps_left or self.last is None:
            return 0, r, 1
        step, r_before, L_before = self.last
        self.past = (self.past + [(step, r - r_before)])[-self.size:]
        dx, dphi = (torch.stack(v, -1) for v in zip(*self.past))               # (n, C, H, W, k), (n, d, k)
        length = dphi.norm(dim=1, keepdim=True).clamp(min=1e-12)
        A = dphi / length
        ridge = 0.01 * torch.eye(A.shape[2], dtype=r.dtype, device=r.device)
        AA = (A[:, :, :, None] * A[:, :, None]).sum(1)     # AᵀA; `@` rounds by the number of pictures
        c = torch.linalg.solve(AA + ridge, A.mT @ r[:, :, None])               # (n, k, 1)
        c = c * (L <= L_before)[:, None, None]                                 # a step that raised L misleads
        return -(dx * (c.mT / length)[:, :, None, None]).sum(-1), r - (A @ c)[:, :, 0], 0.3

    def remember(self, step, r, L, unmet):
        """The steps (n, C, H, W) of the rows `unmet`, (n,), cut to 0.1 r.m.s.; kept for the next jump."""
        rms = step.square().mean((1, 2, 3), keepdim=True).sqrt()
        step = (step * (0.1 / rms.clamp(min=1e-30)).clamp(max=1))[unmet]
        self.past = [(dx[unmet], dphi[unmet]) for dx, dphi in self.past]
        self.last, self.steps_left = (step, r[unmet], L[unmet]), max(0, self.steps_left - 1)
        return step


def never_alone(f, x):
    """f(x), with a lone row x (1, …) computed as one of two: alone it is rounded in another way (CPU).

    Matching amplifies the 1e-6 to 7/255 in ten levels. Batches of two and more agree to the bit.
    """
    return f(x if len(x) > 1 else torch.cat([x, x]))[:len(x)]


# §3, Algorithm 1

@torch.no_grad()
def reconstruct(model, target, mean, sigmas, shape, generators, tol=0.01, max_iters=200,
                progress=lambda *_: None):
    """Algorithm 1: sample pictures whose φ is the target's, (N, C, H, W), N = len(generators).

    target: target(σ) gives φ_c at noise level σ, (N, d) or (1, d). mean: the mean colour m, (C,).
    sigmas: σ_T > … > σ_0. shape: (C, H, W). generators: one a sample; on a CPU sample i depends on generator
    i and on its φ_c alone, not on how many are drawn; other devices may round by batch size. Returns the
    samples and for each of σ_T … σ_1 a dict: Algorithm 2's, σ, and σ̂ before and after matching.

    As printed, the last step, from σ_0, is made without matching. A full step x + s(x) is the posterior mean,
    which contracts: for Gaussian data of variance λ (and no matching) the variance obeys
    v ← (λ/(λ + σ_t²))² v + σ²_{t−1} and ends below λ.
    """
    x, levels = mean.view(-1, 1, 1) + sigmas[0] * noise(shape, generators, mean.device), []   # N(m, σ_T² I)
    for t, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        before = noise_level(score(model, x))
        x, level = guidance_step(model, x, target(sigma), tol, max_iters)      # φ of x_c + σ_t z; Algorithm 2
        s = score(model, x)
        x = x + s + sigma_next * noise(shape, generators, mean.device)
        levels.append(dict(level, sigma=sigma, sigma_before=before, sigma_after=noise_level(s)))
        progress((t + 1) / len(sigmas), f"σ {sigma:.3f}  {int(level['gradients'].max())} gradients")
    return x + score(model, x), levels


def around(model, checkpoint, targets, samples, sigmas, seed=0, draws=1, **options):
    """Algorithm 1 around several targets at once: [samples (S, C, H, W)] in their order, and the levels.

    targets: [(pictures (P, C, H, W), weights (P,) or None)]. options, levels: as for `reconstruct`, rows of
    the first target first. The samples of one target share its noise: they differ by their own alone.
    """
    first = targets[0][0]
    conditions = [target_phi(model, x, weights, draws, seeded(first.device, seed, 2, j))
                  for j, (x, weights) in enumerate(targets)]
    generators = [seeded("cpu", seed, 1, j, i) for j in range(len(targets)) for i in range(samples)]
    x, levels = reconstruct(
        model, lambda sigma: torch.cat([phi_c(sigma) for phi_c in conditions]).repeat_interleave(samples, 0),
        torch.tensor(checkpoint["mean"], device=first.device), sigmas, first.shape[1:], generators, **options)
    return list(x.split(samples)), levels


def score(model, y):
    """s(y), (N, C, H, W), the same for a picture alone as among others."""
    return never_alone(model.score, y)


def noise(shape, generators, device):
    """z ~ N(0, I), (N, *shape): picture i from generator i, drawn on the CPU so that devices agree."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def noise_level(s):
    """σ̂ = ‖s‖/√n of each picture, (N,): how noisy the network takes it to be."""
    return s.square().mean((1, 2, 3)).sqrt()


def target_phi(model, pictures, weights=None, draws=1, generator=None):
    """The function σ -> φ_c (1, d): φ of the noisy conditioners (P, C, H, W), averaged with weights (P,).

    Fresh noise at each call, as Algorithm 1 prints, the mean of `draws` realisations. One picture is the
    paper's case; several, or a cluster, are its "future directions" (§4).
    """
    return lambda sigma: average(phi(model, pictures, sigma, draws, generator), weights)[None]


def average(values, weights=None):
    """Σ w_p values_p, (d,), of values (P, d) and weights (P,), by default equal."""
    weights = torch.full((len(values),), 1 / len(values)) if weights is None else weights
    return weights.to(values) @ values


# App. C, unconditional sampling (Kadkhodaie & Simoncelli 2021, Algorithm 1)

@torch.no_grad()
def sample_unconditional(model, mean, shape, generators, sigma_0=1.0, sigma_end=0.04, h_0=0.01, beta=0.05,
                         max_steps=2000, progress=lambda *_: None):
    """Coarse-to-fine ascent of log p by partial score steps, (N, C, H, W).

    y ← y + h s(y) + γ z with h = h₀ t/(1 + h₀(t − 1)), γ² = ((1 − βh)² − (1 − h)²) σ̂², σ̂ = ‖s(y)‖/√n until
    σ̂ ≤ sigma_end, for each picture on its own. Returns y and the number of steps of each picture, (N,);
    max_steps where it did not end.
    """
    y = mean.view(-1, 1, 1) + sigma_0 * noise(shape, generators, mean.device)
    steps, moving = torch.full((len(y),), max_steps), torch.arange(len(y))
    for t in range(1, max_steps + 1):
        x = y[moving]
        s = score(model, x)
        sigma = noise_level(s)                                                 # σ̂
        h = h_0 * t / (1 + h_0 * (t - 1))
        gamma = math.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2) * sigma
        z = noise(shape, [generators[i] for i in moving], mean.device)
        ended = sigma <= sigma_end                                             # then all of s
        y[moving] = x + torch.where(ended.view(-1, 1, 1, 1), s, h * s + gamma.view(-1, 1, 1, 1) * z)
        steps[moving[ended.cpu()]] = t
        moving = moving[~ended.cpu()]
        if not len(moving):
            break
        left = float((sigma.max() / sigma_end).log() / math.log(sigma_0 / sigma_end))      # in log σ
        progress(1 - left, f"σ {float(sigma.max()):.3f}, step {t}")
    return y, steps


# §3, Eq. 4

@torch.no_grad()
def conditional_distance(model, x1, x2, sigmas, draws=8, phi_draws=20, generator=None, tol=0.01,
                         max_iters=200):
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
    targets = [target_phi(model, x[None], draws=phi_draws, generator=generator) for x in (x1, x2)]
    sigmas, integrand, matched = torch.as_tensor(sigmas, dtype=torch.float64), [], []
    for sigma in sigmas.tolist():
        y = torch.cat(2 * [x1 + sigma * z, x2 + sigma * z])                    # (4·draws, C, H, W)
        phi_c = torch.cat([target(sigma) for target in targets]).repeat_interleave(2 * draws, 0)
        x, level = guidance_step(model, y, phi_c, tol, max_iters)
        s1, s2 = ((model.denoise(x).cpu().double() - y.cpu()) / sigma ** 2).chunk(2)       # MPS: no float64
        d = (s1 - s2).square().sum((1, 2, 3))
        integrand.append(sigma * (d[:draws] + d[draws:]))                      # E_p₁ + E_p₂, (draws,)
        matched.append(level["converged"].cpu().double().mean())
    values = integrate(torch.stack(integrand), sigmas)
    error = float(values.std() / math.sqrt(draws)) if draws > 1 else math.nan
    return float(values.mean()), error, torch.stack(integrand).mean(1), torch.stack(matched)


def integrate(v, sigmas):
    """∫ v dσ, v (len(sigmas), draws) ≥ 0 taken as a power of σ between neighbours: exact for v = σ⁻³."""
    h = (v * sigmas[:, None]).clamp(min=1e-300)
    a, b = h[:-1], h[1:]
    ratio = torch.log(b / a)
    mean = torch.where(ratio.abs() < 1e-6, (a + b) / 2, (b - a) / ratio)       # the logarithmic mean
    return (mean * sigmas.log().diff()[:, None]).sum(0)


# What a sample shares with its target

def similarities(model, samples, target, scale=None):
    """Per sample of one target (S, C, H, W): distance in φ, and correlations of pixels. A dict of lists.

    target: (pictures, weights or None), or None. scale: the mean φ-distance between two pictures, or None.
    """
    centred = lambda x: normalize((x - x.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)
    flat, found = centred(samples), {}
    if len(samples) > 1:
        i, j = torch.triu_indices(len(flat), len(flat), 1)
        found["correlation_between_samples"] = (flat @ flat.T)[i, j].tolist()
    if target is not None:
        pictures, weights = target
        distance = (fixed_phi(model, samples) - average(fixed_phi(model, pictures), weights)).norm(dim=1)
        found["phi_distance"] = distance.tolist()
        if scale:
            found["phi_distance_relative"] = (distance / scale).tolist()
        if len(pictures) == 1:
            found["correlation_with_target"] = (flat @ centred(pictures).T)[:, 0].tolist()
    return found


def panel(samples, target=None, side=128, labels=None):
    """Samples (S, C, H, W) in a square; with a target (P, C, H, W), it stands framed in the middle (Fig. 7).

    Several conditioners share the middle, at most four. labels: one a sample. Returns a PIL image.
    """
    def cell(image, label, frame="white"):
        image = ImageOps.expand(image, 4, frame)
        return captioned(image, label, 13) if labels else image

    cells = [cell(to_image(x, side), labels and labels[i]) for i, x in enumerate(samples)]
    k = math.ceil(math.sqrt(len(cells) + (target is not None)))
    if target is None:
        return grid(cells, k, 0)
    k += k % 2 == 0                                        # an odd side has a middle
    middle = to_image(target[0], side)
    if len(target) > 1:
        parts = [to_image(x).resize((middle.width // 2,) * 2, Image.LANCZOS) for x in target[:4]]
        middle = ImageOps.pad(grid(parts, 2, 0), middle.size, color="white")
    order = sorted(range(k * k), key=lambda i: (i % k - k // 2) ** 2 + (i // k - k // 2) ** 2)
    taken = sorted(order[1:len(cells) + 1])                # fewer samples than cells: those near the middle
    places = [Image.new("RGB", cells[0].size, "white")] * (k * k)
    for i, image in zip([*taken, order[0]], [*cells, cell(middle, "target", ORANGE)]):
        places[i] = image
    return grid(places, k, 0)


def captioned(image, text, size):
    """A PIL image with text below it."""
    return grid([image, caption(text, size, image.width)], 1, 0)


# Targets

def read_targets(flags, checkpoint, device):
    """[(name, pictures (P, C, H, W) to condition on, weights (P,) or None)], a panel each. UserError."""
    size, patches = checkpoint["size"], checkpoint["flags"]["patches"]

    def read(path):
        h, w = load_picture(path).shape[:2] if patches else (size, size)
        if (h, w) != (size, size):
            say(f"{os.path.basename(path)}: {w}×{h} pixels; the target is its central {size}×{size} tile")
        return to_batch(load_picture(path, size, checkpoint["model"]["channels"], patches)[None], device)

    if flags.mix:
        weights = flags.weights or [1.0] * len(flags.mix)
        weights = torch.tensor(weights) / sum(weights)
        name = " + ".join(f"{w:.2f} φ({os.path.basename(p)})" for w, p in zip(weights.tolist(), flags.mix))
        return [(name, torch.cat([read(p) for p in flags.mix]), weights)]
    if flags.cluster:
        return [(flags.cluster, cluster_members(flags, checkpoint, device), None)]
    return [(p, read(p), None) for p in flags.targets] or held_out_targets(checkpoint, device)


def held_out_targets(checkpoint, device):
    """As `read_targets`: four held-out pictures of the checkpoint's data, or built-in ones without these."""
    say("no target: four held-out pictures of the checkpoint's own data")
    try:
        pictures, _, rows = training_data(checkpoint["flags"])
        if pictures.fingerprint != checkpoint["fingerprint"]:
            raise UserError(f"{checkpoint['flags']['data']} has changed since")
        rows = np.random.default_rng(0).permutation(rows)[:4]
        names, x = [pictures.paths[i] for i in rows], pictures.x[rows]
    except UserError as error:
        say(f"{error}: four built-in pictures instead")
        x, labels, classes = builtin_pictures(4, checkpoint["size"], checkpoint["model"]["channels"], seed=1)
        names = [f"built-in {classes[k]}" for k in labels]
    return [(name, to_batch(v[None], device), None) for name, v in zip(names, x)]


def cluster_members(flags, checkpoint, device):
    """The pictures of cluster N of "clusters.npz:N", at most 64, by seed, (P, C, H, W). Raises UserError."""
    (path, _, k), run = flags.cluster.rpartition(":"), checkpoint["flags"]
    try:
        with np.load(path) as saved:
            members, clusters = saved["paths"][saved["labels"] == int(k)], int(saved["labels"].max()) + 1
    except Exception as error:                 # whatever numpy finds wrong with the file
        raise UserError(f"--cluster {flags.cluster}: must be FILE:NUMBER, by kmeans.py ({error})") from None
    if not len(members):
        raise UserError(f"--cluster {flags.cluster}: no such cluster; {path} has 0 to {clusters - 1}")
    members = np.random.default_rng(flags.seed).permutation(members.astype(str))[:64].tolist()
    if all(map(os.path.isfile, members)) and not run["patches"]:
        return to_batch([load_picture(m, run["size"], run["channels"]) for m in members], device)
    pictures = training_data(run)[0]           # tiles, rows of an array, built-in pictures
    row = {name: i for i, name in enumerate(pictures.paths)}
    if missing := [m for m in members if m not in row]:
        raise UserError(f"--cluster {flags.cluster}: {missing[0]} is not among the checkpoint's pictures")
    return to_batch(pictures.x[[row[m] for m in members]], device)


# Command line

def draw(flags, model, checkpoint, targets, device):
    """The samples of every target, [(S, C, H, W)], and what the .json says of how they came about."""
    if targets:
        sigmas = np.linspace(flags.sigma_max, flags.sigma_min, flags.steps).tolist()
        samples, levels = around(model, checkpoint, [t[1:] for t in targets], flags.samples, sigmas,
                                 flags.seed, flags.draws, progress=Progress(), tol=flags.match_tol,
                                 max_iters=flags.match_iters)
        if late := [int((~level["converged"]).sum()) for level in levels if not level["converged"].all()]:
            say(f"matching stopped at --match-iters {flags.match_iters} before {flags.match_tol:g} of the "
                f"first loss at {len(late)} of {len(levels)} noise levels (at most {max(late)} samples)")
        return samples, dict(sigmas=sigmas, levels=levels)
    x, steps = sample_unconditional(
        model, torch.tensor(checkpoint["mean"], device=device), (model.channels, *[checkpoint["size"]] * 2),
        [seeded("cpu", flags.seed, 1, 0, i) for i in range(flags.unconditional)], flags.sigma_max,
        flags.sigma_min, progress=Progress())
    if late := int((steps >= 2000).sum()):
        say(f"warning: {late} samples did not reach σ {flags.sigma_min:g} in 2000 steps")
    return [x], dict(steps=steps[None])


def sample_sheet(flags, model, checkpoint, device):
    """Sample, measure, draw: (the sheet, the record for the .json, {name of a single picture: PIL image})."""
    targets = [] if flags.unconditional else read_targets(flags, checkpoint, device)
    samples, record = draw(flags, model, checkpoint, targets, device)
    if not all(x.isfinite().all() for x in samples):
        raise UserError("the samples are not finite; another --seed or --sigma-max may help")
    panels, record["panels"], scale = [], [], checkpoint["training"].get("phi_distance")
    for x, (name, *target) in zip(samples, targets or [[None]]):
        found = similarities(model, x, target or None, scale)
        record["panels"].append(dict(target=name, weights=target[1] if target else None, **found))
        labels, title = [f"sample {i + 1}" for i in range(len(x))], "unconditional samples"
        if target:
            shown, form = (found["phi_distance_relative"], ".0%") if scale else (found["phi_distance"], ".2g")
            labels = [f"{label}: φ {v:{form}}" for label, v in zip(labels, shown)]
            title = (f"{os.path.basename(name)}: φ-distance to the target {np.mean(shown):{form}}"
                     + " of that between two held-out pictures" * bool(scale))
            if "correlation_with_target" in found:
                title += f", pixel correlation {np.mean(found['correlation_with_target']):.2f}"
            say(title)
        drawn = panel(x, target[0] if target else None, labels=labels)
        title += f"; σ {flags.sigma_max:g} to {flags.sigma_min:g}"
        panels.append(grid([caption(title, 17, drawn.width), drawn], 1, 0))
    single = {f"{j:02d}_{i:03d}.png": to_image(v) for j, x in enumerate(samples) for i, v in enumerate(x)}
    return grid(panels, 2, 24), record, single


def denoise_sheet(flags, model, checkpoint, device):
    """--denoise: one picture of any size, its output beside it. Returns as `sample_sheet`."""
    x = to_batch(load_picture(flags.denoise, None, checkpoint["model"]["channels"])[None], device)
    y = x + flags.noise * torch.randn(x.shape, generator=seeded("cpu", flags.seed)).to(device)
    with torch.no_grad():
        x_hat = model.denoise(y)
    if not x_hat.isfinite().all():
        raise UserError("the denoised picture is not finite")
    estimated = float(noise_level(x_hat - y))
    record = dict(picture=flags.denoise, noise_added=flags.noise, noise_estimated=estimated)
    say(f"noise level σ: estimated {estimated:.4f}" + (f", added {flags.noise:g}" if flags.noise else ""))
    if estimated < 0.03:
        say("warning: there is hardly any noise in this picture; the network then only takes detail away "
            "(--noise 0.2 adds some first)")
    shown = [("given", y, "given"), ("denoised", x_hat, f"denoised, σ estimated {estimated:.3f}")]
    if flags.noise:
        noisy, denoised = (float(-10 * (v - x).square().mean().log10()) for v in (y, x_hat))
        record |= dict(psnr_noisy=noisy, psnr_denoised=denoised)
        say(f"PSNR {noisy:.2f} dB noisy, {denoised:.2f} dB denoised")
        shown = [("clean", x, "clean"), ("noisy", y, f"noise σ {flags.noise:g}, {noisy:.1f} dB"),
                 ("denoised", x_hat, f"denoised, {denoised:.1f} dB")]
    cells = [captioned(to_image(v[0], max(384, x.shape[3])), text, 20) for _, v, text in shown]
    return grid(cells, 3, 12), record, {f"{name}.png": to_image(v[0]) for name, v, _ in shown}


def arguments():
    """The command line; exits with one line on flags that contradict one another."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="written by train.py")
    add("targets", nargs="*", metavar="target", help="pictures; a panel each")
    add("--mix", nargs="+", metavar="PICTURE", help="the weighted mean φ of these pictures")
    add("--weights", nargs="+", type=number(float, -100, 100), metavar="W",
        help="one for each of --mix, divided by their sum (default: equal)")
    add("--cluster", metavar="FILE:N", help="the mean φ of 64 pictures of cluster N, of kmeans.py's file")
    add("--unconditional", type=number(int, 1, 10_000), metavar="N", help="N samples without a target")
    add("--denoise", metavar="PICTURE", help="one picture of any size (about 0.5 GB a megapixel)")
    add("--noise", type=number(float, 0, 100), default=0.0, metavar="σ", help="with --denoise: noise to add")
    add("--samples", type=number(int, 1, 10_000), default=8, help="for each target (default: %(default)s)")
    add("--sigma-max", type=number(float, 0, 100), help="first noise level (default: the checkpoint's)")
    add("--sigma-min", type=number(float, 0, 100), help="last (default: 0.03; --unconditional 0.04)")
    add("--steps", type=number(int, 2, 100_000), default=40, help="noise levels (default: %(default)s)")
    add("--draws", type=number(int, 1, 10_000), default=1, help="noise draws for φ_c (default: %(default)s)")
    add("--match-tol", type=number(float, 0, 1), default=0.01, help="share of the first loss (default: 0.01)")
    add("--match-iters", type=number(int, 1, 10 ** 6), default=200, help="gradients at most (default: 200)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="default: %(default)s")
    add("--out", default="samples.png", help="the sheet, and a .json beside it (default: %(default)s)")
    add("--save-each", metavar="DIR", help="also every picture singly")
    add("--force", action="store_true", help="overwrite what is there")
    add("--device", help="cpu, cuda, mps (default: the fastest there is)")
    flags = parser.parse_intermixed_args()                 # targets may stand after flags
    modes = [m for m in ("targets", "mix", "cluster", "unconditional", "denoise") if getattr(flags, m)]
    if len(modes) > 1:
        parser.error("give targets, or one of --mix, --cluster, --unconditional, --denoise")
    mode, guided = "".join(modes) or "targets", "weights samples steps draws match_tol match_iters "
    useless = dict(mix="noise", unconditional=guided + "noise", denoise=guided + "sigma_max sigma_min")
    for name in useless.get(mode, "weights noise").split():
        if getattr(flags, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no meaning with {'--' * (mode != 'targets')}{mode}")
    if flags.weights and (len(flags.weights) != len(flags.mix) or abs(sum(flags.weights)) < 1e-6):
        parser.error(f"--weights: {len(flags.mix)} pictures need as many numbers, and not of sum 0")
    return flags


def check(flags, checkpoint):
    """Before the work: the outputs, and what depends on the checkpoint. Raises UserError."""
    if not flags.out.lower().endswith(".png"):
        raise UserError(f"--out {flags.out or repr('')}: the name must end in .png")
    flags.out_json = flags.out[:-4] + ".json"
    check_outputs([flags.out, flags.out_json], flags.force)
    inputs = [*flags.targets, *(flags.mix or []), flags.denoise or ""]
    if os.path.realpath(flags.out) in map(os.path.realpath, inputs):
        raise UserError(f"--out {flags.out}: is also to be read")
    flags.sigma_max = flags.sigma_max or checkpoint["sigma_max"]
    flags.sigma_min = flags.sigma_min or (0.04 if flags.unconditional else 0.03)
    if flags.sigma_min >= flags.sigma_max:
        raise UserError(f"--sigma-min {flags.sigma_min:g} must be below --sigma-max {flags.sigma_max:g}")
    if flags.sigma_max > checkpoint["sigma_max"]:
        say(f"warning: --sigma-max {flags.sigma_max:g}: the network has seen {checkpoint['sigma_max']:g}")
    if flags.save_each:
        near = {os.path.dirname(os.path.realpath(path)) for path in [flags.out, *inputs] if path}
        if os.path.realpath(flags.save_each) in near:
            raise UserError(f"--save-each {flags.save_each}: holds --out or what is to be read; name another")
        os.makedirs(flags.save_each, exist_ok=True)
        if os.listdir(flags.save_each) and not flags.force:
            raise UserError(f"--save-each {flags.save_each}: is not empty; --force writes into it")


def main():
    """The command line's work."""
    flags = arguments()
    device = choose_device(flags.device)
    model, checkpoint = load_checkpoint(flags.checkpoint, device)
    check(flags, checkpoint)
    work = denoise_sheet if flags.denoise else sample_sheet
    sheet, record, single = work(flags, model, checkpoint, device)
    record = dict(settings={k: v for k, v in vars(flags).items() if v is not None},
                  checkpoint_sha256=checkpoint["sha256"], device=str(device), **record)
    each = {os.path.join(flags.save_each, name): v for name, v in single.items()} if flags.save_each else {}
    for path, image in {flags.out: sheet, **each}.items():
        with write(path) as file:
            image.save(file, "png")
    with write(flags.out_json) as file:
        file.write(json.dumps(record, indent=1, default=torch.Tensor.tolist).encode())
    say(f"wrote {flags.out}, {flags.out_json}"
        + f" and {len(each)} pictures in {flags.save_each}" * bool(each))


if __name__ == "__main__":
    run(main)
